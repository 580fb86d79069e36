# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Turns decoded images into `pixel_values`, with augmentation for training and without for evaluation.

Size, resampling and normalization come from the model's image processor, so training and evaluation differ only in the
augmentation. Random changes depend only on a seed: an image looks the same in the same epoch on any number of
processes and workers, and after a resume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import kornia.augmentation as K
import numpy as np
import torch
from kornia.augmentation.auto import RandAugment
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import UserError, pixel_statistics
from modeling_rbi.image_processing_rbi import image_mode


# Aspect ratios (width / height) of random crops, relative to the aspect ratio of the output.
CROP_RATIOS = (3 / 4, 4 / 3)
_CROP_TRIALS = 10
# In units of 180 degrees, as in kornia. The published shear (https://huggingface.co/papers/1805.09501) is a factor of
# up to 0.3, an angle of 17 degrees; kornia's default of 0.3 of 180 degrees is an angle of 54 degrees.
_SHEAR = math.atan(0.3) / math.pi
# The operations of RandAugment under kornia's names, with the ends of their ranges.
_RAND_AUGMENT_POLICY: list[list[tuple[str, float, float | None]]] = [
    [(name, low, high)]
    for name, low, high in (
        ("auto_contrast", 0.0, 1.0),  # these three have no magnitude
        ("equalize", 0.0, 1.0),
        ("invert", 0.0, 1.0),
        ("rotate", -30.0, 30.0),  # degrees
        ("posterize", 4.0, 8.0),  # bits
        ("solarize", 0.0, 1.0),
        ("solarize_add", 0.0, 0.43),
        ("color", 0.1, 1.9),
        ("contrast", 0.1, 1.9),
        ("brightness", 0.1, 1.9),
        ("sharpness", 0.1, 1.9),
        ("shear_x", -_SHEAR, _SHEAR),
        ("shear_y", -_SHEAR, _SHEAR),
        ("translate_x", -0.1, 0.1),  # of the side
        ("translate_y", -0.1, 0.1),
    )
]


