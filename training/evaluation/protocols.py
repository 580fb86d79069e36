# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation protocols, which differ in the neighbors of a test image.

`single`: no neighbors, as in a deployed model without references. `reference`: the references in the model's bank, as
in a deployed model that has them. `shuffled`: a random batch of the test set, the paper's setting. `sorted`: a
class-ordered batch, whose images mostly share a label; a gain over `shuffled` is a leak of labels through the
neighbors, not accuracy.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import EvalPrediction

from modeling_rbi import UserError

from .metrics import compute_metrics


# Takes row numbers, (n,), and a relation scope; returns the logits, (n, num_labels), of these images as one batch.
Predict = Callable[[torch.Tensor, str], torch.Tensor]

# Relation scope of each protocol.
PROTOCOLS = {"single": "self", "reference": "reference", "shuffled": "batch", "sorted": "batch"}
# Protocols under which a prediction depends on the rest of the batch.
BATCH_PROTOCOLS = ("shuffled", "sorted")
TOP_K = 5
# Batch size where it does not affect predictions.
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
        """Gain of class-ordered batches: `sorted - shuffled`."""
        return self.sorted - self.shuffled


@dataclass(frozen=True, order=True)
class Condition:
    """A protocol and, if predictions depend on it, the approximate batch size."""

    protocol: str
    batch_size: int | None = None

    def __str__(self) -> str:
        return self.protocol if self.batch_size is None else f"{self.protocol}, batches of {self.batch_size}"


@dataclass(frozen=True)
class Predictions:
    """Predictions for n images in each of s orders of the test set, and the metrics of each order."""

    classes: torch.Tensor  # (s, n); `num_classes` stands for no prediction: scores that are not finite
    in_top_k: torch.Tensor  # (s, n), bool: whether the label is among the best `TOP_K`
    confidences: torch.Tensor  # (s, n): probability of the best class, 1 for no prediction
    metrics: tuple[dict[str, float], ...]  # results of `compute_metrics`
    num_classes: int

    @classmethod
    def from_scores(cls, scores: torch.Tensor, labels: torch.Tensor) -> "Predictions":
        """Predictions of one order, from logits, `(n, num_classes)`, and labels, `(n,)`."""
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
        """Joins the predictions of several orders."""
        return cls(
            classes=torch.cat([order.classes for order in orders]),
            in_top_k=torch.cat([order.in_top_k for order in orders]),
            confidences=torch.cat([order.confidences for order in orders]),
            metrics=tuple(metrics for order in orders for metrics in order.metrics),
            num_classes=orders[0].num_classes,
        )


def in_batches(order: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Splits an order, `(n,)`, into batches of about `batch_size` images, whose sizes differ by at most one."""
    return order.tensor_split(max(1, round(len(order) / batch_size)))


def orders(protocol: str, labels: torch.Tensor, num_shuffles: int, seed: int) -> list[torch.Tensor]:
    """Orders, `(n,)` each, in which a protocol passes over the images. They depend only on the seed."""
    if protocol == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(len(labels), generator=generator) for _ in range(num_shuffles)]
    return [labels.argsort(stable=True) if protocol == "sorted" else torch.arange(len(labels))]


def scores_of(predict: Predict, order: torch.Tensor, batch_size: int, relation_scope: str) -> torch.Tensor:
    """Logits, `(n, num_labels)`, by row number, computed in batches of this size in this order."""
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
    Predicts under each protocol, at each batch size if it matters.

    Args:
        predict (`Predict`):
            Computes the logits of a batch.
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the images.
        protocols (`Sequence[str]`):
            Keys of `PROTOCOLS`.
        batch_sizes (`Sequence[int]`):
            Approximate numbers of images that attend to each other.
        num_shuffles (`int`, *optional*, defaults to 5):
            Number of random orders of `shuffled`, at least 2. They are the same at every batch size.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random orders.
        on_order (`Callable`, *optional*):
            Called after each order. There are [`count_orders`] in total.

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
    """All conditions to measure, in the order of `PROTOCOLS`."""
    return [
        Condition(protocol, batch_size)
        for protocol in PROTOCOLS
        if protocol in protocols
        for batch_size in (batch_sizes if protocol in BATCH_PROTOCOLS else [None])
    ]


def count_orders(protocols: Sequence[str], batch_sizes: Sequence[int], num_shuffles: int) -> int:
    """Number of passes over the images."""
    return sum(
        num_shuffles if condition.protocol == "shuffled" else 1 for condition in conditions_of(protocols, batch_sizes)
    )


def check_sizes(num_images: int, batch_sizes: Sequence[int], num_shuffles: int):
    r"""
    Raises:
        UserError: if there are no images, a batch size is less than 2 or exceeds the number of images, or
            `num_shuffles` is less than 2.
    """
    if not num_images:
        raise UserError("There are no images to evaluate on.")
    if num_shuffles < 2:
        raise UserError(f"`num_shuffles` must be at least 2, got {num_shuffles}.")
    for batch_size in batch_sizes:
        if batch_size < 2:
            raise UserError(
                f"A batch size must be at least 2, got {batch_size}: for single images, use the protocol `single`."
            )
        if batch_size > num_images:
            raise UserError(f"The batch size {batch_size} is more than the {num_images} images: leave it out.")


def evaluate_protocols(
    predict: Predict, rows: torch.Tensor, labels: torch.Tensor, batch_size: int, num_shuffles: int = 5, seed: int = 0
) -> ProtocolAccuracies:
    r"""
    Accuracies under the protocols `single`, `shuffled` and `sorted`.

    Args:
        predict (`Predict`):
            Computes the logits of a batch.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the test images.
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of these images.
        batch_size (`int`):
            Approximate number of images that attend to each other. Batch sizes differ by at most one.
        num_shuffles (`int`, *optional*, defaults to 5):
            Number of random orders, at least 2.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random orders.

    Raises:
        UserError: as [`check_sizes`], but a `batch_size` above the number of images means one batch.
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
