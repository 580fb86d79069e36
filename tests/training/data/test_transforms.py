"""Training images beside the image processor's, the augmentations by their properties, and seeds."""

import io
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    HfArgumentParser,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from training.data import transforms
from training.data.transforms import AugmentationArguments, EvalTransform, TrainTransform, processed_size


OFF = {"train_crop": "resize", "horizontal_flip": False}
EACH = {
    "crop": {"train_crop": "random_resized", "horizontal_flip": False},
    "flip": {**OFF, "horizontal_flip": True},
    "rotation": {**OFF, "rotation_degrees": 15},
    "rand_augment": {**OFF, "rand_augment_num_ops": 2},
    "color_jitter": {**OFF, "color_jitter": 0.4},
    "random_erasing": {**OFF, "random_erasing": 1.0},
}
ALL = {
    "rotation_degrees": 15,
    "rand_augment_num_ops": 2,
    "color_jitter": 0.4,
    "random_erasing": 0.5,
}
GRAY = {"image_mean": [0.4], "image_std": [0.2]}
# Images computed twice, of values around 1: kernels may round otherwise where the memory is aligned otherwise.
SAME = {"rtol": 0, "atol": 1e-5}


def processor(height=32, width=32, **kwargs):
    return ViTImageProcessorPil(size={"height": height, "width": width}, **kwargs)


def image(width=90, height=70, seed=0):
    """Smooth colors, no two pixels alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(transform, image, seed):
    """The transform's output as pixels in [0, 1]."""
    return transform(image, seed) * transform.std + transform.mean


@pytest.mark.parametrize(
    "image_processor",
    [
        processor(32, 32),
        processor(48, 32, resample=Image.Resampling.BICUBIC),
        processor(32, 32, resample=Image.Resampling.NEAREST),
        processor(32, 32, do_normalize=False),
        processor(32, 32, do_rescale=False),
        processor(32, 32, **GRAY),
        SiglipImageProcessorPil(size={"height": 40, "width": 40}),
        EfficientNetImageProcessorPil(size={"height": 40, "width": 40}, include_top=True),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
    ids=lambda image_processor: type(image_processor).__name__,
)
@pytest.mark.parametrize("size", [(90, 70), (20, 33)])
def test_without_augmentation_it_is_the_image_processor(image_processor, size):
    given = image(*size)
    trained = TrainTransform(image_processor, AugmentationArguments(**OFF))(given, 0)
    evaluated = EvalTransform(image_processor)(given)
    assert trained.shape == evaluated.shape
    # A gray level makes 4e-3 of the range, the rounding of `pixel_statistics` at most 3e-4.
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=3e-4 * (evaluated.max() - evaluated.min()).item())


def test_evaluation_images_are_the_image_processor_s():
    for image_processor in (processor(), CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32)):
        expected = image_processor(image(), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(EvalTransform(image_processor)(image()), expected, **SAME)


@pytest.mark.parametrize(
    ("image_processor", "size"),
    [
        (processor(48, 32), (48, 32)),
        (CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 40}), (56, 40)),
        (BitImageProcessorPil(size={"shortest_edge": 200}, crop_size=32), (32, 32)),
        (ConvNextImageProcessorPil(size={"shortest_edge": 160}, crop_pct=0.875), (160, 160)),
        (processor(48, 32, **GRAY), (48, 32)),
    ],
)
def test_processed_size(image_processor, size):
    assert processed_size(image_processor) == size
    for given in (image(), image(50, 200)):
        assert EvalTransform(image_processor)(given).shape[-2:] == size
        assert TrainTransform(image_processor, AugmentationArguments())(given, 0).shape[-2:] == size


