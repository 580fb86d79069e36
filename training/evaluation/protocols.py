# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation protocols: who are the neighbors of a test image?

`single`: none, it attends to itself; what a deployed model answers that has no references. `reference`: the references
that the model carries; what it answers if it has. `shuffled`: a random batch of the test set; the paper's setting.
`sorted`: a batch in the order of the classes, whose images mostly share a label; what a model gains there over
`shuffled` is a leak of labels through the neighbors, not accuracy.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import EvalPrediction

from modeling_rbi import UserError

from .metrics import compute_metrics


# Logits, (n, num_labels), of the images with these row numbers, (n,), as one batch in this relation scope.
Predict = Callable[[torch.Tensor, str], torch.Tensor]

# Relation scope of each protocol.
PROTOCOLS = {"single": "self", "reference": "reference", "shuffled": "batch", "sorted": "batch"}
# Those in which an answer depends on who else is in the batch.
BATCH_PROTOCOLS = ("shuffled", "sorted")
TOP_K = 5
# Images at a time where their number changes nothing.
_STEP = 256


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


@dataclass(frozen=True, order=True)
class Condition:
    """A protocol, and about how many images attend to each other in a batch, where it has batches."""

    protocol: str
    batch_size: int | None = None

    def __str__(self) -> str:
        return self.protocol if self.batch_size is None else f"{self.protocol}, batches of {self.batch_size}"


@dataclass(frozen=True)
class Predictions:
    """What a model answers to n images, each in s orders of the test set, and the metrics of each order."""

    classes: torch.Tensor  # (s, n); the number of classes where scores are not finite, which is no answer
    in_top_k: torch.Tensor  # (s, n), bool: whether the label is among the best `TOP_K`
    confidences: torch.Tensor  # (s, n): probability of the best class, 1 for no answer
    metrics: tuple[dict[str, float], ...]  # as `compute_metrics` gives them
    num_classes: int

    @classmethod
    def from_scores(cls, scores: torch.Tensor, labels: torch.Tensor) -> "Predictions":
        """From logits, `(n, num_classes)`, and labels, `(n,)`, of one order."""
        num_classes = scores.shape[1]
        is_valid = scores.isfinite().all(-1)
        best = scores.topk(min(TOP_K, num_classes)).indices
        return cls(
            classes=scores.argmax(-1).where(is_valid, num_classes)[None],
            in_top_k=((best == labels[:, None]).any(-1) & is_valid)[None],
            confidences=scores.softmax(-1).amax(-1).where(is_valid, 1.0)[None],
            metrics=(compute_metrics(EvalPrediction(scores, labels)),),  # type: ignore[arg-type]
            num_classes=num_classes,
        )

    @classmethod
    def stack(cls, orders: Sequence["Predictions"]) -> "Predictions":
        """Joins those of several orders."""
        return cls(
            classes=torch.cat([order.classes for order in orders]),
            in_top_k=torch.cat([order.in_top_k for order in orders]),
            confidences=torch.cat([order.confidences for order in orders]),
            metrics=tuple(metrics for order in orders for metrics in order.metrics),
            num_classes=orders[0].num_classes,
        )


