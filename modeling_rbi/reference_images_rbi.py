# Copyright 2026 The RBI authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Choosing the images of a reference bank, and reading them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import logging

from .bank_rbi import NO_LABEL, check_size
from .errors_rbi import UserError, shown_names
from .image_processing_rbi import image_mode, upright_rgb


logger = logging.get_logger(__name__)

STRATEGIES = ("balanced", "herding", "random")


def choose_references(
    labels: torch.Tensor,
    class_names: Mapping[int, str],
    per_class: int | None = None,
    num_references: int | None = None,
    strategy: str | None = None,
    seed: int = 0,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Chooses the images of a bank.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image, -100 where it is not known.
        class_names (`Mapping[int, str]`):
            Names of the model's classes.
        per_class (`int`, *optional*):
            Number of images of each class. A smaller class gives all of its images.
        num_references (`int`, *optional*):
            Total number of images, instead of `per_class`. With neither, all are taken.
        strategy (`str`, *optional*):
            `"balanced"`: at random within each class, as equal numbers as possible; `"herding"`: the same numbers, but
            the images whose mean comes closest to the mean of the class (Welling, 2009, as in iCaRL); `"random"`: at
            random, regardless of class. By default `"balanced"` if all labels are known, else `"random"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random choice.
        features (`torch.FloatTensor` of shape `(n, feature_size)`, *optional*):
            Features of the images, for `"herding"`.

    Returns:
        `torch.LongTensor`: row numbers, in ascending order.

    Raises:
        UserError: if the arguments do not fit each other or the labels, or there would be too many references.
    """
    is_labeled = labels != NO_LABEL
    strategy = strategy or default_strategy(labels)
    check_choice(per_class, num_references, strategy)
    if not len(labels):
        raise UserError("There are no images to use as references.")
    known = labels[is_labeled]
    if len(known) and (known.min() < 0 or known.max() >= len(class_names)):
        wrong = int(known.max() if known.max() >= len(class_names) else known.min())
        raise UserError(
            f"An image has the label {wrong}, but the model's classes are 0..{len(class_names) - 1} (-100: no label)."
        )
    if strategy != "random" and 0 < len(known) < len(labels):
        raise UserError(
            f'`strategy="{strategy}"` needs a label for each image, but {len(labels) - len(known)} have none: add '
            "unlabeled images in a second call, `add_references`."
        )
    if strategy == "balanced" and not len(known):
        raise UserError('`strategy="balanced"` needs labels, and no image has one: use "random" or "herding".')
    if strategy != "random" and len(known):
        counts = known.bincount(minlength=len(class_names))
        if (counts == 0).any():
            names = shown_names(class_names)
            empty = [names[label] for label in (counts == 0).nonzero().flatten().tolist()]
            raise UserError(
                f"{len(empty)} of the model's classes have no image, for instance {empty[0]!r}: add images of "
                'these classes, or use `strategy="random"`.'
            )
        if per_class is not None and (short := int((counts < per_class).sum())):
            logger.warning(f"{short} classes have fewer than {per_class} images: all of their images are taken.")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if strategy == "random":
        chosen = order[:num_references]
    else:
        if strategy == "herding":
            if features is None:
                raise UserError('`strategy="herding"` needs `features`.')
            order = torch.cat([rows[_herd(features[rows])] for rows in _rows_of_each(labels)])
        # In rounds: each class adds its next image.
        turns = torch.empty_like(order)
        for rows in _rows_of_each(labels[order]):
            turns[rows] = torch.arange(len(rows))
        chosen = order[turns < per_class] if per_class is not None else order[turns.argsort(stable=True)]
        chosen = chosen[:num_references]
    check_size(len(chosen))
    return chosen.sort().values


def default_strategy(labels: torch.Tensor) -> str:
    """The strategy of `choose_references` if none is given."""
    return "balanced" if (labels != NO_LABEL).all() else "random"


def check_choice(per_class: int | None, num_references: int | None, strategy: str | None):
    r"""
    Checks the arguments of `choose_references` that can be checked without labels.

    Raises:
        UserError: if they are out of range or exclude each other.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise UserError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    if per_class is not None and num_references is not None:
        raise UserError("Give `per_class` or `num_references`, not both.")
    for name, value in (("per_class", per_class), ("num_references", num_references)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` must be at least 1, got {value}.")
    if strategy == "random" and per_class is not None:
        raise UserError(
            '`per_class` needs labels and `strategy="balanced"` or `"herding"`: give `num_references` instead.'
        )


def _rows_of_each(labels: torch.Tensor) -> list[torch.Tensor]:
    return [(labels == label).nonzero().flatten() for label in labels.unique()]


def _herd(features: torch.Tensor) -> torch.Tensor:
    """Order of the images of a class: each brings the mean of the images so far closest to the mean of all."""
    features = nn.functional.normalize(features.float(), dim=-1)
    mean, total = features.mean(0), torch.zeros_like(features[0])
    order: list[int] = []
    is_left = torch.ones(len(features), dtype=torch.bool)
    for number in range(1, len(features) + 1):
        distances = ((total + features) / number - mean).square().sum(-1)
        order.append(int(distances.masked_fill(~is_left, torch.inf).argmin()))
        is_left[order[-1]] = False
        total = total + features[order[-1]]
    return torch.tensor(order)


def labels_before_reading(images: Any) -> torch.Tensor | None:
    """Labels that a data set gives without reading its images: an attribute `labels`, or a column of `datasets`."""
    if not (isinstance(images, Sized) and hasattr(images, "__getitem__")):
        return None
    labels = getattr(images, "labels", None)
    for name in ("labels", "label"):
        if labels is None and name in (getattr(images, "column_names", None) or ()):
            # Without a format, the transform of the data set does not run on all images.
            labels = images.with_format(None)[name][:]  # type: ignore[attr-defined]
    if labels is None or len(labels) != len(images):
        return None
    return _labels(labels, torch.Size([len(images)]))


def read_batches(
    images: Dataset | Iterable,
    rows: Sequence[int] | None,
    image_processor: Callable | None,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    r"""
    Pixels, (B, C, H, W), and labels, (B,), of a data set or loader.

    Args:
        images (`Dataset` or `Iterable`):
            Yields dicts: one image, `pixel_values` (C, H, W) or a PIL `image`, or a batch, `pixel_values`
            (B, C, H, W); with `labels` or `label` where they are known. A PIL image is decoded by [`upright_rgb`].
        rows (`Sequence[int]`, *optional*):
            Row numbers of the images of a data set to read. `None`: all.
        image_processor (`Callable`, *optional*):
            Processor for PIL images.
        batch_size (`int`):
            Number of images per batch, if they come one by one.

    Raises:
        UserError: if an item has another form, or its image cannot be decoded.
    """
    if isinstance(images, Mapping):
        raise UserError(
            f"The images for references are a {type(images).__name__} with the keys "
            f"{', '.join(map(str, images))}: pass one of its data sets, or, if it is a batch, a list of it."
        )
    if rows is None and isinstance(images, Sized) and hasattr(images, "__getitem__"):
        rows = range(len(images))
    items = iter(images) if rows is None else (images[int(row)] for row in rows)  # type: ignore[index]
    waiting: list[tuple[torch.Tensor, int]] = []
    for item in items:
        pixel_values, labels = _pixels_and_labels(item, image_processor)
        if pixel_values.ndim == 4:
            yield pixel_values, labels
            continue
        waiting.append((pixel_values, int(labels)))
        if len(waiting) == batch_size:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(images: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len({pixel_values.shape for pixel_values, _ in images}) > 1:
        raise UserError("The images have several sizes: pass them through the model's image processor.")
    return torch.stack([pixel_values for pixel_values, _ in images]), torch.tensor([label for _, label in images])


def _pixels_and_labels(item: Any, image_processor: Callable | None) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(item, Mapping) or not ("pixel_values" in item or "image" in item):
        keys = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        raise UserError(f"The images for references must be dicts with `pixel_values` (or a PIL `image`), got {keys}.")
    if "pixel_values" in item:
        pixel_values = torch.as_tensor(item["pixel_values"])
    elif image_processor is None:
        raise UserError("The data set holds images, no `pixel_values`: pass the model's `image_processor`, too.")
    else:
        image = item["image"]
        if isinstance(image, Image.Image):
            image = upright_rgb(image).convert(image_mode(image_processor))
        pixel_values = image_processor(image, return_tensors="pt")["pixel_values"][0]
    if pixel_values.ndim not in (3, 4):
        raise UserError(
            "`pixel_values` of an image must be (C, H, W), and of a batch (B, C, H, W), got "
            f"{tuple(pixel_values.shape)}."
        )
    shape = pixel_values.shape[:1] if pixel_values.ndim == 4 else ()
    labels = next((item[name] for name in ("labels", "label") if item.get(name) is not None), None)
    return pixel_values, torch.full(shape, NO_LABEL) if labels is None else _labels(labels, torch.Size(shape))


def _labels(labels: Any, shape: torch.Size) -> torch.Tensor:
    """Labels as a tensor, with -100 for `None`."""
    if isinstance(labels, (list, tuple)):
        labels = [NO_LABEL if label is None else label for label in labels]
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # not numbers
        labels = torch.as_tensor(labels).cpu()
        if labels.shape == shape and not labels.is_floating_point():
            return labels.long()
    given = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else f"{labels!r:.100}"
    raise UserError(f"Labels must be one whole number for each image, got {given}.")


__all__ = [
    "STRATEGIES",
    "check_choice",
    "choose_references",
    "default_strategy",
    "labels_before_reading",
    "read_batches",
]
