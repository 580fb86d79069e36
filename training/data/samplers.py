# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which images make up a training batch: for RBI, the batch is the neighborhood.

All samplers give the same global batches on any number of processes, each process its share of every one, and the same
again after a resume: what is drawn depends on the seed and the epoch alone.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from modeling_rbi import UserError


class Draw(NamedTuple):
    """An image of a batch: its row in the data set, and the seed of its augmentation. Padding repeats an image."""

    row: int
    seed: int
    is_padding: bool = False


class NeighborhoodSampler(torch.utils.data.Sampler[list[Draw]]):
    r"""
    Batches for `DataLoader(batch_sampler=...)`. Each global batch is spread evenly over the processes, in order; where
    it does not divide, the last processes get a padding row, which is no neighbor of anyone and has no loss.

    Args:
        batch_size (`int`):
            Images of a global batch, of all processes together.
        seed (`int`, *optional*, defaults to 0):
            Of the order and of the augmentation.
        num_unlabeled (`int`, *optional*, defaults to 0):
            Images without labels, whose rows in the data set follow those of the others.
        unlabeled_per_batch (`int`, *optional*, defaults to 0):
            How many of them, drawn at random, come to each global batch besides.
        num_processes (`int`, *optional*, defaults to 1), process_index (`int`, *optional*, defaults to 0):
            The process that the batches are for.
    """

    num_rows: int  # of images with labels

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        num_unlabeled: int = 0,
        unlabeled_per_batch: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        if batch_size < num_processes:
            raise UserError(
                f"A batch of {batch_size} images cannot be spread over {num_processes} processes: raise the batch "
                "size, or use fewer processes."
            )
        if unlabeled_per_batch > num_unlabeled:
            raise UserError(
                f"Batches cannot have {unlabeled_per_batch} of {num_unlabeled} unlabeled images: lower that number."
            )
        self.batch_size, self.seed = batch_size, seed
        self.num_unlabeled, self.unlabeled_per_batch = num_unlabeled, unlabeled_per_batch
        self.num_processes, self.process_index = num_processes, process_index
        self.epoch = 0

    def set_epoch(self, epoch: int):
        """Chooses the epoch that the next iteration draws, from 0."""
        self.epoch = epoch

    @abstractmethod
    def draw_batches(self, generator: np.random.Generator) -> Sequence[np.ndarray]:
        """Row numbers of each global batch of an epoch."""

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches = self.draw_batches(generator)
        for rows in batches:
            draws = self._own_draws(rows, generator)
            if self.unlabeled_per_batch:
                chosen = generator.choice(self.num_unlabeled, self.unlabeled_per_batch, replace=False)
                draws += self._own_draws(self.num_rows + chosen, generator)
            yield draws

    def _own_draws(self, rows: np.ndarray, generator: np.random.Generator) -> list[Draw]:
        seeds = generator.integers(2**63, size=len(rows))
        share = math.ceil(len(rows) / self.num_processes)
        own = np.array_split(np.arange(len(rows)), self.num_processes)[self.process_index]
        draws = [Draw(int(rows[place]), int(seeds[place])) for place in own]
        return draws + [Draw(int(rows[0]), int(seeds[0]), is_padding=True)] * (share - len(own))


class ShuffledSampler(NeighborhoodSampler):
    r"""
    Every image once an epoch, in random order.

    Args:
        num_rows (`int`):
            Images of the data set.
        drop_last (`bool`, *optional*, defaults to `False`):
            `False`: the epoch is spread over ceil(num_rows / batch_size) batches of equal size, give or take one, so
            that no neighborhood is left with a few images. `True`: all batches are full and the rest of the epoch
            is left out.
    """

    def __init__(self, num_rows: int, batch_size: int, *, drop_last: bool = False, **kwargs):
        super().__init__(batch_size, **kwargs)
        self.num_rows, self.drop_last = num_rows, drop_last
        if len(self) == 0:
            raise UserError(
                f"There are {num_rows} training images, fewer than a batch of {batch_size}: lower the batch size, "
                "or leave `dataloader_drop_last` off."
            )
        if num_rows // len(self) < self.num_processes:
            raise UserError(
                f"{num_rows} training images make {len(self)} batches of {num_rows // len(self)}, which cannot be "
                f"spread over {self.num_processes} processes: raise the batch size, or use fewer processes."
            )

    def __len__(self) -> int:
        return self.num_rows // self.batch_size if self.drop_last else math.ceil(self.num_rows / self.batch_size)

    def draw_batches(self, generator: np.random.Generator) -> Sequence[np.ndarray]:
        rows = generator.permutation(self.num_rows)
        if self.drop_last:
            rows = rows[: len(self) * self.batch_size]
        return np.array_split(rows, len(self))


class BalancedSampler(NeighborhoodSampler):
    r"""
    Every class equally often: classes are drawn in random order round after round, and of each class its images in
    random order, again from the start when they have all been drawn. An epoch has as many batches as the data fill.

    Args:
        labels (`Sequence[int]`):
            Class of each image.
        images_per_class (`int`, *optional*, defaults to 1):
            Images of a class that come into a batch together: K of P x K batches, with P = batch_size / K classes. A
            neighbor is then often of the same class, which it seldom is at test.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, *, images_per_class: int = 1, **kwargs):
        super().__init__(batch_size, **kwargs)
        classes = np.asarray(labels)
        self.rows_by_class = [np.flatnonzero(classes == label) for label in np.unique(classes)]
        self.num_rows, self.images_per_class = len(labels), images_per_class
        if images_per_class < 1 or batch_size % images_per_class:
            raise UserError(
                f"Batches of {batch_size} images cannot hold {images_per_class} of each class: make the batch size "
                "a multiple of `images_per_class`."
            )
        if images_per_class > 1 and batch_size // images_per_class > len(self.rows_by_class):
            raise UserError(
                f"Batches of {batch_size} images, {images_per_class} of each class, need "
                f"{batch_size // images_per_class} classes, but there are {len(self.rows_by_class)}: raise "
                "`images_per_class` or lower the batch size."
            )

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def draw_batches(self, generator: np.random.Generator) -> Sequence[np.ndarray]:
        num_turns = self.batch_size // self.images_per_class
        turns = _rounds(len(self.rows_by_class), [num_turns] * len(self), generator)
        rows = np.empty((len(turns), self.images_per_class), dtype=np.int64)
        for label, own in enumerate(self.rows_by_class):
            is_own = turns == label
            sizes = is_own.reshape(len(self), num_turns).sum(1) * self.images_per_class
            order = _rounds(len(own), sizes[sizes > 0], generator)
            rows[is_own] = own[order].reshape(-1, self.images_per_class)
        return list(rows.reshape(len(self), self.batch_size))


def _rounds(number: int, lengths: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Permutations of 0..number-1, one after the other, cut into runs of these lengths. In a run, no number comes
    again before all have come: a permutation that begins in its middle begins with those that the run has not had."""
    order: list[int] = []
    waiting: list[int] = []  # the rest of the permutation
    for length in lengths:
        run: list[int] = []
        while len(run) < length:
            needed = length - len(run)
            if not waiting:
                permutation = generator.permutation(number).tolist()
                had = set(run[len(run) // number * number :])
                fresh = [value for value in permutation if value not in had][:needed]
                first = set(fresh)
                waiting = fresh + [value for value in permutation if value not in first]
            run, waiting = run + waiting[:needed], waiting[needed:]
        order += run
    return np.array(order, dtype=np.int64)
