"""The model and its image processor from the arguments: that they fit each other, and that what cannot be is told."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIForImageClassification, UserError, load_image_processor
from training.fine_tuning import models
from training.fine_tuning.models import ModelArguments, load_model


CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}
LABELS = ["ant", "bee", "cat"]
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.15]


def _without_type(fields):
    return {name: value for name, value in fields.items() if name != "model_type"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pretrained backbone in a folder, with an image processor of unusual statistics."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(1)
    ConvNextModel(ConvNextConfig(**_without_type(CONVNEXT))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rbi_checkpoint(checkpoint, tmp_path_factory):
    """An RBI model of the kernel form, 3 classes, in a folder."""
    folder = tmp_path_factory.mktemp("rbi")
    torch.manual_seed(2)
    model, image_processor = load_model(ModelArguments(str(checkpoint), preset="kernel"), LABELS)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photographs():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(2)]


def assert_psnr_sees_the_images(model, image_processor, photographs):
    """Undoing the normalization with the model's statistics gives the images in [0, 1] as they were resized."""
    pixel_values = image_processor(photographs, return_tensors="pt")["pixel_values"]
    size = (image_processor.size["width"], image_processor.size["height"])
    resample = Image.Resampling(image_processor.resample)
    expected = np.stack([np.asarray(each.resize(size, resample)) for each in photographs]) / 255
    assert model.config.psnr_image_size is None, "compared at full size"
    images = model.rbi.rpe.unit_range_images(pixel_values).view(pixel_values.shape)
    torch.testing.assert_close(
        images.double(), torch.from_numpy(expected).permute(0, 3, 1, 2), atol=2e-5, rtol=0, check_dtype=False
    )


SIZES = [{}, {"image_size": 48}, {"image_size": 64, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}]


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("source", ["random", "backbone", "rbi"])
def test_size_and_statistics_reach_the_processor_and_the_model(
    checkpoint, rbi_checkpoint, photographs, source, options, tmp_path
):
    named = {
        "random": {"backbone_config": json.dumps(CONVNEXT)},
        "backbone": {"model_name_or_path": str(checkpoint)},
        "rbi": {"model_name_or_path": str(rbi_checkpoint), "rbi_config": '{"psnr_image_size": null}'},
    }
    model, image_processor = load_model(ModelArguments(**named[source], **options), LABELS)
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if source == "random" else (MEAN, STD)
    mean, std = options.get("image_mean", mean), options.get("image_std", std)
    size = options.get("image_size", 32)
    assert image_processor(photographs, return_tensors="pt")["pixel_values"].shape == (2, 3, size, size)
    assert model.config.image_mean == pytest.approx(mean, abs=1e-5)
    assert model.config.image_std == pytest.approx(std, abs=1e-5)
    assert_psnr_sees_the_images(model, image_processor, photographs)
    # And what is saved says the same.
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_psnr_sees_the_images(loaded, load_image_processor(str(tmp_path)), photographs)


VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 24}
VIT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
TIMM = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 64}}


@pytest.mark.parametrize("size", [16, 31, 64, 224])
@pytest.mark.parametrize("is_pretrained", [False, True])
def test_a_size_that_the_backbone_cannot_process_is_refused(tmp_path, size, is_pretrained):
    options = {"backbone_config": json.dumps(VIT)}
    if is_pretrained:
        ViTModel(ViTConfig(**_without_type(VIT))).save_pretrained(tmp_path)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        options = {"model_name_or_path": str(tmp_path)}
    with pytest.raises(UserError) as error:
        load_model(ModelArguments(**options, image_size=size), LABELS)
    message = str(error.value)
    assert message.startswith(
        f"--image_size {size} gives images of {size} x {size} pixels, but ViTModel, the backbone"
    )
    assert "was made for 32 x 32 (" in message and message.endswith("set --image_size 32, or choose another backbone.")
    assert load_model(ModelArguments(**options, image_size=32), LABELS)[0].num_labels == 3


