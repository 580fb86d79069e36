# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""From data sets to batches: decodes, transforms and stacks images."""

from collections.abc import Callable

import datasets
import torch

from modeling_rbi import NO_LABEL, UserError

from .decode import DEFAULT_MAX_PIXELS, decode_image
from .mixing import Mixing
from .samplers import Draw


class ImageDataset(torch.utils.data.Dataset):
    r"""
    A split of a data set in the form of `form.py` (columns `image`, `label` and, if published, `box`), as a data set
    for `DataLoader` or `Trainer`. Its items have `pixel_values` and `labels`.

    Args:
        split (`datasets.Dataset`):
            The images.
        transform (`Callable`):
            Turns a PIL image into `pixel_values`: an [`EvalTransform`] or, with `augment`, a [`TrainTransform`], which
            also takes a seed.
        augment (`bool`, *optional*, defaults to `False`):
            Whether the transform takes a seed. An item that is requested by a [`Draw`] gets the seed of the draw; an
            item that is requested by a number gets one from torch's global generator.
        crop_to_boxes (`bool`, *optional*, defaults to `False`):
            Whether to crop images to their published boxes.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Images with more pixels are refused.

    Raises:
        UserError: if `crop_to_boxes` is on and there are no boxes.
        UnreadableImageError: when an item is requested that cannot be decoded; names the file.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[..., torch.Tensor],
        *,
        augment: bool = False,
        crop_to_boxes: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ):
        if crop_to_boxes and "box" not in split.column_names:
            raise UserError("`crop_to_boxes` is on, but the data set has no boxes: leave it off.")
        self.split, self.transform, self.augment = split, transform, augment
        self.crop_to_boxes, self.max_pixels = crop_to_boxes, max_pixels

    @property
    def labels(self) -> list[int]:
        """Class of each image."""
        return list(self.split["label"])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: int | Draw) -> dict:
        draw = item if isinstance(item, Draw) else None
        example = self.split[draw.row if draw else int(item)]  # type: ignore[arg-type]
        box = example["box"] if self.crop_to_boxes else None
        image = decode_image(example["image"], box=box, max_pixels=self.max_pixels)
        if self.augment:
            seed = draw.seed if draw else int(torch.randint(2**63 - 1, ()))
            pixel_values = self.transform(image, seed)
        else:
            pixel_values = self.transform(image)
        result = {"pixel_values": pixel_values, "labels": example["label"]}
        return result if draw is None else result | {"draw": draw}


class WithUnlabeled(torch.utils.data.Dataset):
    r"""
    Labeled images, followed by unlabeled ones.

    Args:
        labeled (`ImageDataset`):
            The images to train on.
        unlabeled (`ImageDataset`):
            Images that only serve as neighbors, with the label -100.
    """

    def __init__(self, labeled: ImageDataset, unlabeled: ImageDataset):
        self.labeled, self.unlabeled = labeled, unlabeled

    @property
    def labels(self) -> list[int]:
        """Class of each labeled image."""
        return self.labeled.labels

    def __len__(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    def __getitem__(self, item: int | Draw) -> dict:
        draw = item if isinstance(item, Draw) else None
        row = draw.row if draw else int(item)  # type: ignore[arg-type]
        if row < len(self.labeled):
            return self.labeled[item]
        row -= len(self.labeled)
        return self.unlabeled[draw._replace(row=row) if draw else row]


class Collator:
    r"""
    Stacks items of [`ImageDataset`] into a batch: `pixel_values` (B, C, H, W); `labels` (B,), -100 for padding and
    unlabeled images; and `relation_mask` (B,), `False` for padding. With `mixing`, there are also `targets`
    (B, num_labels), and the mask is (B, B).

    Args:
        mixing (`Mixing`, *optional*):
            Mixes the labeled images of each batch.
    """

    def __init__(self, mixing: Mixing | None = None):
        self.mixing = mixing

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        draws = [item.get("draw") for item in items]
        is_real = torch.tensor([draw is None or not draw.is_padding for draw in draws])
        labels = torch.tensor([item["labels"] for item in items]).masked_fill(~is_real, NO_LABEL)
        batch = {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": labels,
            "relation_mask": is_real,
        }
        if self.mixing is None:
            return batch
        seed = draws[0].seed if draws[0] else int(torch.randint(2**63 - 1, ()))
        pixel_values, targets, relation_mask = self.mixing(batch["pixel_values"], labels, seed)
        return batch | {
            "pixel_values": pixel_values,
            "targets": targets,
            "relation_mask": relation_mask & is_real[None, :],
        }
