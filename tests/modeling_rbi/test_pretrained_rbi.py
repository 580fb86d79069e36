# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""From a pretrained backbone or a fine-tuned classifier to an RBI model."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    BeitConfig,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    EfficientNetConfig,
    HieraConfig,
    MobileNetV2Config,
    PoolFormerConfig,
    PvtV2Config,
    ResNetConfig,
    SegformerConfig,
    SiglipConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
)
from tests.modeling_rbi.shared import (
    CONVOLUTIONS,
    FEATURE_SIZE,
    TRANSFORMER,
    WINDOWS,
    logits_of,
    randomize_,
)


OVERLAPPING_PATCHES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}


SPATIAL_REDUCTION = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}


TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 99}


INVERTED_BOTTLENECKS = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 4],
}


BIRDS = {0: "sparrow", 1: "wren", 2: "robin", 3: "thrush"}


CLASSIFIERS = {
    "vit": ViTConfig(**TRANSFORMER, intermediate_size=24),
    "deit": DeiTConfig(**TRANSFORMER, intermediate_size=24),
    "swin": SwinConfig(**WINDOWS),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32),
    "dinov2": Dinov2Config(**TRANSFORMER, mlp_ratio=2),
    "beit": BeitConfig(**TRANSFORMER, intermediate_size=24),
    "resnet": ResNetConfig(**CONVOLUTIONS),
    "mobilenet_v2": MobileNetV2Config(depth_multiplier=0.25, finegrained_output=False, image_size=32),
    "efficientnet": EfficientNetConfig(image_size=32, width_coefficient=0.05, hidden_dim=64, **INVERTED_BOTTLENECKS),
    "pvt_v2": PvtV2Config(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION, image_size=32),
    "segformer": SegformerConfig(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION),
    "hiera": HieraConfig(image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_query_pool=1),
    "clip": CLIPConfig(vision_config={**TRANSFORMER, "intermediate_size": 24}, text_config=TEXT),
    "siglip": SiglipConfig(vision_config={**TRANSFORMER, "intermediate_size": 24}, text_config=TEXT),
    "poolformer": PoolFormerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
}


REFUSED = {"poolformer"}


def make_classifier(name, pixel_values):
    """A classifier of random weights whose logits differ between images."""
    config = copy.deepcopy(CLASSIFIERS[name])
    config.id2label, config.label2id = BIRDS, {label: index for index, label in BIRDS.items()}
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    # DeiT has two, of which the first has one classifier.
    classifier = (model_class[0] if isinstance(model_class, tuple) else model_class)(config)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        # Statistics of the images for batch normalization, without which deep networks give 0 for all of them.
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        classifier.train()(pixel_values)
        # Logits of the size that trained ones have.
        *_, linear = (module for module in classifier.modules() if isinstance(module, nn.Linear))
        linear.weight /= classifier.eval()(pixel_values).logits.std(0).min()
    return classifier


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source"),
    list(zip([name for name in CLASSIFIERS if name not in REFUSED], itertools.cycle(["model", "path"]))),
)
def test_an_image_classifier_keeps_its_logits(name, source, pixel_values, tmp_path):
    classifier = make_classifier(name, pixel_values)
    with torch.no_grad():
        expected = classifier(pixel_values).logits
    assert expected.shape == (7, 4) and expected.std(0).min() > 0.9
    before = snapshot(classifier)
    if source == "path":
        classifier.save_pretrained(tmp_path)
    model = RBIForImageClassification.from_image_classifier(classifier.train() if source == "model" else str(tmp_path))
    assert classifier.training == (source == "model")
    assert model.config.relation_position_encoding == "bias" and not model.training
    assert model.config.id2label == BIRDS and model.config.num_labels == 4
    for scope in ("self", None):
        torch.testing.assert_close(logits_of(model, pixel_values, relation_scope=scope), expected, atol=1e-5, rtol=0)
    # Scope batch is a weighted mean of the images' logits.
    outputs = model(pixel_values, relation_scope="batch", output_relations=True)
    weighted = outputs.relation_attentions[:, 0] @ expected
    torch.testing.assert_close(outputs.logits, weighted, atol=1e-4, rtol=0)
    assert (weighted - expected).abs().max() > 1e-3

    # What is trained is a copy.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(pixel_values, labels=torch.arange(7) % 4).loss.backward()
    optimizer.step()
    assert (logits_of(model.eval(), pixel_values, relation_scope="self") - expected).abs().max() > 1e-4
    after = snapshot(classifier)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_image_classifier_takes_the_paper_preset_and_other_fields(pixel_values):
    classifier = make_classifier("convnext", pixel_values)
    model = RBIForImageClassification.from_image_classifier(
        classifier, preset="paper", head_initialization="identity", num_attention_heads=3, image_mean=[0.5, 0.5, 0.5]
    )
    assert model.config.attention_type == "dot_product" and model.config.num_attention_heads == 3
    assert model.config.image_mean == [0.5, 0.5, 0.5]
    with torch.no_grad():
        expected = classifier(pixel_values).logits
    torch.testing.assert_close(logits_of(model, pixel_values, relation_scope="self"), expected, atol=1e-5, rtol=0)


