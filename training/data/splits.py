# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Splits of labelled pictures, as row numbers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Split:
    """Row numbers of each part, `(n,)` each; no picture is in two of them."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def draw_few_shots(labels: torch.Tensor, num_train: int, num_validation: int, seed: int) -> Split:
    r"""
    Draws the same number of pictures of each class for training and for validation; the rest are the test.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Class of each picture.
        num_train (`int`):
            Training pictures of each class.
        num_validation (`int`):
            Validation pictures of each class.
        seed (`int`):
            Number of the draw.

    Raises:
        ValueError: if a class has too few pictures to leave one for the test.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        if len(rows) <= num_train + num_validation:
            raise ValueError(
                f"Class {label} has {len(rows)} pictures: too few for {num_train} to train, {num_validation} to "
                "validate and at least 1 to test."
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        sizes = [num_train, num_validation, len(rows) - num_train - num_validation]
        for part, chosen in zip(parts, rows.split(sizes), strict=True):
            part.append(chosen)
    return Split(*(torch.cat(part) for part in parts))