def test_an_image_processor_that_does_not_fit_the_backbone_is_named(tmp_path):
    ViTModel(ViTConfig(**_without_type(VIT))).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^The image processor gives images of 48 x 48 .*: set --image_size 32"):
        load_model(ModelArguments(str(tmp_path)), LABELS)
    load_model(ModelArguments(str(tmp_path), image_size=32), LABELS)


@pytest.mark.parametrize("model_type", ["convnext", "resnet", "dinov2", "swin"])
def test_backbones_that_process_any_size_do(model_type):
    fields = {
        "convnext": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
        "dinov2": _without_type(VIT),
        "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4},
    }
    config = {"model_type": model_type, "image_size": 32} | fields[model_type]
    model, _ = load_model(ModelArguments(backbone_config=json.dumps(config), image_size=64), LABELS)
    assert model.training, "the check leaves the mode as it was"


@pytest.mark.timm
def test_a_size_that_a_timm_model_cannot_process_is_refused():
    with pytest.raises(UserError, match=r"--image_size 48 gives .* was made for 64 x 64 .*: set --image_size 64"):
        load_model(ModelArguments(backbone_config=json.dumps(TIMM), image_size=48), LABELS)


@pytest.mark.parametrize("fields", [{"num_labels": 5}, {"id2label": {"0": "a"}}])
def test_the_classes_are_those_of_the_data(fields):
    with pytest.raises(UserError, match="the classes are those of the data, so leave it out"):
        ModelArguments(backbone_config=json.dumps(VIT), rbi_config=json.dumps(fields))


@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("source", ["random", "backbone"])
def test_classes_and_head(checkpoint, preset, source):
    named = {"backbone_config": json.dumps(CONVNEXT)}
    named = named if source == "random" else {"model_name_or_path": str(checkpoint)}
    args = ModelArguments(**named, preset=preset, rbi_config='{"num_attention_heads": 2, "relation_gain": 0.25}')
    model, _ = load_model(args, LABELS)
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert model.config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    assert model.classifier.out_features == 3
    assert model.config.attention_type == {"paper": "dot_product", "kernel": "cosine"}[preset]
    assert (model.config.num_attention_heads, model.config.relation_gain) == (2, 0.25)


def test_the_backbone_has_the_weights_of_the_folder(checkpoint):
    model, _ = load_model(ModelArguments(str(checkpoint)), LABELS)
    expected = ConvNextModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.rbi.backbone.state_dict().items())


def test_a_description_beside_a_name_is_for_dry_runs(checkpoint):
    args = ModelArguments(str(checkpoint), backbone_config=json.dumps(CONVNEXT | {"hidden_sizes": [4, 4, 4, 4]}))
    assert load_model(args, LABELS)[0].config.feature_size == 24
    args = ModelArguments("nobody/has-this", backbone_config=args.backbone_config)
    assert load_model(args, LABELS, from_scratch=True)[0].config.feature_size == 4
    model, _ = load_model(ModelArguments(str(checkpoint)), LABELS, from_scratch=True)
    assert model.config.feature_size == 24, "there is no description"


def test_an_rbi_model_goes_on_with_its_head_and_classifier(rbi_checkpoint):
    before = RBIForImageClassification.from_pretrained(rbi_checkpoint)
    model, _ = load_model(ModelArguments(str(rbi_checkpoint), preset="paper"), ["x", "y", "z"])
    assert model.config.attention_type == "cosine"
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())


def test_an_rbi_model_for_other_classes(rbi_checkpoint):
    args = ModelArguments(str(rbi_checkpoint))
    with pytest.raises(ValueError, match=r"has 3 classes, but the data have 5: add --ignore_mismatched_sizes"):
        load_model(args, list("abcde"))
    before = RBIForImageClassification.from_pretrained(rbi_checkpoint).state_dict()
    args.ignore_mismatched_sizes = True
    model, _ = load_model(args, list("abcde"))
    assert model.config.id2label == dict(enumerate("abcde"))
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert after["classifier.weight"].shape == (5, 24)
    assert after["classifier.weight"].std() > 0


