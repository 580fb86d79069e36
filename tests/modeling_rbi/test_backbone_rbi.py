# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Any vision model as a backbone: how it is pooled, what it is measured to give, and what is refused."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    MgpstrConfig,
    ResNetConfig,
    SegformerConfig,
    SwinConfig,
    TimmWrapperConfig,
    VideoMAEConfig,
    ViTConfig,
    ViTModel,
)

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
)
from tests.modeling_rbi.shared import CONVOLUTIONS, FEATURE_SIZE, TRANSFORMER, WINDOWS, randomize_


# A backbone's config; what stands in front of its 16 patch tokens; what "auto" is.
POOLED = {
    "vit": (ViTConfig(**TRANSFORMER, intermediate_size=24), 1, "cls"),
    "deit": (DeiTConfig(**TRANSFORMER, intermediate_size=24), 2, "cls"),
    "dinov2": (Dinov2Config(**TRANSFORMER, mlp_ratio=2), 1, "cls_mean"),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(**TRANSFORMER, mlp_ratio=2, num_register_tokens=3),
        4,
        "cls_mean",
    ),
    "clip_vision": (CLIPVisionConfig(**TRANSFORMER, intermediate_size=24), 1, "pooler"),
    "swin": (SwinConfig(**WINDOWS), 0, "pooler"),
    "resnet": (ResNetConfig(**CONVOLUTIONS), 0, "pooler"),
}


OVERLAPPING_PATCHES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}


SPATIAL_REDUCTION = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}


# --- Pooling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_by_hand(outputs, pooling, num_prefix_tokens):
    hidden_state = outputs.last_hidden_state
    if pooling == "pooler":
        return outputs.pooler_output.reshape(len(hidden_state), -1)
    if hidden_state.ndim == 4:
        return hidden_state.mean((2, 3))
    mean = sum(hidden_state[:, index] for index in range(num_prefix_tokens, hidden_state.shape[1]))
    mean = mean / (hidden_state.shape[1] - num_prefix_tokens)
    first = hidden_state[:, 0]
    return {"cls": first, "mean": mean, "cls_mean": torch.cat([first, mean], 1)}[pooling]


@pytest.mark.parametrize("pooling", ["auto", "pooler", "cls", "mean", "cls_mean"])
@pytest.mark.parametrize("name", POOLED)
def test_pooling_is_that_by_hand(name, pooling, pixel_values):
    backbone_config, num_prefix_tokens, auto = POOLED[name]
    config = RBIConfig(backbone_config=backbone_config, pooling=pooling)
    if "cls" in pooling and not num_prefix_tokens:
        with pytest.raises(ValueError, match=f'`pooling="{pooling}"`, but {name} has no class token: use "mean"'):
            RBIModel(config)
        return
    model = randomize_(RBIModel(config).eval(), std=0.2)
    features, outputs = model.extract_features(pixel_values)
    if pooling in ("cls", "mean", "cls_mean") and num_prefix_tokens:
        assert outputs.last_hidden_state.shape[1] == num_prefix_tokens + 16
    expected = pooled_by_hand(outputs, auto if pooling == "auto" else pooling, num_prefix_tokens)
    assert features.shape == (7, model.config.feature_size)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "clip_vision"])
def test_prefix_tokens_are_left_out_of_the_mean_at_other_sizes(name):
    backbone_config, num_prefix_tokens, _ = POOLED[name]
    model = randomize_(RBIModel(RBIConfig(backbone_config=backbone_config, pooling="mean")).eval(), std=0.2)
    # Not square, and no multiple of the patches.
    features, outputs = model.extract_features(torch.randn(2, 3, 40, 59), interpolate_pos_encoding=True)
    assert outputs.last_hidden_state.shape[1] == num_prefix_tokens + 5 * 7
    torch.testing.assert_close(features, pooled_by_hand(outputs, "mean", num_prefix_tokens), atol=1e-5, rtol=1e-5)


def test_no_pooler_where_there_is_none():
    backbone_config = SegformerConfig(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION)
    with pytest.raises(ValueError, match=r'`pooling="pooler"`, but segformer gives no `pooler_output`: use "mean"'):
        RBIModel(RBIConfig(backbone_config=backbone_config, pooling="pooler"))


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("preset", ["paper", "kernel"])
def test_no_parameter_goes_without_gradient(name, preset, pixel_values):
    config = getattr(RBIConfig, preset)(backbone_config=POOLED[name][0], num_labels=5)
    model = RBIForImageClassification(config).train()
    model(pixel_values, labels=torch.arange(7) % 5).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Masked patches are for pretraining alone.
    assert {name for name in unused if not name.endswith("mask_token")} == set()


