"""timm's checkpoints: their image transforms, their classifiers, and what happens without timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    pipeline,
)
from transformers.utils import import_utils

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, load_image_processor


IMAGE_SIZE = 64
NUM_LABELS = 5

# Width and height of images: larger and smaller than the crop, upright, long, and one short of the resize to 73.
SIZES = [(64, 64), (83, 121), (100, 80), (333, 97), (50, 61), (97, 64), (72, 73), (320, 240)]


def _photograph(width: int, height: int) -> Image.Image:
    """Smooth shapes, fine texture and noise, as photographs have them."""
    generator = np.random.default_rng(width * height)
    shapes = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    rows, columns = np.mgrid[:height, :width]
    texture = 40 * np.sin(rows / 2.3 + columns / 5.1) + generator.normal(0, 8, (height, width))
    return Image.fromarray((np.asarray(shapes) + texture[..., None]).clip(0, 255).astype(np.uint8))


def _timm_config(architecture: str = "mobilenetv3_small_100", model_args: dict | None = None, **pretrained_cfg):
    """As the `config.json` of timm's repositories has it, for images of 64 x 64."""
    import timm

    pretrained_cfg = timm.get_pretrained_cfg(architecture).to_dict() | {
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
        **pretrained_cfg,
    }
    return TimmWrapperConfig(
        architecture=architecture, model_args=model_args, num_labels=NUM_LABELS, pretrained_cfg=pretrained_cfg
    )


def _classifier(config: TimmWrapperConfig) -> TimmWrapperForImageClassification:
    """Untrained, but with logits that differ: batch normalization has the statistics of images."""
    model = TimmWrapperForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE))
        model.timm_model.get_classifier().weight.normal_(std=model.timm_model.num_features**-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory) -> Path:
    """A MobileNetV3 with a mean and standard deviation that are not ImageNet's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm")
    _classifier(_timm_config(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rbi_folder(timm_folder, tmp_path_factory) -> Path:
    """RBI on that MobileNetV3, saved with its image processor."""
    folder = tmp_path_factory.mktemp("rbi")
    RBIForImageClassification.from_image_classifier(timm_folder).save_pretrained(folder)
    load_image_processor(timm_folder).save_pretrained(folder)
    return folder


def _gray_levels(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """Pixel values as the levels 0..255 that they come from."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (pixel_values * std + mean) * 255


def _timm_transform(timm_processor, image: Image.Image) -> tuple[torch.Tensor, bool]:
    """
    timm's own evaluation transform, but for the corner of the crop, which is rounded down as transformers does; and
    whether timm itself crops there.
    """
    resize, crop, *rest = timm_processor.val_transforms.transforms
    resized = resize(image)
    corner = [(length - IMAGE_SIZE) // 2 for length in resized.size]
    cropped = resized.crop((*corner, *(start + IMAGE_SIZE for start in corner)))
    is_timms = all(
        round((length - IMAGE_SIZE) / 2) == start for length, start in zip(resized.size, corner, strict=True)
    )
    for transform in rest:
        cropped = transform(cropped)
    assert type(crop).__name__ == "CenterCrop"
    return cropped, is_timms


@pytest.mark.timm
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_image_processor_does_as_timms(crop_mode, interpolation, crop_pct, tmp_path):
    _timm_config(crop_mode=crop_mode, interpolation=interpolation, crop_pct=crop_pct).save_pretrained(tmp_path)
    timm_processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(timm_processor).__name__ == "TimmWrapperImageProcessor"
    pil, torchvision = (load_image_processor(tmp_path, backend=backend) for backend in ("pil", "torchvision"))
    num_equal = 0
    for size in SIZES:
        image = _photograph(*size)
        expected, is_timms = _timm_transform(timm_processor, image)
        actual = pil(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        if is_timms:
            num_equal += 1
            torch.testing.assert_close(actual, timm_processor(image)["pixel_values"][0], atol=1e-5, rtol=0)

        actual = torchvision(image, return_tensors="pt")["pixel_values"][0]
        difference = (_gray_levels(actual, pil) - _gray_levels(expected, pil)).abs()
        # torchvision's resize against PIL's, which timm uses; measured: at most 2 levels of 255, mean 0.25.
        assert difference.max() < 2.01
        assert difference.mean() < 0.3
    # 64 / 0.9 and 64 / 0.95 leave an odd number, whose half timm rounds up.
    assert (num_equal > 0) == (crop_pct in (0.875, 1.0))


@pytest.mark.timm
@pytest.mark.parametrize(
    "transform",
    [{"crop_mode": "border"}, {"interpolation": "lanczos"}, {"input_size": [3, 64, 96]}],
    ids=lambda transform: next(iter(transform)),
)
def test_image_processor_refuses_what_it_cannot_do(transform, tmp_path):
    _timm_config(**transform).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="build one that suits the model") as error:
        load_image_processor(tmp_path)
    assert any(str(value) in str(error.value) for value in (*transform.values(), "64 x 96"))


@pytest.mark.timm
def test_image_processor_reloads_beside_the_model(rbi_folder, timm_folder):
    assert (rbi_folder / "preprocessor_config.json").exists()
    image = _photograph(90, 70)
    expected = load_image_processor(timm_folder)(image, return_tensors="pt")["pixel_values"]
    for processor in (AutoImageProcessor.from_pretrained(rbi_folder), load_image_processor(rbi_folder)):
        torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.timm
def test_image_processor_backends_give_like_logits(rbi_folder):
    model = AutoModelForImageClassification.from_pretrained(rbi_folder)
    images = [_photograph(*size) for size in SIZES]
    logits = {}
    for backend, suffix in (("pil", "Pil"), ("torchvision", "")):
        processor = AutoImageProcessor.from_pretrained(rbi_folder, backend=backend)
        assert type(processor).__name__ == f"CLIPImageProcessor{suffix}"
        with torch.no_grad():
            logits[backend] = model(**processor(images, return_tensors="pt")).logits
    spread = logits["pil"].std(0).mean()
    difference = (logits["pil"] - logits["torchvision"]).abs()
    # Measured: 2 % of the spread between images.
    assert difference.max() < 0.1 * spread


@pytest.mark.timm
def test_pipeline_with_torchvision(rbi_folder):
    classify = pipeline("image-classification", model=str(rbi_folder), trust_remote_code=True)
    assert type(classify.image_processor).__name__ == "CLIPImageProcessor"
    images = [_photograph(*size) for size in SIZES]
    model = AutoModelForImageClassification.from_pretrained(rbi_folder)
    processor = AutoImageProcessor.from_pretrained(rbi_folder)
    with torch.no_grad():
        probabilities = model(**processor(images, return_tensors="pt")).logits.softmax(-1)
    for batch_size in (1, 3):
        answers = classify(images, batch_size=batch_size, top_k=NUM_LABELS)
        for answer, expected in zip(answers, probabilities, strict=True):
            for entry in answer:
                index = model.config.label2id[entry["label"]]
                assert entry["score"] == pytest.approx(expected[index].item(), abs=1e-4)


@pytest.mark.timm
@pytest.mark.parametrize(
    "architecture, model_args",
    [
        ("mobilenetv3_small_100", None),
        ("mobilenetv3_large_100", None),
        ("densenet201", None),
        ("efficientnet_b0", None),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": IMAGE_SIZE, "window_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
        ),
    ],
)
def test_from_image_classifier_keeps_the_logits(architecture, model_args):
    classifier = _classifier(_timm_config(architecture, model_args))
    model = RBIForImageClassification.from_image_classifier(classifier, relation_scope="self")
    assert model.config.head_initialization == "identity"
    pixel_values = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = classifier(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)
        assert expected.std(0).min() > 1e-2
        assert model(pixel_values, relation_scope="batch").logits.isfinite().all()


