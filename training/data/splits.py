# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Splits of labeled images, as row numbers."""

import math
from dataclasses import dataclass

import torch
from sklearn.model_selection import StratifiedKFold

from modeling_rbi import UserError


@dataclass(frozen=True)
class Split:
    """Row numbers of each part, `(n,)`; the parts do not overlap."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def draw_few_shots(labels: torch.Tensor, num_train: int, num_validation: int, seed: int) -> Split:
    r"""
    Draws the same number of images of each class for training and for validation; the rest is for the test.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image.
        num_train (`int`):
            Number of training images of each class.
        num_validation (`int`):
            Number of validation images of each class.
        seed (`int`):
            Random seed of the draw.

    Raises:
        UserError: if a class has too few images to keep one for the test.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        if len(rows) <= num_train + num_validation:
            raise UserError(
                f"Class {label} has {len(rows)} images: too few for {num_train} to train, {num_validation} to "
                "validate and at least 1 to test."
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        sizes = [num_train, num_validation, len(rows) - num_train - num_validation]
        for part, chosen in zip(parts, rows.split(sizes), strict=True):
            part.append(chosen)
    return Split(*(torch.cat(part) for part in parts))


def stratified_split(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Holds out the same fraction of each class, drawn at random.

    From a class with `n` images, `fraction * n` are held out, rounded to the nearest whole number (halves up), but at
    least 1 and at most `n - 1`. The only image of a class is not held out.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image.
        fraction (`float`):
            Fraction to hold out, between 0 and 1, both excluded.
        seed (`int`):
            Random seed of the draw.

    Returns:
        Row numbers to train on, and row numbers held out, each in ascending order.

    Raises:
        UserError: if `fraction` is out of range.
    """
    if not 0 < fraction < 1:
        raise UserError(f"The fraction to hold out must be between 0 and 1, both excluded, got {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for rows in rows_by_class(labels):
        size = min(max(math.floor(fraction * len(rows) + 0.5), 1), len(rows) - 1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out.append(rows[:size])
        train.append(rows[size:])
    return _in_order(train), _in_order(held_out)


def stratified_folds(labels: torch.Tensor, num_folds: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    r"""
    Draws folds for cross-validation with scikit-learn's `StratifiedKFold`: each image is held out once, and each class
    is spread evenly over the folds.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image.
        num_folds (`int`):
            Number of folds, at least 2.
        seed (`int`):
            Random seed of the draw.

    Returns:
        For each fold the row numbers to train on and those to validate on, each in ascending order.

    Raises:
        UserError: if there are fewer than 2 folds, or a class has fewer images than there are folds.
    """
    if num_folds < 2:
        raise UserError(f"There must be at least 2 folds, got {num_folds}.")
    classes, counts = labels.unique(return_counts=True)
    if len(classes) and counts.min() < num_folds:
        smallest = counts.argmin()
        raise UserError(
            f"Class {classes[smallest]} has {counts[smallest]} images: too few for {num_folds} folds. Take fewer "
            "folds, or leave the class out."
        )
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    return [
        (torch.from_numpy(train), torch.from_numpy(validation))
        for train, validation in folds.split(labels.numpy(), labels.numpy())
    ]


def draw_per_class(labels: torch.Tensor, num_per_class: int, seed: int) -> torch.Tensor:
    r"""
    Draws the same number of images of each class.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image.
        num_per_class (`int`):
            Number of images of each class.
        seed (`int`):
            Random seed of the draw.

    Returns:
        Row numbers in ascending order.

    Raises:
        UserError: if a class has fewer images.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for rows in rows_by_class(labels):
        if len(rows) < num_per_class:
            raise UserError(
                f"Class {labels[rows[0]]} has {len(rows)} images, fewer than the {num_per_class} per class that were "
                "requested."
            )
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:num_per_class]])
    return _in_order(drawn)


def draw_subset(labels: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    r"""
    Draws images at random: first one of each class, then any others.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each image.
        size (`int`):
            Number of images. If it is less than the number of classes, classes drawn at random get no image.
        seed (`int`):
            Random seed of the draw.

    Returns:
        Row numbers in ascending order; all rows if there are at most `size`.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # The first of each class in a random order, before the others.
    firsts = torch.tensor([int(rows.min()) for rows in rows_by_class(labels[order])], dtype=torch.long)
    is_first = torch.zeros(len(labels), dtype=torch.bool)
    is_first[firsts] = True
    return torch.cat([order[is_first], order[~is_first]])[:size].sort().values


def rows_by_class(labels: torch.Tensor) -> list[torch.Tensor]:
    """Row numbers of each class with images, in ascending order; the lowest class first."""
    counts = labels.unique(return_counts=True)[1]
    return list(labels.argsort(stable=True).split(counts.tolist())) if len(labels) else []


def _in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.long)
