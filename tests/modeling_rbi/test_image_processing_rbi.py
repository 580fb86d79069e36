"""Statistics that undo what image processors do to pixels, processors loaded from folders, and decoded images."""

import io

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

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    UnreadableImageError,
    load_image_processor,
    pixel_statistics,
    upright_rgb,
)
from modeling_rbi.image_processing_rbi import image_mode
from tests.odd_images import ODD_IMAGES, tiff


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


def _open(file):
    return Image.open(io.BytesIO(file))


# Pillow warns of broken EXIF.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_becomes_upright_rgb_and_is_not_changed(name):
    opened = _open(ODD_IMAGES[name].file)
    opened.load()
    stored, info = opened.tobytes(), dict(opened.info)
    decoded = upright_rgb(opened)
    ODD_IMAGES[name].check(decoded)
    assert opened.tobytes() == stored and opened.info == info
    decoded.putpixel((0, 0), (1, 2, 3))
    assert opened.tobytes() == stored
    # There is nothing left to do.
    assert upright_rgb(decoded).tobytes() == decoded.tobytes()


@pytest.mark.parametrize(
    ("values", "tags", "gray_range"),
    [
        (np.array([[0, 65535]], "u2"), {}, "from 0 to 65535, as the file states"),
        (
            np.array([[0, 4095]], "u2"),
            {},
            "from 0 to 65535, as the file states, though no pixel is above a sixteenth of that",
        ),
        (np.array([[0, 4095]], "u2"), {"MaxSampleValue": 4095}, "from 0 to 4095, as the file states"),
        (np.array([[0, 255]], "i4"), {}, "from 0 to 255, by the range of the pixels"),
        (np.array([[0, 256]], "i4"), {}, "from 0 to 1023, by the range of the pixels"),
        (np.array([[0, 65536]], "i4"), {}, "from 0 to the largest pixel of each image"),
        (np.array([[-1, 255]], "i2"), {}, "from the smallest to the largest pixel of each image"),
        (np.array([[0, 1.5]], "f4"), {}, "from 0 to 1, by the range of the pixels"),
        (np.array([[0, 2]], "f4"), {}, "from 0 to 255, by the range of the pixels"),
    ],
)
def test_the_range_of_deep_gray_is_told(values, tags, gray_range):
    assert upright_rgb(_open(tiff(values, **tags))).info == {"gray_range": gray_range}
    assert upright_rgb(Image.new("L", (4, 4))).info == {}


@pytest.mark.parametrize("dtype", ["i4", "f4"])
def test_deep_gray_in_memory_is_scaled_as_in_a_file(dtype):
    values = np.array([[0, 1, 200, 255]], dtype)
    assert np.asarray(upright_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 200, 255]


def test_a_box_does_not_change_the_range():
    values = np.array([[10, 20, 4095]], "i4")
    assert np.asarray(upright_rgb(_open(tiff(values)), box=[0, 0, 2, 1]))[0, :, 0].tolist() == [1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite(value):
    file = tiff(np.array([[0, value]], "f4"))
    with pytest.raises(UnreadableImageError, match=r"^the image has pixels that are not finite\.$"):
        upright_rgb(_open(file))
    with pytest.raises(UnreadableImageError, match=r"^x has pixels"):
        upright_rgb(_open(file), name="x")


def test_too_many_pixels():
    with pytest.raises(UnreadableImageError, match="more than the limit of 19"):
        upright_rgb(Image.new("L", (4, 5)), max_pixels=19)


def test_the_mode_of_a_processor():
    modes = [image_mode(ViTImageProcessorPil(image_mean=mean)) for mean in (MEAN, [0.5], 0.5)]
    assert modes == ["RGB", "L", "RGB"]