def test_an_image_classifier_without_bias(pixel_values):
    classifier = make_classifier("vit", pixel_values)
    classifier.classifier = nn.Linear(16, 4, bias=False)
    model = RBIForImageClassification.from_image_classifier(classifier)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, pixel_values, relation_scope="self"), classifier(pixel_values).logits, atol=1e-5, rtol=0
        )


def test_a_normalisation_before_the_classifier_is_refused(pixel_values):
    with pytest.raises(ValueError, match=r"PoolFormerForImageClassification does more than pooling.*normalization"):
        RBIForImageClassification.from_image_classifier(make_classifier("poolformer", pixel_values))


def test_two_classifiers_are_refused():
    classifier = DeiTForImageClassificationWithTeacher(CLASSIFIERS["deit"])
    with pytest.raises(
        ValueError, match=r"Teacher are not the output of one linear layer.*`from_backbone_pretrained`"
    ):
        RBIForImageClassification.from_image_classifier(classifier)


def test_an_unknown_preset_is_refused(pixel_values):
    with pytest.raises(ValueError, match=r'`preset` must be "paper" or "kernel", got \'papper\''):
        RBIForImageClassification.from_image_classifier(make_classifier("vit", pixel_values), preset="papper")


def test_an_unknown_argument_beside_a_model_is_refused(pixel_values):
    with pytest.raises(ValueError, match="num_head can only be passed with the path"):
        RBIForImageClassification.from_image_classifier(make_classifier("vit", pixel_values), num_head=3)


ODD_MEAN, ODD_STD = [0.11, 0.22, 0.33], [0.44, 0.55, 0.66]


@pytest.fixture
def vit_folder(tmp_path):
    """A ViT of random weights, saved with an image processor of odd statistics."""
    backbone = randomize_(ViTModel(CLASSIFIERS["vit"]), std=0.2)
    backbone.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=ODD_MEAN, image_std=ODD_STD)
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", backbone


@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("model_class", [RBIModel, RBIForImageClassification])
def test_a_pretrained_backbone(model_class, preset, vit_folder, pixel_values):
    folder, backbone = vit_folder
    model = model_class.from_backbone_pretrained(str(folder), preset=preset, num_labels=6, num_attention_heads=2)
    assert type(model) is model_class and not model.training
    assert model.config.num_labels == 6 and model.config.num_attention_heads == 2
    assert model.config.attention_type == getattr(RBIConfig, preset)().attention_type
    assert (model.config.image_mean, model.config.image_std) == (ODD_MEAN, ODD_STD)
    loaded, expected = model.base_model.backbone.state_dict(), backbone.state_dict()
    assert expected.keys() - loaded.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    with torch.no_grad():
        features, _ = model.base_model.extract_features(pixel_values)
        torch.testing.assert_close(features, backbone.eval()(pixel_values).last_hidden_state[:, 0])


