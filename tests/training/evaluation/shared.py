# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Planted features: models and banks that the tests of several modules use."""

import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.evaluation.classifiers import predict_from
from training.evaluation.features import CachedImages


# The classes of `published`.
NAMES = [f"{number:03d}.Made_up_Bird_{number}" for number in range(1, 5)]

# --- For an assessment -----------------------------------------------------------------------------------------------

NUM_CLASSES = 5


def planted_leak(backbone_config, num_images=200):
    """
    Attention averages over the batch. Four in five images tell nothing of their class, the fifth tells it clearly:
    among class-mates, all learn it.
    """
    config = RBIConfig.kernel(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=NUM_CLASSES,
        relation_position_encoding="none",
        attention_temperature=2.0,
    )
    labels = torch.arange(NUM_CLASSES).repeat(num_images // NUM_CLASSES)
    features = 0.3 * torch.randn(num_images, 24)
    is_clear = torch.rand(num_images) < 0.2
    features[is_clear, labels[is_clear]] += 3
    return _with_features(RBIForImageClassification(config), features, labels)


def no_leak(backbone_config, num_images=200):
    """
    Each image keeps its own features, to which noise is added that is of no class, the mean of the batch's: in a
    batch there is less of it than alone, and answers change with the batch, but a class-ordered one tells no more.
    """
    config = RBIConfig.paper(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=NUM_CLASSES,
        relation_position_encoding="none",
        residual_gate="sum",
    )
    model = RBIForImageClassification(config)
    with torch.no_grad():
        for layer in (model.rbi.rra.query, model.rbi.rra.key, model.rbi.rra.value, model.rbi.rra.residual):
            layer.weight.zero_()
            layer.bias.zero_()
        model.rbi.rra.residual.weight[:10, :10] = torch.eye(10)
        model.rbi.rra.value.weight[:10, 10:20] = torch.eye(10)
    labels = torch.arange(NUM_CLASSES).repeat(num_images // NUM_CLASSES)
    features = torch.randn(num_images, 24)
    features[torch.arange(num_images), labels] += 1.5
    features[:, 10:20] *= 3
    return _with_features(model, features, labels)


def _with_features(model, features, labels):
    with torch.no_grad():
        model.classifier.weight.copy_(3 * torch.eye(NUM_CLASSES, 24))
        model.classifier.bias.zero_()
    images = CachedImages(torch.zeros(len(labels), 3, 4, 4), features, labels)
    return predict_from(model.eval(), images), labels


# --- For a reference bank --------------------------------------------------------------------------------------------

NUM_LABELS = 4
FEATURE_SIZE = 24
NUM_HELD_OUT = 120
LABELS = torch.arange(NUM_HELD_OUT) % NUM_LABELS
REFERENCE_LABELS = torch.arange(40) % NUM_LABELS


def one_hot(labels, size=FEATURE_SIZE):
    return nn.functional.one_hot(labels, size).float()


def images_of(labels, noise=0.05):
    """Images, normalized, (n, 3, 16, 16), that are alike where the labels are the same."""
    patterns = torch.rand(NUM_LABELS, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return ((patterns[labels] + noise * torch.randn(len(labels), 3, 16, 16)).clamp(0, 1) - 0.5) / 0.25


def make_model(backbone_config, preset="kernel", **fields):
    """A classifier that reads its classes off the first features."""
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    sizes = {"feature_size": FEATURE_SIZE, "num_labels": NUM_LABELS}
    config = getattr(RBIConfig, preset)(backbone_config=backbone_config, **statistics | sizes | fields)
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(NUM_LABELS, FEATURE_SIZE))
        model.classifier.bias.zero_()
    return model


def clear_bank(noise=0.1):
    """Features of the references, of their classes."""
    return one_hot(REFERENCE_LABELS) + noise * torch.randn(len(REFERENCE_LABELS), FEATURE_SIZE)


def noisy_held_out(pixel_labels=LABELS, noise=0.6):
    features = one_hot(LABELS) + noise * torch.randn(NUM_HELD_OUT, FEATURE_SIZE)
    return CachedImages(images_of(pixel_labels), features, LABELS)