def test_packaged_models_are_looked_up_by_name(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "packaged_model", lambda name: asked.append(name) or checkpoint)
    model, _ = load_model(ModelArguments("packaged/mobilenet_v2"), LABELS)
    assert asked == ["packaged/mobilenet_v2"]
    assert model.config.backbone_config.model_type == "convnext"
    load_model(ModelArguments(str(checkpoint)), LABELS)
    assert len(asked) == 1


def test_a_transformer_of_another_image_size(tmp_path):
    config = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 48, "patch_size": 16}
    model, image_processor = load_model(ModelArguments(backbone_config=json.dumps(config)), LABELS)
    assert (image_processor.size["height"], image_processor.size["width"]) == (48, 48)
    assert model(**image_processor(Image.new("RGB", (50, 60)), return_tensors="pt")).logits.shape == (1, 3)
    ViTModel(ViTConfig(**_without_type(config))).save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    model, image_processor = load_model(ModelArguments(str(tmp_path)), LABELS)
    assert model(**image_processor(Image.new("RGB", (50, 60)), return_tensors="pt")).logits.shape == (1, 3)


BACKBONE = json.dumps(CONVNEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Name the backbone: --model_name_or_path, or --backbone_config"),
        ({"backbone_config": BACKBONE, "image_size": 0}, "--image_size must be at least 1, got 0"),
        ({"backbone_config": BACKBONE, "image_mean": MEAN}, "--image_mean and --image_std need --image_size"),
        ({"backbone_config": "{"}, r"--backbone_config must be JSON, got \{"),
        ({"backbone_config": "[1]"}, r"--backbone_config must be a JSON object, got \[1\]"),
        ({"backbone_config": BACKBONE, "rbi_config": "x"}, "--rbi_config must be JSON, got x"),
        ({"backbone_config": BACKBONE, "rbi_config": '{"psnr_mex": 1}'}, "unknown field `psnr_mex`.*`psnr_max`"),
        ({"backbone_config": BACKBONE, "rbi_config": '{"num_labels": 2}'}, "unknown field `num_labels`"),
        ({"backbone_config": BACKBONE, "rbi_config": '{"backbone_config": {}}'}, "unknown field `backbone_config`"),
        ({"backbone_config": "{}"}, "model_type None, which transformers does not have"),
        ({"backbone_config": '{"model_type": "convnet"}'}, "model_type 'convnet', which transformers does not have"),
        ({"backbone_config": '{"model_type": "bert"}'}, "does not belong to a vision model"),
        ({"backbone_config": BACKBONE.replace("[1, 1, 1, 1]", '"x"')}, "config of the model is wrong: Field 'depths'"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(**options), LABELS)


@pytest.mark.parametrize("source", ["random", "backbone", "rbi"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('{"num_attention_heads": 5}', r"wrong: `num_attention_heads` \(5\) must divide the backbone's feature size"),
        ('{"num_attention_heads": "two"}', r"wrong: Field 'num_attention_heads' expected int, got str"),
        ('{"image_mean": [0.5]}', r"wrong: `image_mean` has 1 values, but the backbone takes 3 channels"),
    ],
)
def test_a_wrong_head_is_told_wherever_the_backbone_is_from(checkpoint, rbi_checkpoint, source, fields, message):
    named = {
        "random": {"backbone_config": BACKBONE},
        "backbone": {"model_name_or_path": str(checkpoint)},
        "rbi": {"model_name_or_path": str(rbi_checkpoint)},
    }
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(**named[source], rbi_config=fields), LABELS)


def test_what_is_not_there(tmp_path):
    for name in (str(tmp_path / "absent"), "nobody/has-this"):
        with pytest.raises(OSError, match=name.split("/")[-1]):
            load_model(ModelArguments(name), LABELS)
    with pytest.raises(ValueError, match="no packaged model 'packaged/mobilenet_v3'"):
        load_model(ModelArguments("packaged/mobilenet_v3"), LABELS)


def test_weights_that_are_cut_off(rbi_checkpoint, tmp_path):
    for path in rbi_checkpoint.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OSError, match="truncated"):
        load_model(ModelArguments(str(tmp_path)), LABELS)
