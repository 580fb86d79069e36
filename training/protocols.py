# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation protocols: who are the neighbours of a test picture?

`single`: none, it attends to itself; what a deployed model answers. `shuffled`: a random batch of the test set; the
paper's setting. `sorted`: a batch in the order of the classes, whose pictures mostly share a label; what a model gains
there over `shuffled` is a leak of labels through the neighbours, not accuracy.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


# Logits, (n, num_labels), of the pictures with these row numbers, (n,), as one batch in this relation scope.
Predict = Callable[[torch.Tensor, str], torch.Tensor]


@dataclass(frozen=True)
class ProtocolAccuracies:
    """Accuracies in percent; `shuffled_std` is the standard deviation over the shuffles."""

    single: float
    shuffled: float
    shuffled_std: float
    sorted: float

    @property
    def leak(self) -> float:
        """What a class-ordered batch adds: `sorted - shuffled`."""
        return self.sorted - self.shuffled


def evaluate_protocols(
    predict: Predict, rows: torch.Tensor, labels: torch.Tensor, batch_size: int, num_shuffles: int = 5, seed: int = 0
) -> ProtocolAccuracies:
    r"""
    Accuracies under the protocols `single`, `shuffled` and `sorted`.

    Args:
        predict (`Predict`):
            Gives the logits of one batch.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the test pictures.
        labels (`torch.LongTensor` of shape `(n,)`):
            Their classes.
        batch_size (`int`):
            About how many pictures attend to each other. The batches are made equally large, give or take one.
        num_shuffles (`int`, *optional*, defaults to 5):
            Number of random orders, at least 2.
        seed (`int`, *optional*, defaults to 0):
            Of the random orders.

    Raises:
        ValueError: if there are no pictures, or fewer than 2 shuffles or pictures in a batch.
    """
    if not len(rows):
        raise ValueError("There are no pictures to evaluate on.")
    if num_shuffles < 2 or batch_size < 2:
        raise ValueError(f"`num_shuffles` ({num_shuffles}) and `batch_size` ({batch_size}) must be at least 2.")

    def accuracy(order: torch.Tensor, relation_scope: str) -> float:
        batches = order.tensor_split(max(1, round(len(order) / batch_size)))
        correct = sum((predict(rows[batch], relation_scope).argmax(-1) == labels[batch]).sum() for batch in batches)
        return 100 * int(correct) / len(order)

    generator = torch.Generator().manual_seed(seed)
    shuffled = [accuracy(torch.randperm(len(rows), generator=generator), "batch") for _ in range(num_shuffles)]
    return ProtocolAccuracies(
        single=accuracy(torch.arange(len(rows)), "self"),
        shuffled=statistics.mean(shuffled),
        shuffled_std=statistics.stdev(shuffled),
        sorted=accuracy(labels.argsort(stable=True), "batch"),
    )
