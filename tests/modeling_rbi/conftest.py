# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Models and banks that the tests of several modules use."""

import pytest
import torch
from transformers import ResNetConfig

from modeling_rbi import RBIConfig, RBIForImageClassification
from tests.modeling_rbi.shared import (
    FEATURE_SIZE,
    LABELS,
    NUM_LABELS,
    NUM_REFERENCES,
    make_images,
    make_items,
    make_model,
    vary_backbone_,
)


@pytest.fixture
def features(pixel_values):
    return torch.randn(len(pixel_values), FEATURE_SIZE)


@pytest.fixture
def reference_features():
    return torch.randn(NUM_REFERENCES, FEATURE_SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def reference_pixels():
    return make_images(NUM_REFERENCES, seed=2)


@pytest.fixture
def bare_model(config):
    """Both presets, without a bank."""
    return make_model(config)


@pytest.fixture
def model(bare_model):
    """Both presets, with a bank of images that went through the backbone."""
    vary_backbone_(bare_model)
    bare_model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    return bare_model


@pytest.fixture(params=["kernel, 3 heads", "paper, 2 heads"])
def varied_model(request, backbone_config):
    """Both presets, with a head and a backbone of random weights."""
    preset, _, heads = request.param.partition(", ")
    config = getattr(RBIConfig, preset)(
        backbone_config=backbone_config,
        num_labels=NUM_LABELS,
        num_attention_heads=int(heads[:1] or 1),
        attention_temperature=0.5,
        relation_gain=0.1,
    )
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.3)
        for name in ("logit_scale", "relation_gain"):
            if (parameter := getattr(model.rbi.rra, name)) is not None:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def voting_model(config, reference_features, reference_pixels):
    """Both presets, with labels of some references."""
    model = make_model(config)
    model.set_reference_features(reference_features, reference_pixels, LABELS)
    return model


@pytest.fixture
def resnet_model():
    """It takes images of any size, and has batch normalization."""
    backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return make_model(RBIConfig.paper(backbone_config=backbone_config, feature_size=12, num_labels=NUM_LABELS))