def test_an_image_processor_without_one_size():
    with pytest.raises(ValueError, match=r"keeps the aspect ratio .*`do_center_crop`"):
        processed_size(CLIPImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("statistics", [{}, GRAY], ids=["rgb", "gray"])
def test_each_augmentation_changes_the_image_within_its_range(name, statistics):
    plain = TrainTransform(processor(**statistics), AugmentationArguments(**OFF))
    transform = TrainTransform(processor(**statistics), AugmentationArguments(**EACH[name]))
    original = pixels(plain, image(), 0)
    changed = [pixels(transform, image(), seed) for seed in range(40)]
    assert sum((each - original).abs().max() > 0.02 for each in changed) > 10
    for each in changed:
        assert each.shape == original.shape
        assert -1e-5 <= each.min() <= each.max() <= 1 + 1e-5


@pytest.mark.parametrize("color", ["black", "white", "gray", "red"])
def test_images_of_one_color_stay_finite(color):
    for given in ({"rotation_degrees": 15}, {"rand_augment_num_ops": 15, "color_jitter": 1}):
        transform = TrainTransform(processor(do_normalize=False), AugmentationArguments(**given))
        for seed in range(20):
            result = transform(Image.new("RGB", (9, 1000), color), seed)
            assert result.isfinite().all()
            assert 0 <= result.min() <= result.max() <= 1


@pytest.mark.slow
def test_half_of_the_images_are_mirrored_whatever_the_seeds():
    transform = TrainTransform(processor(), AugmentationArguments(**EACH["flip"]))
    original = TrainTransform(processor(), AugmentationArguments(**OFF))(image(), 0)
    # Rows of one epoch, epochs of one row, and seeds that differ in high bits only.
    for seeds in ([(7, 0, row) for row in range(200)], [(7, n, 3) for n in range(200)], [n << 32 for n in range(200)]):
        is_mirrored = []
        for seed in seeds:
            result = transform(image(), seed)
            is_mirrored.append(torch.allclose(result, original.flip(-1), atol=1e-6))
            assert is_mirrored[-1] or torch.allclose(result, original, atol=1e-6)
        is_mirrored = np.array(is_mirrored)
        assert 0.4 < is_mirrored.mean() < 0.6
        assert 0.4 < (is_mirrored[1:] == is_mirrored[:-1]).mean() < 0.6


def boxes(transform, width, height, num_draws=1000):
    torch.manual_seed(0)
    return np.array([transform._draw_box(width, height) for _ in range(num_draws)])


@pytest.mark.parametrize("scale", [0.08, 0.35, 1.0])
@pytest.mark.parametrize("size", [(300, 300), (400, 300), (90, 150)])
@pytest.mark.parametrize("output", [(32, 32), (32, 48)])
def test_areas_forms_and_places_of_random_crops(scale, size, output):
    width, height = size
    transform = TrainTransform(processor(*output), AugmentationArguments(crop_scale_min=scale))
    left, top, right, bottom = boxes(transform, width, height).T
    assert min(left.min(), top.min()) >= 0
    assert min((right - left).min(), (bottom - top).min()) >= 1
    assert (right.max() <= width, bottom.max() <= height) == (True, True)
    ratios = (right - left) / (bottom - top) * output[0] / output[1]
    assert 0.75 - 1e-9 <= ratios.min() <= ratios.max() <= 4 / 3 + 1e-9
    if scale < 1:
        shares = (right - left) * (bottom - top) / (width * height)
        assert shares.min() >= scale - 1e-9
        assert shares.min() < scale + 0.05
        assert len(np.unique(left + top)) > 500


def test_small_crops_have_uniform_areas_and_log_uniform_forms():
    # Areas up to a half always fit into a square, so that nothing is drawn again.
    transform = TrainTransform(processor(), AugmentationArguments(crop_scale_min=0.08))
    left, top, right, bottom = boxes(transform, 1000, 1000, 3000).T
    areas, ratios = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    is_small = areas < 0.5
    assert kstest((areas[is_small] - 0.08) / 0.42, "uniform").pvalue > 1e-3
    assert kstest(np.log(ratios[is_small]) / math.log(16 / 9) + 0.5, "uniform").pvalue > 1e-3
    free = 1000 - (right - left)
    assert kstest((left / free)[is_small], "uniform").pvalue > 1e-3


def test_by_default_a_crop_holds_the_middle_of_a_square_image():
    transform = TrainTransform(processor(), AugmentationArguments())
    left, top, right, bottom = boxes(transform, 200, 200, 5000).T
    assert max(left.max(), top.max()) < 100 < min(right.min(), bottom.min())


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (5000, 40)])
def test_images_of_any_form(size):
    transform = TrainTransform(processor(), AugmentationArguments(**ALL))
    for seed in range(5):
        assert transform(image(*size), seed).isfinite().all()


def test_a_crop_is_antialiased_and_resampled_as_the_processor_does():
    given = image(300, 200)
    for resample in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC):
        transform = TrainTransform(processor(resample=resample), AugmentationArguments(**EACH["crop"]))
        transform._draw_box = lambda width, height: (30, 20, 180, 140)
        expected = EvalTransform(processor(resample=resample))(given.crop((30, 20, 180, 140)))
        result = transform(given, 0)
        # PIL looks over the box's edge where the crop ends, so the middle is compared.
        torch.testing.assert_close(result[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], rtol=0, atol=0.01)


def test_rotation_stays_within_its_angle():
    """A bright spot right of the center, whose angle is read off the result."""
    image = Image.new("RGB", (101, 101))
    image.paste("white", (90, 49, 93, 52))
    transform = TrainTransform(processor(101, 101), AugmentationArguments(**OFF, rotation_degrees=15))
    angles = []
    for seed in range(100):
        weight = pixels(transform, image, seed)[0].clamp(min=0)
        grid = torch.arange(101) - 50.0
        x, y = (weight.sum(0) * grid).sum() / weight.sum(), (weight.sum(1) * grid).sum() / weight.sum()
        angles.append(math.degrees(math.atan2(y, x)))
        assert abs(math.hypot(x, y) - 41) < 0.6
    assert -15.3 < min(angles) < -12
    assert 12 < max(angles) < 15.3