def test_statistics_that_are_given_come_first(vit_folder):
    folder, _ = vit_folder
    model = RBIModel.from_backbone_pretrained(str(folder), image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, [0.25] * 3)
    model = RBIModel.from_backbone_pretrained(str(folder), image_mean=[0.5, 0.5, 0.5])
    assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, ODD_STD)
    processor = ViTImageProcessorPil(image_mean=[0.1, 0.1, 0.1], image_std=[0.9, 0.9, 0.9])
    model = RBIModel.from_backbone_pretrained(str(folder), image_processor=processor)
    assert (model.config.image_mean, model.config.image_std) == ([0.1] * 3, [0.9] * 3)


def test_the_vision_tower_of_a_checkpoint_of_several(pixel_values, tmp_path):
    clip = randomize_(CLIPModel(CLASSIFIERS["clip"]), std=0.2).eval()
    clip.save_pretrained(tmp_path)
    model = RBIForImageClassification.from_backbone_pretrained(str(tmp_path), num_labels=3)
    assert model.config.backbone_config.model_type == "clip_vision_model"
    with torch.no_grad():
        features, _ = model.rbi.extract_features(pixel_values)
        torch.testing.assert_close(features, clip.vision_model(pixel_values).pooler_output)


def test_a_backbone_in_low_precision_stays_so(vit_folder):
    folder, _ = vit_folder
    model = RBIModel.from_backbone_pretrained(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- What is refused -------------------------------------------------------------------------------------------------


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


def test_the_folder_of_another_model_is_refused_with_the_fix(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'of a "vit" model, not of RBI.*from_backbone_pretrained'):
        RBIForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights of ViTForImageClassification, for instance `classifier"):
        RBIForImageClassification.from_image_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="not the output of one linear layer"):
        RBIForImageClassification.from_image_classifier(ViTModel(vit_config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 3}, "The classifier has 5 classes"),
        ({"id2label": {0: "a", 1: "b"}}, "The classifier has 5 classes"),
        ({"pooling": "mean"}, "`pooling` is taken from the classifier"),
        ({"feature_size": 24}, "`feature_size` is taken from the classifier"),
    ],
)
def test_what_the_classifier_decides_cannot_be_given(vit_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        RBIForImageClassification.from_image_classifier(ViTForImageClassification(vit_config), **arguments)


def test_an_rbi_model_is_no_classifier_to_plug_into(model):
    with pytest.raises(ValueError, match="is an RBI model already"):
        RBIForImageClassification.from_image_classifier(model)


def test_a_misspelt_argument_is_named(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no argument `num_label`: did you mean `num_labels`"):
        RBIForImageClassification.from_backbone_pretrained(str(tmp_path), num_label=3)


NAMES = {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"num_labels": 5, "id2label": NAMES}, r"is 5, but `id2label` names 3 classes \(a, b, c\): leave `num"),
        ({"num_labels": 2, "id2label": NAMES}, r"is 2, but `id2label` names 3 classes .*, or name 2 classes"),
        ({"num_labels": 5, "label2id": {"a": 0, "b": 1, "c": 2}}, "is 5, but `label2id` names 3 classes"),
        ({"num_labels": 1, "id2label": {}}, "is 1, but `id2label` names 0 classes"),
    ],
)
def test_a_number_of_classes_that_contradicts_their_names(vit_folder, classes, message):
    with pytest.raises(ValueError, match=message):
        RBIForImageClassification.from_backbone_pretrained(vit_folder[0], **classes)


@pytest.mark.parametrize("classes", [{"id2label": NAMES}, {"num_labels": 3, "id2label": NAMES}, {"num_labels": 3}])
def test_a_number_of_classes_and_their_names(vit_folder, classes):
    model = RBIForImageClassification.from_backbone_pretrained(vit_folder[0], **classes)
    assert model.classifier.out_features == 3
    assert model.config.id2label == (NAMES if "id2label" in classes else {n: f"LABEL_{n}" for n in range(3)})
