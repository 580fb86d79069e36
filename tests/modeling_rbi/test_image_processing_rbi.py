"""Statistics that undo what image processors do to pixels, and processors loaded from folders."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    ViTImageProcessorPil,
)

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, load_image_processor, pixel_statistics


MEAN, STD = [0.1, 0.5, 0.8], [0.2, 0.3, 0.7]
STATISTICS = {"image_mean": MEAN, "image_std": STD}
PROCESSORS = {
    "vit": ViTImageProcessorPil(**STATISTICS),
    "mobilenet_v2": MobileNetV2ImageProcessorPil(**STATISTICS),
    "convnext": ConvNextImageProcessorPil(**STATISTICS),
    "efficientnet": EfficientNetImageProcessorPil(**STATISTICS, include_top=False),
    "efficientnet_normalised_twice": EfficientNetImageProcessorPil(**STATISTICS, include_top=True),
    "efficientnet_offset": EfficientNetImageProcessorPil(
        **STATISTICS, include_top=False, rescale_offset=True, rescale_factor=1 / 127.5
    ),
    "efficientnet_offset_normalised_twice": EfficientNetImageProcessorPil(
        **STATISTICS, include_top=True, rescale_offset=True, rescale_factor=1 / 127.5
    ),
    "not_normalised": ViTImageProcessorPil(do_normalize=False),
    "neither_normalised_nor_rescaled": ViTImageProcessorPil(do_normalize=False, do_rescale=False),
}


@pytest.fixture
def image():
    """Noise, so that each pixel is known by its value."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_statistics_restore_the_image(name, image):
    processor = PROCESSORS[name]
    mean, std = pixel_statistics(processor)
    assert all(isinstance(value, float) for value in mean + std) and len(mean) == len(std) == 3
    # Without a change of size each pixel of the image has one of the output.
    pixel_values = processor(image, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"][0]
    restored = pixel_values * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    expected = np.asarray(image).transpose(2, 0, 1) / 255
    # A twentieth of a gray level: the statistics are rounded.
    np.testing.assert_allclose(restored, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2", "convnext", "efficientnet"])
def test_statistics_of_a_plain_processor_are_its_own(name):
    assert pixel_statistics(PROCESSORS[name]) == (MEAN, STD)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        # ((x - mean) / std) / std
        ("efficientnet_normalised_twice", MEAN, [value**2 for value in STD]),
        # (2 x - 1 - mean) / std
        ("efficientnet_offset", [(1 + value) / 2 for value in MEAN], [value / 2 for value in STD]),
        ("not_normalised", [0.0] * 3, [1.0] * 3),
        ("neither_normalised_nor_rescaled", [0.0] * 3, [1 / 255] * 3),
    ],
)
def test_statistics_of_other_processors_are_not_their_own(name, mean, std):
    measured_mean, measured_std = pixel_statistics(PROCESSORS[name])
    assert measured_mean == pytest.approx(mean, abs=1e-6) and measured_std == pytest.approx(std, abs=1e-6)


def test_statistics_of_gray_images():
    processor = ViTImageProcessorPil(image_mean=[0.25], image_std=[0.4])
    assert pixel_statistics(processor, num_channels=1) == ([0.25], [0.4])


@pytest.mark.parametrize("name", PROCESSORS)
def test_statistics_make_a_config_whose_relations_are_those_of_the_image(name, image):
    """PSNR of two images, from what the processor makes of them, is that of their bytes."""
    other = Image.fromarray(255 - np.asarray(image) // 3)
    mean, std = pixel_statistics(PROCESSORS[name])
    config = RBIConfig(
        backbone_config=ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
        image_mean=mean,
        image_std=std,
        psnr_image_size=None,
    )
    pixel_values = PROCESSORS[name]([image, other], do_resize=False, do_center_crop=False, return_tensors="pt")
    similarities, _ = RBIModel(config).rpe(pixel_values["pixel_values"])
    difference = (np.asarray(image).astype(float) - np.asarray(other)) / 255
    assert similarities[0, 1].item() * 50 == pytest.approx(-10 * np.log10(np.mean(difference**2)), abs=0.01)


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2", "convnext", "efficientnet_offset_normalised_twice"])
def test_a_saved_processor_comes_back(name, image, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    loaded = load_image_processor(str(tmp_path), backend="pil")
    assert type(loaded) is type(PROCESSORS[name])
    expected = PROCESSORS[name](image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(loaded(image, return_tensors="pt")["pixel_values"], expected)
    assert pixel_statistics(loaded) == pixel_statistics(PROCESSORS[name])


def test_the_processor_beside_a_model_is_found(config, image, tmp_path):
    RBIForImageClassification(config).save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **STATISTICS)
    processor.save_pretrained(tmp_path)
    loaded = load_image_processor(str(tmp_path), backend="pil")
    pixel_values = loaded(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, processor(image, return_tensors="pt")["pixel_values"])
    model = RBIForImageClassification.from_pretrained(tmp_path)
    assert model(pixel_values).logits.shape == (1, 5)


def test_a_folder_without_a_processor_is_an_error(config, tmp_path):
    RBIForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="image processor"):
        load_image_processor(str(tmp_path))