def test_rand_augment_draws_that_many_operations_at_that_magnitude():
    transform = TrainTransform(processor(), AugmentationArguments(**OFF, rand_augment_num_ops=3))
    (rand_augment,) = transform.change_pixels
    seen = set()
    for seed in range(80):
        transform(image(), seed)
        names = [item.name for item in rand_augment._params]
        assert len(set(names)) == 3
        for item in rand_augment._params:
            (operation,) = rand_augment.get_submodule(item.name)
            parameters = item.data[0].data
            seen.add(type(operation).__name__)
            for key, value in {
                "shear_x": 0.3 * math.degrees(math.atan(0.3)),
                "shear_y": 0.3 * math.degrees(math.atan(0.3)),
                "degrees": 9,
                "contrast_factor": 0.64,
            }.items():
                if key == operation._factor_name:
                    assert parameters[key].abs().item() == pytest.approx(value, rel=1e-4)
    assert len(seen) == 15


def test_shear_moves_pixels_by_the_published_factor(monkeypatch):
    policy = [entry for entry in transforms._RAND_AUGMENT_POLICY if entry[0][0] == "shear_x"]
    monkeypatch.setattr(transforms, "_RAND_AUGMENT_POLICY", policy)
    image = Image.new("RGB", (101, 101))
    image.paste("white", (49, 9, 52, 12))  # 40 above the center
    args = AugmentationArguments(**OFF, rand_augment_num_ops=1, rand_augment_magnitude=29)
    shifts = set()
    for seed in range(20):
        weight = pixels(TrainTransform(processor(101, 101), args), image, seed)[0].clamp(min=0)
        shifts.add(round(((weight.sum(0) * torch.arange(101)).sum() / weight.sum()).item() - 50))
    assert shifts == {-12, 12}, "40 * 0.3, to either side"


def test_erasing_leaves_the_mean_color():
    statistics = {"image_mean": [0.2, 0.5, 0.9], "image_std": [0.1, 0.2, 0.3]}
    transform = TrainTransform(processor(**statistics), AugmentationArguments(**EACH["random_erasing"]))
    plain = TrainTransform(processor(**statistics), AugmentationArguments(**OFF))(image(), 0)
    for seed in range(20):
        result = transform(image(), seed)
        is_erased = ((result - plain).abs() > SAME["atol"]).any(0)
        assert (result[:, is_erased] == 0).all()
        assert 0.01 < is_erased.float().mean() < 0.4
        rows, columns = is_erased.nonzero().T
        assert is_erased.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_the_seed_alone_decides_in_any_order_and_process():
    args = AugmentationArguments(**ALL)
    transform = TrainTransform(processor(), args)
    seeds = [0, 1, 2**40, (0, 5), (3, 1, 4)]
    first = [transform(image(), seed) for seed in seeds]
    assert len({result.numpy().tobytes() for result in first}) == len(seeds)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    buffer = io.BytesIO()
    pickle.dump(transform, buffer)  # as a DataLoader hands it to a worker
    buffer.seek(0)
    for other in (transform, TrainTransform(processor(), args), pickle.load(buffer)):
        for seed, result in reversed(list(zip(seeds, first, strict=True))):
            torch.testing.assert_close(other(image(), seed), result, **SAME)


def test_no_global_generator_is_touched(monkeypatch):
    """Neither moved nor reseeded, an accelerator's included, which torch.manual_seed would do."""
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    transform = TrainTransform(processor(), AugmentationArguments(**ALL))
    for seed in range(20):
        transform(image(), seed)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert not reseeded


@pytest.mark.parametrize("given", [OFF, ALL, {"rand_augment_num_ops": 15}], ids=["off", "all", "rand_augment"])
@pytest.mark.parametrize("statistics", [{}, GRAY], ids=["rgb", "gray"])
def test_results_are_plain_tensors_that_a_worker_can_send(given, statistics):
    result = TrainTransform(processor(**statistics), AugmentationArguments(**given))(image(), 0)
    assert (result.dtype, result.requires_grad, result.is_contiguous()) == (torch.float32, False, True)
    assert result.untyped_storage().nbytes() == result.numel() * 4


def test_the_command_line():
    parser = HfArgumentParser(AugmentationArguments)
    (args,) = parser.parse_args_into_dataclasses([])
    assert args == AugmentationArguments()
    given = ["--train_crop", "resize", "--no_horizontal_flip", "--cutmix_alpha", "1", "--rand_augment_num_ops", "2"]
    (args,) = parser.parse_args_into_dataclasses(given)
    expected = AugmentationArguments("resize", horizontal_flip=False, cutmix_alpha=1.0, rand_augment_num_ops=2)
    assert args == expected
    help_text = parser.format_help()
    assert all(f"--{name}" in help_text for name in vars(args))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_crop", "center"),
        ("crop_scale_min", 0),
        ("crop_scale_min", 1.1),
        ("rotation_degrees", -1),
        ("rand_augment_num_ops", 16),
        ("rand_augment_magnitude", 0),
        ("rand_augment_magnitude", 30),
        ("color_jitter", 1.5),
        ("random_erasing", -0.1),
        ("mixup_alpha", -1),
        ("mixup_alpha", math.inf),
        ("cutmix_alpha", math.nan),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be .*{value}"):
        AugmentationArguments(**{name: value})