@pytest.mark.timm
def test_from_backbone_pretrained_keeps_the_weights(timm_folder):
    model = RBIForImageClassification.from_backbone_pretrained(timm_folder, num_labels=3)
    classifier = TimmWrapperForImageClassification.from_pretrained(timm_folder)
    backbone = TimmWrapperModel.from_pretrained(timm_folder)
    weights = model.rbi.backbone.state_dict()
    expected = {key: value for key, value in classifier.state_dict().items() if "classifier." not in key}
    torch.testing.assert_close(weights, expected, atol=0, rtol=0)
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        features, _ = model.rbi.extract_features(pixel_values)
        torch.testing.assert_close(features, backbone(pixel_values).pooler_output)
    # The pixel statistics come from the checkpoint.
    assert model.config.image_mean == pytest.approx([0.5] * 3, abs=1e-5)
    assert model.config.image_std == pytest.approx([0.25] * 3, abs=1e-5)


@pytest.mark.timm
def test_gray_images():
    backbone_config = TimmWrapperConfig(architecture="mobilenetv3_small_100", model_args={"in_chans": 1})
    with pytest.raises(Exception, match="`image_mean` has 3 values, but the backbone takes 1 channels"):
        RBIConfig(backbone_config=backbone_config)
    model = RBIModel(RBIConfig(backbone_config=backbone_config, image_mean=[0.5], image_std=[0.5])).eval()
    with torch.no_grad():
        features = model(torch.randn(3, 1, IMAGE_SIZE, IMAGE_SIZE), relation_scope="batch").pooler_output
    assert features.shape == (3, 1024)


@pytest.mark.timm
def test_an_architecture_that_timm_lacks_is_named():
    config = RBIConfig(backbone_config=TimmWrapperConfig(architecture="no_such_net"))
    with pytest.raises(ImportError, match=r"no_such_net.*upgrade timm"):
        RBIModel(config)


@pytest.fixture
def without_timm(monkeypatch):
    """As if timm were not installed, where it is."""
    message = import_utils.BACKENDS_MAPPING["timm"][1]
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, message))


def test_building_without_timm_says_what_to_install(without_timm):
    config = RBIConfig(backbone_config=TimmWrapperConfig(architecture="resnet18"), num_labels=NUM_LABELS)
    with pytest.raises(ImportError, match="pip install timm"):
        RBIForImageClassification(config)


@pytest.mark.parametrize("has_labels", [True, False], ids=["labels", "no-labels"])
def test_loading_without_timm_says_what_to_install(has_labels, without_timm, tmp_path):
    backbone_config = TimmWrapperConfig(architecture="resnet18")
    config = RBIConfig(
        backbone_config=backbone_config, feature_size=512, architectures=[RBIForImageClassification.__name__]
    )
    config.save_pretrained(tmp_path)
    if not has_labels:  # as in a config that was written by hand: labels, too, come from timm then
        fields = json.loads((tmp_path / "config.json").read_text())
        del fields["backbone_config"]["label_names"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"classifier.bias": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImportError, match="pip install timm"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