def test_the_pooler_that_is_asked_for_is_kept(pixel_values):
    config = RBIConfig(backbone_config=POOLED["vit"][0], pooling="pooler")
    assert RBIModel(config).backbone.pooler is not None
    config = RBIConfig(backbone_config=POOLED["vit"][0])
    assert RBIModel(config).backbone.pooler is None


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_pixels", "named"),
    [
        (lambda pixels: pixels[:, :1], r"1 channels, but the model takes 3: convert the images"),
        (lambda pixels: pixels.permute(0, 2, 3, 1), r"32 channels, but the model takes 3.*channels second"),
        (lambda pixels: pixels[0], r"shape \(batch_size, num_channels, height, width\).*`pixel_values\[None\]`"),
        (lambda pixels: pixels[None], r"shape \(batch_size, num_channels, height, width\).*\(1, 7, 3, 32, 32\)"),
        (lambda pixels: pixels[:0], r"empty batch: pass at least one image"),
        (lambda pixels: (pixels * 255).to(torch.uint8), r"torch\.uint8, but must be float.*image processor"),
        (lambda pixels: pixels.long(), r"torch\.int64, but must be float.*image processor"),
        (lambda pixels: None, r"You have to specify pixel_values"),
    ],
    ids=["gray", "channels_last", "rank_3", "rank_5", "empty", "uint8", "int64", "none"],
)
@pytest.mark.parametrize("scope", ["self", "batch"])
def test_bad_pixels_are_refused(bare_model, pixel_values, make_pixels, named, scope):
    for part in (bare_model, bare_model.rbi):
        with pytest.raises(ValueError, match=named) as caught:
            part(make_pixels(pixel_values), relation_scope=scope)
        assert "pixel_values" in str(caught.value)


@pytest.mark.parametrize(
    ("make_features", "named"),
    [
        (lambda features: features[:, :-1], r"\(batch_size, 24\).*got \(7, 23\)"),
        (lambda features: features[0], r"\(batch_size, 24\).*got \(24,\)"),
        (lambda features: features[:0], r"batch size of at least 1"),
        (lambda features: features[:5], r"7 images, but `image_features` 5"),
    ],
    ids=["size", "rank", "empty", "number"],
)
def test_bad_features_are_refused(bare_model, pixel_values, features, make_features, named):
    with pytest.raises(ValueError, match=named) as caught:
        bare_model(pixel_values, image_features=make_features(features), relation_scope="batch")
    assert "`image_features`" in str(caught.value)


# --- Bad backbones ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vit_config():
    return ViTConfig(
        hidden_size=FEATURE_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )


@pytest.mark.parametrize("model_type", ["pvt", "vit_mae", "yolos"])
def test_backbones_that_would_be_silently_wrong_are_refused(model_type):
    with pytest.raises(ValueError, match="cannot be a backbone: it"):
        RBIModel(RBIConfig(backbone_config={"model_type": model_type}))


def test_a_feature_size_that_is_not_the_backbones_is_named(backbone_config, pixel_values):
    model = RBIModel(RBIConfig(backbone_config=backbone_config, feature_size=FEATURE_SIZE + 1))
    with pytest.raises(ValueError, match="`feature_size` is 25, but the backbone gives 24 features"):
        model(pixel_values)


def test_a_backbone_checkpoint_without_some_weights_is_refused(vit_config, tmp_path):
    shallow = copy.deepcopy(vit_config)
    shallow.num_hidden_layers = 1
    ViTModel(shallow).save_pretrained(tmp_path)
    vit_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of ViTModel, for instance"):
        RBIModel.from_backbone_pretrained(str(tmp_path))


def test_a_truncated_backbone_checkpoint_is_refused(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"cannot be read .* truncated or was altered"):
        RBIModel.from_backbone_pretrained(str(tmp_path))


_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "backbone_config, message",
    [
        pytest.param(BertConfig(**_TINY), "BertConfig, which does not belong to a vision model", id="text"),
        pytest.param(VideoMAEConfig(**_TINY), "VideoMAEModel for an image of 224 x 224 pixels", id="video"),
        pytest.param(MgpstrConfig(**_TINY), "mgp-str gives no `last_hidden_state`", id="nothing-to-pool"),
        pytest.param(
            TimmWrapperConfig(architecture="resnet18", do_pooling=False),
            "leave its `do_pooling`",
            id="timm-unpooled",
            marks=pytest.mark.timm,
        ),
        pytest.param(
            TimmWrapperConfig(architecture="resnet18", model_args={"features_only": True}),
            "`features_only`",
            id="timm-features-only",
            marks=pytest.mark.timm,
        ),
        pytest.param(
            TimmWrapperConfig(architecture="resnet18", model_args={"global_pool": ""}),
            "`global_pool`",
            id="timm-no-global-pool",
            marks=pytest.mark.timm,
        ),
    ],
)
def test_a_backbone_that_cannot_work_says_why(backbone_config, message):
    with pytest.raises(ValueError, match=message):
        RBIModel(RBIConfig(backbone_config=backbone_config))
