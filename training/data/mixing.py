# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix of a batch, and which images may be neighbors afterwards."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from modeling_rbi import NO_LABEL, UserError

from .transforms import AugmentationArguments


class MixedBatch(NamedTuple):
    """Result of [`Mixing`]."""

    pixel_values: torch.Tensor  # (batch_size, num_channels, height, width)
    targets: torch.Tensor  # (batch_size, num_labels), float
    relation_mask: torch.Tensor  # (batch_size, batch_size), bool


class Mixing:
    r"""
    Mixes each image of a batch, and its label, with another image of the batch, its partner.
    [Mixup](https://huggingface.co/papers/1710.09412) computes `share * image + (1 - share) * partner`.
    [CutMix](https://huggingface.co/papers/1905.04899) pastes a rectangle of the partner; the share is then the
    fraction of the pixels that remain. A batch has one share, drawn from Beta(alpha, alpha). Each image is the partner
    of one image, sometimes of itself. If both methods are on, each batch uses one of them, with probability 1/2.

    Relations need care. RPE reads the pixels that the model sees, which are the mixed ones. Two mixtures that contain
    the same original resemble each other, and have similar labels, only because of the mixing. Their PSNR would reveal
    the labels, and the head would learn a relation that no evaluation batch has. `relation_mask` therefore excludes
    such pairs.

    Args:
        args (`AugmentationArguments`):
            Only `mixup_alpha` and `cutmix_alpha` are used. 0: off; with both off, nothing is mixed.
        num_labels (`int`):
            Number of classes.
    """

    def __init__(self, args: AugmentationArguments, num_labels: int):
        self.num_labels = num_labels
        self._methods = [
            (alpha, mix)
            for alpha, mix in ((args.mixup_alpha, self._mixup), (args.cutmix_alpha, self._cutmix))
            if alpha > 0
        ]

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor, seed: int | Sequence[int]) -> MixedBatch:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                The images. They are not changed; the mixed images are a new tensor.
            labels (`torch.LongTensor` of shape `(batch_size,)`):
                Their classes. -100 marks padding and unlabeled images, which are not mixed.
            seed (`int` or sequence of `int`):
                Random seed, not negative. No global generator is read or changed.

        Returns:
            `MixedBatch`: the images; the `targets`, whose rows sum to 1, or to 0 for an image without a label; and the
            `relation_mask`, which is `False` for two different images that contain the same original, and `True` on
            the diagonal.

        Raises:
            UserError: if the shapes of images and labels do not match, or a label is neither a class nor -100.
        """
        if pixel_values.ndim != 4 or labels.shape != pixel_values.shape[:1]:
            raise UserError(
                "Mixing takes images of shape (batch_size, num_channels, height, width) and labels of shape "
                f"(batch_size,), got {tuple(pixel_values.shape)} and {tuple(labels.shape)}."
            )
        is_real = labels != NO_LABEL
        if ((labels < 0) & is_real).any() or (labels >= self.num_labels).any():
            raise UserError(
                f"The labels go from {labels[is_real].min()} to {labels.max()}; with {self.num_labels} classes they "
                f"are 0 to {self.num_labels - 1}, or {NO_LABEL} for none."
            )
        rng = np.random.default_rng(seed)
        partners = torch.arange(len(labels), device=labels.device)
        rows = partners[is_real]
        partners[rows] = rows[torch.from_numpy(rng.permutation(len(rows))).to(rows.device)]

        share = 1.0
        if self._methods and len(rows) > 1:
            alpha, mix = self._methods[rng.integers(len(self._methods))]
            pixel_values, share = mix(pixel_values, partners, rng.beta(alpha, alpha), rng)

        one_hot = torch.nn.functional.one_hot(labels.where(is_real, 0), self.num_labels) * is_real[:, None]
        # Which mixture (row) contains which original (column), (batch_size, batch_size).
        identity = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        contains = torch.zeros_like(identity)
        if share > 0:
            contains |= identity
        if share < 1:
            contains |= identity[partners]
        return MixedBatch(
            pixel_values,
            targets=share * one_hot.float() + (1.0 - share) * one_hot[partners],
            relation_mask=(contains.float() @ contains.float().T == 0) | identity,
        )

    @staticmethod
    def _mixup(
        pixel_values: torch.Tensor, partners: torch.Tensor, share: float, rng: np.random.Generator
    ) -> tuple[torch.Tensor, float]:
        return pixel_values[partners].lerp(pixel_values, share), share

    @staticmethod
    def _cutmix(
        pixel_values: torch.Tensor, partners: torch.Tensor, share: float, rng: np.random.Generator
    ) -> tuple[torch.Tensor, float]:
        height, width = pixel_values.shape[-2:]
        # A rectangle with the aspect ratio of the image and (1 - share) of its area, around a random point, clipped to
        # the image.
        side = (1.0 - share) ** 0.5
        top, bottom = _interval(rng.random() * height, round(side * height), height)
        left, right = _interval(rng.random() * width, round(side * width), width)
        mixed = pixel_values.clone()
        mixed[:, :, top:bottom, left:right] = pixel_values[partners, :, top:bottom, left:right]
        return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def _interval(center: float, length: int, limit: int) -> tuple[int, int]:
    start = round(center - length / 2)
    return max(start, 0), min(start + length, limit)


__all__ = ["MixedBatch", "Mixing"]
