# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Samplers of training batches: for RBI, the batch is the neighborhood.

All samplers draw the same global batches on any number of processes, each of which gets its share of every batch. The
draws depend only on the seed and the epoch, so a resumed training gets the same batches.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from modeling_rbi import UserError


class Draw(NamedTuple):
    """An image of a batch: its row in the data set and the seed of its augmentation. Padding repeats an image."""

    row: int
    seed: int
    is_padding: bool = False


class NeighborhoodSampler(torch.utils.data.Sampler[list[Draw]]):
    r"""
    Base class of samplers for `DataLoader(batch_sampler=...)`. Each global batch is spread evenly over the processes,
    in order. If it does not divide evenly, the last processes get a padding row, which is no neighbor of any image and
    has no loss.

    Args:
        batch_size (`int`):
            Number of labeled images in a global batch, over all processes.
        seed (`int`, *optional*, defaults to 0):
            Random seed of the order and the augmentation.
        num_unlabeled (`int`, *optional*, defaults to 0):
            Number of unlabeled images. Their rows in the data set follow the labeled ones.
        unlabeled_per_batch (`int`, *optional*, defaults to 0):
            Number of unlabeled images, drawn at random, that are added to each global batch.
        num_processes (`int`, *optional*, defaults to 1):
            Number of processes.
        process_index (`int`, *optional*, defaults to 0):
            Index of the process that the batches are for.

    Raises:
        UserError: if a batch has fewer images than there are processes, or more unlabeled images than exist.
    """

    num_rows: int  # labeled images

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
        """Sets the epoch of the next iteration, counted from 0."""
        self.epoch = epoch

    @abstractmethod
    def draw_batches(self, generator: np.random.Generator) -> Sequence[np.ndarray]:
        """Row numbers of the labeled images in each global batch of an epoch."""

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
    Draws every image once per epoch, in random order.

    Args:
        num_rows (`int`):
            Number of labeled images.
        drop_last (`bool`, *optional*, defaults to `False`):
            `False`: the epoch is divided into ceil(num_rows / batch_size) batches whose sizes differ by at most one,
            so that no neighborhood has only a few images. `True`: all batches are full, and the rest of the epoch is
            left out.

    Raises:
        UserError: if the images do not fill a batch, or a batch has fewer images than there are processes.
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
    Draws every class equally often. Classes come in random order, round after round. The images of a class come in
    random order, too, and start again when all have been drawn. An epoch has ceil(num_images / batch_size) batches.

    Args:
        labels (`Sequence[int]`):
            Class of each image.
        images_per_class (`int`, *optional*, defaults to 1):
            Number of images of a class that come into a batch together: K of P x K batches, with P = batch_size / K
            classes. Neighbors then often share the class of an image, which is rare at test time.

    Raises:
        UserError: if `images_per_class` does not divide the batch size, or there are too few classes.
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
    """Consecutive permutations of 0..number-1, cut into runs of these lengths. Within a run, no number repeats before
    all have come: a permutation that begins inside a run starts with the numbers that the run does not have yet."""
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