@dataclass
class AugmentationArguments:
    r"""
    Random changes of training images. Evaluation images are never changed.

    Raises:
        UserError: if a value is out of its range.
    """

    train_crop: Literal["random_resized", "resize"] = field(
        default="random_resized",
        metadata={
            "help": "`random_resized`: a random crop of random aspect ratio, resized to the model's size. "
            "`resize`: the whole image, resized to that size."
        },
    )
    # Above 1/3, with aspect ratios from 3/4 to 4/3, each side of a crop is longer than half the side of a square
    # image, so every crop contains the center. ImageNet's usual 0.08 may lose what distinguishes two species.
    crop_scale_min: float = field(
        default=0.35, metadata={"help": "Smallest fraction of the image's area in a random crop, above 0 up to 1."}
    )
    horizontal_flip: bool = field(
        default=True, metadata={"help": "Flip each image horizontally with probability 1/2."}
    )
    rotation_degrees: float = field(
        default=0.0,
        metadata={"help": "Rotate by up to this many degrees to either side; 0: off. The paper's code uses 15."},
    )
    rand_augment_num_ops: int = field(
        default=0, metadata={"help": "Number of operations of RandAugment per image; 0: off, 2 is usual."}
    )
    rand_augment_magnitude: int = field(
        default=9, metadata={"help": "Magnitude of RandAugment's operations, 1 to 29 (of 30)."}
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Change brightness, contrast and saturation by factors in 1 ± this, at most 1; 0: off."},
    )
    random_erasing: float = field(
        default=0.0,
        metadata={"help": "Probability of filling a rectangle, 1/50 to 1/3 of the image, with the mean color."},
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixup: blend images of a batch, with weights from Beta(alpha, alpha); 0: off."}
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix: paste parts of images of a batch, with areas from Beta(alpha, alpha); 0: off."},
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others in their batch."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __post_init__(self):
        if self.train_crop not in ("random_resized", "resize"):
            raise UserError(f"--train_crop must be random_resized or resize, got {self.train_crop}.")
        if not 0 < self.crop_scale_min <= 1:
            raise UserError(f"--crop_scale_min must be above 0 and at most 1, got {self.crop_scale_min}.")
        for name, least, most in (
            ("rotation_degrees", 0, 180),
            ("rand_augment_num_ops", 0, len(_RAND_AUGMENT_POLICY)),
            ("rand_augment_magnitude", 1, 29),
            ("color_jitter", 0, 1),
            ("random_erasing", 0, 1),
            ("mixup_alpha", 0, math.inf),
            ("cutmix_alpha", 0, math.inf),
        ):
            value = getattr(self, name)
            if not (least <= value <= most and math.isfinite(value)):
                limits = f"at least {least}" if math.isinf(most) else f"between {least} and {most}"
                raise UserError(f"--{name} must be {limits}, got {value}.")


def processed_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    r"""
    Height and width of the output of an image processor, measured on a wide and a tall image.

    Raises:
        UserError: if they depend on the image.
    """
    mode = image_mode(image_processor)
    sizes = {
        tuple(image_processor(Image.new(mode, size), return_tensors="pt")["pixel_values"].shape[-2:])
        for size in ((96, 64), (64, 96))
    }
    if len(sizes) > 1:
        raise UserError(
            f"{type(image_processor).__name__} keeps the aspect ratio of an image "
            f"({' and '.join(map(str, sorted(sizes)))}), but all images of a batch must have the same size: set its "
            "`size` to a height and a width, or `do_center_crop`."
        )
    (height, width) = sizes.pop()
    return height, width


class TrainTransform:
    r"""
    Processes training images like the image processor, with random changes. Those that are on apply in this order:
    crop and resize, horizontal flip, rotation, RandAugment, color jitter, normalization, erasing. Corners that a
    rotation leaves empty are black.

    [RandAugment](https://huggingface.co/papers/1909.13719) is kornia's, with the published shear. It draws different
    operations out of 15 and applies each at `magnitude / 30` of its range, in a random direction if it has two. As
    published, solarize is milder at greater magnitudes, and contrast, color, brightness and sharpness change nothing
    at magnitude 15.

    Args:
        image_processor (`BaseImageProcessor`):
            Image processor of the model, for 3 channels, or for 1 (if `image_mean` has one value).
        args (`AugmentationArguments`):
            The random changes.

    Raises:
        UserError: see [`processed_size`].
    """

    def __init__(self, image_processor: BaseImageProcessor, args: AugmentationArguments):
        self.args = args
        self.height, self.width = processed_size(image_processor)
        self.resample = getattr(image_processor, "resample", None)
        self.mode = image_mode(image_processor)
        mean, std = pixel_statistics(image_processor, num_channels=len(self.mode))
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.change_pixels = nn.Sequential(*_pixel_augmentations(args))
        self.erase = K.RandomErasing(p=args.random_erasing) if args.random_erasing else nn.Identity()

    def __call__(self, image: Image.Image, seed: int | Sequence[int]) -> torch.Tensor:
        r"""
        Args:
            image (`PIL.Image.Image`):
                A decoded image.
            seed (`int` or sequence of `int`):
                Random seed, not negative; for example the run's seed, the epoch and the row. No global generator is
                changed.

        Returns:
            `torch.FloatTensor` of shape `(num_channels, height, width)`: the normalized image.
        """
        # kornia draws from torch's CPU generator, whose state is restored. torch.manual_seed would also reseed the
        # accelerators. The generator uses only 32 bits of a seed, so these are hashed from the whole seed.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            box = self._draw_box(*image.size) if self.args.train_crop == "random_resized" else None
            image = image.convert(self.mode).resize((self.width, self.height), self.resample, box=box)
            pixels = torch.from_numpy(np.array(image)).view(self.height, self.width, -1).permute(2, 0, 1) / 255
            num_channels = len(pixels)
            # kornia gets a gray image as three equal channels, which remain equal.
            pixels = self.change_pixels(pixels.expand(1, 3, -1, -1))[:, :num_channels].clamp(0, 1)
            return self.erase((pixels - self.mean) / self.std)[0].contiguous()

    def _draw_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels, of a crop of random area, aspect ratio and position."""
        low, high = (math.log(ratio * self.width / self.height) for ratio in CROP_RATIOS)
        for _ in range(_CROP_TRIALS):
            draw_area, draw_ratio, draw_left, draw_top = torch.rand(4, dtype=torch.float64).tolist()
            area = width * height * (self.args.crop_scale_min + (1 - self.args.crop_scale_min) * draw_area)
            ratio = math.exp(low + (high - low) * draw_ratio)
            crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if 1 <= crop_width <= width and 1 <= crop_height <= height:
                left, top = draw_left * (width - crop_width), draw_top * (height - crop_height)
                return left, top, min(left + crop_width, width), min(top + crop_height, height)
        # Hardly any crop of that area fits into a very narrow image: take the largest of a permitted aspect ratio.
        ratio = min(max(width / height, math.exp(low)), math.exp(high))
        crop_width, crop_height = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        return left, top, min(left + crop_width, width), min(top + crop_height, height)


class EvalTransform:
    """Processes evaluation images with the image processor, to `(num_channels, height, width)`."""

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor
        self.mode = image_mode(image_processor)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image.convert(self.mode), return_tensors="pt")["pixel_values"][0]


def _pixel_augmentations(args: AugmentationArguments) -> list[nn.Module]:
    """Augmentations of pixels in [0, 1], before the normalization."""
    augmentations: list[nn.Module] = []
    if args.horizontal_flip:
        augmentations.append(K.RandomHorizontalFlip(p=0.5))
    if args.rotation_degrees:
        augmentations.append(K.RandomRotation(args.rotation_degrees, p=1.0))
    if args.rand_augment_num_ops:
        augmentations.append(
            RandAugment(args.rand_augment_num_ops, args.rand_augment_magnitude, policy=_RAND_AUGMENT_POLICY)
        )
    if args.color_jitter:
        augmentations.append(K.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter, p=1.0))
    return augmentations


__all__ = ["AugmentationArguments", "EvalTransform", "TrainTransform", "processed_size"]
