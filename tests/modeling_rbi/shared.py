# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images, models and comparisons that the tests of several modules use."""

import itertools
import logging
from contextlib import contextmanager

import torch
from torch import nn

from modeling_rbi import (
    RBIForImageClassification,
)


FEATURE_SIZE = 24


NUM_LABELS = 5


NUM_REFERENCES = 9


# Of the references: all classes, one of them once, and two that are not known.
LABELS = torch.tensor([0, 1, -100, 2, 2, 3, 4, -100, 4])


CLASS_NAMES = {label: f"class {label}" for label in range(NUM_LABELS)}


IMAGENET_MEAN, IMAGENET_STD = (
    torch.tensor(values, dtype=torch.float64)[:, None, None]
    for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


# Fields of small backbones for images of 32 x 32.
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


def make_images(number, size=32, seed=1):
    """Different smooth images, (number, 3, size, size), normalized with ImageNet's mean and std."""
    images = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear").double()
    return ((images - IMAGENET_MEAN) / IMAGENET_STD).float()


def make_items(number, labels=None, **kwargs):
    """A data set of dicts, by default with labels in turn; -100 leaves the label out."""
    labels = [index % NUM_LABELS for index in range(number)] if labels is None else labels
    images = make_images(number, **kwargs)
    return [
        {"pixel_values": image} | ({} if label == -100 else {"labels": label})
        for image, label in zip(images, labels, strict=True)
    ]


def items_of(pixel_values, labels):
    return [{"pixel_values": pixels, "labels": label} for pixels, label in zip(pixel_values, labels, strict=True)]


def make_features(number, seed=1):
    return torch.randn(number, FEATURE_SIZE, generator=torch.Generator().manual_seed(seed))


def natural_images(number, size=48):
    """Images with the 1/f spectrum of photographs, (number, 3, size, size) in [0, 1], float64."""
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2).sqrt()
    spectrum = torch.fft.rfft2(torch.randn(number, 3, size, size)) / frequency.clamp(min=1 / size)
    images = torch.fft.irfft2(spectrum, s=(size, size)).double()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low)


def line_drawings(number, size=48):
    """Images of large areas, black or light: as much contrast as there is."""
    areas = (torch.rand(number, 1, 6, 6) > 0.5).double() * 0.8
    return nn.functional.interpolate(areas, size=(size, size)).expand(-1, 3, -1, -1)


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return (images - mean) / std


def decibels(errors):
    return -10 * errors.log10()


def block_means(images, size):
    """Images, (n, C, H, W), averaged down by a whole factor."""
    factor = images.shape[-1] // size
    return images.reshape(*images.shape[:2], size, factor, size, factor).mean((3, 5))


def randomize_(module, std=0.4):
    """Weights far from their start, where nothing is zero and no two terms are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def moved_(module, scale=1.0):
    """Other weights than before."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


def make_model(config, reference_features=None, reference_pixels=None):
    """A model in evaluation whose head has random weights, with a bank if there are features for it."""
    model = RBIForImageClassification(config)
    for part in (model.rbi.rra, model.classifier):
        randomize_(part)
    if model.rbi.rra.relation_gain is not None:
        nn.init.normal_(model.rbi.rra.relation_gain, mean=0.1, std=0.02)
    model.eval()
    if reference_features is not None:
        model.set_reference_features(reference_features, reference_pixels)
    return model


def vary_backbone_(model):
    """Weights whose features differ between images as the features of a trained ConvNeXt do."""
    for name, parameter in model.rbi.backbone.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif "layer_scale" in name:
            nn.init.ones_(parameter)


def logits_of(model, pixel_values=None, image_features=None, **kwargs):
    with torch.no_grad():
        return model(pixel_values, image_features=image_features, **kwargs).logits


def some_references_masked(number=7):
    """Each image leaves out other references: none, some, all but one, all."""
    mask = torch.rand(number, NUM_REFERENCES, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0], mask[1], mask[2] = True, False, torch.arange(NUM_REFERENCES) == 4
    return mask


def state_of(model):
    """All that a failed call must leave as it was."""
    state = {name: value.clone() for name, value in itertools.chain(model.named_parameters(), model.named_buffers())}
    return model.config.to_dict(), [module.training for module in model.modules()], state


def assert_same_state(state, other):
    assert state[:2] == other[:2]
    assert state[2].keys() == other[2].keys()
    for name, value in state[2].items():
        assert torch.equal(value, other[2][name]), name


def bank_of(model):
    """The bank's tensors, those that are saved."""
    return {name: value for name, value in model.rbi.references.state_dict().items() if name != "probe"}


def assert_same_bank(bank, other):
    assert bank.keys() == other.keys()
    torch.testing.assert_close(bank["features"], other["features"], atol=1e-5, rtol=1e-5)
    assert torch.equal(bank["labels"], other["labels"])
    # The same level of 256, unless rounding takes a pixel over the border between two.
    assert (bank["images"].int() - other["images"].int()).abs().max() <= 1


def collate(items):
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


@contextmanager
def transformers_log(caplog):
    """Transformers' warnings, which do not reach the root logger."""
    logger = logging.getLogger("transformers")
    package = logging.getLogger("modeling_rbi")
    for each in (logger, package):
        each.addHandler(caplog.handler)
    caplog.clear()
    try:
        yield caplog
    finally:
        for each in (logger, package):
            each.removeHandler(caplog.handler)


# What rounding may change, relative to the largest value, in float32 results that are computed from other tensors: a
# copy, a reloaded model, another batch. Kernels order their sums by processor, batch size and memory alignment, which
# costs a few ulps (1.2e-7) per layer, and the softmax of large scores multiplies the difference. What truly differs in
# these tests (another bank, other weights, other neighbors) differs by more than ten times as much.
SAME_ANSWERS = 1e-4


def assert_same_answers(actual, expected):
    """Equal but for rounding (`SAME_ANSWERS`, or 16 ulps in low precision). NaN only where NaN is expected."""
    tolerance = max(SAME_ANSWERS, 16 * torch.finfo(expected.dtype).eps)
    largest = expected.detach().float().nan_to_num(0.0).abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest, equal_nan=True)
