# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Features of a data set, cached from one pass through the backbone."""

import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    ReferenceBank,
    RelationshipPositionEncoding,
    UserError,
)
from modeling_rbi.relations_rbi import pairwise_mean_squared_error

from ..data.image_dataset import Collator, ImageDataset


@dataclass(frozen=True)
class CachedImages:
    """Images of a data set with their features, row by row."""

    pixel_values: "torch.Tensor | EightBitPixels"  # (n, num_channels, height, width), normalized
    features: torch.Tensor  # (n, feature_size)
    labels: torch.Tensor  # (n,)
    seconds: float = 0.0  # duration of the backbone pass, including reading the images

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`pixel_values` in float32, features and labels of these rows, `(n,)`."""
        return self.pixel_values[rows], self.features[rows], self.labels[rows]


# Full-size images up to this size in total are stored in float32, larger ones in 8 bits.
_MAX_FLOAT_BYTES = 2**30
# Mean squared error, of pixels in [0, 1], below which two thumbnails show the same image: 50 dB, 0.8 gray levels.
# Rounding in another order changes a few pixels by one level.
_SAME_IMAGE = 1e-5
# Distance, relative to the spread of the bank, below which two feature vectors come from the same image. On ORL faces
# with pretrained MobileNetV2 and EfficientNet-Lite0, another batch size moves features by less than 1e-5 and TF32
# (emulated) by up to 0.04; different photographs are at least 0.23 apart. A bank computed in bfloat16 may be 0.3 off
# features in float32: then images are not recognized.
_SAME_FEATURES = 0.1
# The same relative to the norm, for banks without spread, such as a single reference. It is above float32 rounding.
_SAME_SINGLE_FEATURES = 1e-3
# Rounding may move a pixel out of [0, 1] by this many gray levels.
_TOLERANCE = 0.5


class EightBitPixels:
    r"""
    Stores normalized images in 8 bits per pixel, a quarter of the memory of float32. `pixels[rows]` returns them as
    `pixel_values` in float32.

    Images that the image processor resized in 8 bits are restored exactly. Others are rounded, with a PSNR of 58.9 dB.
    This shifts the PSNR of two images by 0.01 dB at 30 dB, 0.1 dB at 40 dB, and 1 dB at 50 dB, the ceiling.

    Args:
        num_images (`int`):
            Number of images.
        shape (`tuple[int, int, int]`):
            `(num_channels, height, width)` of each image.
        config (`RBIConfig`):
            Config whose `image_mean` and `image_std` undo the normalization.
    """

    def __init__(self, num_images: int, shape: tuple[int, ...], config: RBIConfig):
        self.levels = torch.empty(num_images, *shape, dtype=torch.uint8)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (config.image_mean, config.image_std)
        )

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def shape(self) -> torch.Size:
        """`(n, num_channels, height, width)`."""
        return self.levels.shape

    def __setitem__(self, rows, pixel_values: torch.Tensor):
        levels = (pixel_values * self.std + self.mean) * 255
        if levels.min() < -_TOLERANCE or levels.max() > 255 + _TOLERANCE:
            raise UserError(
                f"With `image_mean` and `image_std` of the model's config, pixels range from {levels.min() / 255:.3f} "
                f"to {levels.max() / 255:.3f} instead of 0 to 1, so PSNR would be wrong. Set both to what "
                "`modeling_rbi.pixel_statistics` returns for the image processor."
            )
        self.levels[rows] = levels.round().clamp(0, 255).byte()

    def __getitem__(self, rows) -> torch.Tensor:
        return (self.levels[rows].float() / 255 - self.mean) / self.std


@torch.no_grad()
def extract(
    model: PreTrainedModel,
    images: ImageDataset,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: bool = True,
) -> CachedImages:
    r"""
    Runs the backbone once over all images.

    The pixels are kept at the size that PSNR needs, averaged down to `config.psnr_image_size`. This does not change
    PSNR, since averaging and normalization commute. If it is `None`, they are kept at full size, and above 1 GiB in
    total as [`EightBitPixels`].

    Args:
        model (`RBIForImageClassification`, `RBIModel` or any image classifier):
            Model, put into evaluation mode. If it is not RBI, `features` are its logits and no pixels are kept.
        images (`ImageDataset`):
            Images, with an `EvalTransform`.
        batch_size (`int`, *optional*, defaults to 64):
            Images per step of the backbone. It does not change the results.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device that the model is moved to. It stays there.
        num_workers (`int`, *optional*, defaults to 0):
            Number of processes that read images. 0: this process.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar if standard error is a terminal.

    Raises:
        UserError: if there are no images, or full-size pixels do not match the config's `image_mean` and
            `image_std`.
        UnreadableImageError: if an image cannot be decoded. It names the image.
    """
    if not len(images):
        raise UserError("There are no images to run the backbone on.")
    start = time.perf_counter()
    model = model.to(device).eval()
    base = model.rbi if isinstance(model, RBIForImageClassification) else model
    kept: torch.Tensor | EightBitPixels | None = None
    features: torch.Tensor | None = None
    labels = torch.empty(len(images), dtype=torch.long)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=Collator())
    with tqdm(
        total=len(images),
        desc="Backbone",
        unit=" images",
        leave=False,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        done = 0
        for batch in loader:
            rows = slice(done, done + len(batch["labels"]))
            pixel_values = batch["pixel_values"].to(device)
            if isinstance(base, RBIModel):
                output = base.extract_features(pixel_values.to(base.dtype))[0]
                small = _for_psnr(pixel_values.float(), base.config.psnr_image_size)
            else:
                output = base(pixel_values.to(base.dtype)).logits
                small = pixel_values[:, :0].float()
            if kept is None or features is None:
                features = torch.empty(len(images), output.shape[1], dtype=output.dtype)
                kept = _make_room(len(images), small, base.config)
            features[rows], kept[rows], labels[rows] = output.cpu(), small.cpu(), batch["labels"]
            done = rows.stop
            bar.update(len(batch["labels"]))
    assert kept is not None and features is not None
    return CachedImages(kept, features, labels, seconds=time.perf_counter() - start)


def _for_psnr(pixel_values: torch.Tensor, psnr_image_size: int | None) -> torch.Tensor:
    if psnr_image_size is None:
        return pixel_values
    height, width = (min(psnr_image_size, length) for length in pixel_values.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(pixel_values, (height, width))


def _make_room(num_images: int, pixel_values: torch.Tensor, config: RBIConfig) -> torch.Tensor | EightBitPixels:
    """An empty store of images like these."""
    shape = pixel_values.shape[1:]
    is_large = num_images * shape.numel() * pixel_values.element_size() > _MAX_FLOAT_BYTES
    if is_large and getattr(config, "psnr_image_size", 0) is None:
        return EightBitPixels(num_images, shape, config)
    return torch.empty(num_images, *shape)


def is_itself(
    rpe: RelationshipPositionEncoding, bank: ReferenceBank, pixel_values: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Which references show the same image, `(n, N)`, by thumbnails or, if the bank has none, by features."""
    if bank.images is not None:
        images = rpe.thumbnails(pixel_values).flatten(1).float() / 255
        return pairwise_mean_squared_error(images, bank.unit_range_images()) < _SAME_IMAGE
    references = bank.features.float()
    centered = references - references.mean(0)
    error = pairwise_mean_squared_error(features.float() - references.mean(0), centered)
    spread, norms = centered.square().mean(), references.square().mean(1)
    return error < torch.maximum(_SAME_FEATURES**2 * spread, _SAME_SINGLE_FEATURES**2 * norms)