def in_batches(order: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Splits an order of images, `(n,)`, into batches of equal size, give or take one, of about `batch_size`."""
    return order.tensor_split(max(1, round(len(order) / batch_size)))


def orders(protocol: str, labels: torch.Tensor, num_shuffles: int, seed: int) -> list[torch.Tensor]:
    """The orders, `(n,)` each, in which a protocol goes through the images; with the same seed the same."""
    if protocol == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(len(labels), generator=generator) for _ in range(num_shuffles)]
    return [labels.argsort(stable=True) if protocol == "sorted" else torch.arange(len(labels))]


def scores_of(predict: Predict, order: torch.Tensor, batch_size: int, relation_scope: str) -> torch.Tensor:
    """Logits of the images, `(n, num_labels)`, by row number, asked for in this order and batches of this size."""
    scores = torch.cat([predict(batch, relation_scope) for batch in in_batches(order, batch_size)])
    return torch.empty_like(scores).index_copy_(0, order, scores)


def measure(
    predict: Predict,
    labels: torch.Tensor,
    protocols: Sequence[str],
    batch_sizes: Sequence[int],
    num_shuffles: int = 5,
    seed: int = 0,
    on_order: Callable[[], object] = lambda: None,
) -> dict[Condition, Predictions]:
    r"""
    Predictions under each protocol and, if they depend on it, at each batch size.

    Args:
        predict (`Predict`):
            Gives the logits of one batch.
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the images.
        protocols (`Sequence[str]`):
            Keys of `PROTOCOLS`.
        batch_sizes (`Sequence[int]`):
            About how many images attend to each other.
        num_shuffles (`int`, *optional*, defaults to 5):
            Random orders of `shuffled`, the same at every batch size.
        seed (`int`, *optional*, defaults to 0):
            Of the random orders.
        on_order (`Callable`, *optional*):
            Called after each order of the images; there are [`count_orders`] in all.

    Raises:
        UserError: as [`check_sizes`].
    """
    check_sizes(len(labels), batch_sizes, num_shuffles)
    measured = {}
    for condition in conditions_of(protocols, batch_sizes):
        predictions = []
        for order in orders(condition.protocol, labels, num_shuffles, seed):
            scores = scores_of(predict, order, condition.batch_size or _STEP, PROTOCOLS[condition.protocol])
            predictions.append(Predictions.from_scores(scores, labels))
            on_order()
        measured[condition] = Predictions.stack(predictions)
    return measured


def conditions_of(protocols: Sequence[str], batch_sizes: Sequence[int]) -> list[Condition]:
    """What there is to measure, in the order of `PROTOCOLS`."""
    return [
        Condition(protocol, batch_size)
        for protocol in PROTOCOLS
        if protocol in protocols
        for batch_size in (batch_sizes if protocol in BATCH_PROTOCOLS else [None])
    ]


def count_orders(protocols: Sequence[str], batch_sizes: Sequence[int], num_shuffles: int) -> int:
    """How often the images are gone through."""
    return sum(
        num_shuffles if condition.protocol == "shuffled" else 1 for condition in conditions_of(protocols, batch_sizes)
    )


def check_sizes(num_images: int, batch_sizes: Sequence[int], num_shuffles: int):
    r"""
    Raises:
        UserError: if there are no images, fewer than a batch is to have, or fewer than 2 shuffles or images in a
            batch.
    """
    if not num_images:
        raise UserError("There are no images to evaluate on.")
    if num_shuffles < 2:
        raise UserError(f"`num_shuffles` must be at least 2, got {num_shuffles}.")
    for batch_size in batch_sizes:
        if batch_size < 2:
            raise UserError(
                f"A batch size must be at least 2, got {batch_size}: one image alone is the protocol `single`."
            )
        if batch_size > num_images:
            raise UserError(
                f"The batch size {batch_size} is more than the {num_images} images there are: leave it out."
            )


def evaluate_protocols(
    predict: Predict, rows: torch.Tensor, labels: torch.Tensor, batch_size: int, num_shuffles: int = 5, seed: int = 0
) -> ProtocolAccuracies:
    r"""
    Accuracies alone, under the protocols `single`, `shuffled` and `sorted`.

    Args:
        predict (`Predict`):
            Gives the logits of one batch.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the test images.
        labels (`torch.LongTensor` of shape `(n,)`):
            Their classes.
        batch_size (`int`):
            About how many images attend to each other. The batches are made equally large, give or take one.
        num_shuffles (`int`, *optional*, defaults to 5):
            Number of random orders, at least 2.
        seed (`int`, *optional*, defaults to 0):
            Of the random orders.

    Raises:
        UserError: as [`check_sizes`], except that a batch may be all images there are.
    """
    check_sizes(len(rows), [min(batch_size, max(len(rows), 2))], num_shuffles)

    def accuracies(protocol: str) -> list[float]:
        scores = [
            scores_of(lambda batch, scope: predict(rows[batch], scope), order, batch_size, PROTOCOLS[protocol])
            for order in orders(protocol, labels, num_shuffles, seed)
        ]
        return [100 * int((each.argmax(-1) == labels).sum()) / len(labels) for each in scores]

    shuffled = accuracies("shuffled")
    return ProtocolAccuracies(
        single=accuracies("single")[0],
        shuffled=statistics.mean(shuffled),
        shuffled_std=statistics.stdev(shuffled),
        sorted=accuracies("sorted")[0],
    )
