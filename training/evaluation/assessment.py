# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures a model under each protocol, with intervals and paired differences."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tqdm import tqdm

from .bootstrap import LEVEL, METRICS, Bootstrap, Estimate, interval, mean_metrics
from .protocols import Condition, Predict, Predictions, count_orders, in_batches, measure, orders


# Differences of protocols; `_say` interprets them.
DIFFERENCES = {
    "leak": ("sorted", "shuffled"),
    "shuffled": ("shuffled", "single"),
    "reference": ("reference", "single"),
}
# The first of these protocols that was measured gives the confusion matrix and the confused pairs.
_MOST_TELLING = ("reference", "single", "shuffled", "sorted")


@dataclass(frozen=True)
class Finding:
    r"""
    What a difference of accuracies means, in words, and the evidence: its interval, and the number of images that are
    right under one protocol and wrong under the other.
    """

    sentence: str
    batch_size: int | None
    accuracy: Estimate
    level: float
    images_changed: float


@dataclass(frozen=True)
class Assessment:
    """Predictions, metrics and their differences (`first - second`), as fractions in [0, 1]."""

    labels: torch.Tensor  # (n,)
    predictions: dict[Condition, Predictions]
    metrics: dict[Condition, dict[str, Estimate]]
    differences: dict[tuple[Condition, Condition], dict[str, Estimate]]
    findings: dict[str, Finding]

    @property
    def most_telling(self) -> Condition:
        """Condition of a deployed model if it was measured, otherwise the largest batches."""
        protocol = next(name for name in _MOST_TELLING if any(name == each.protocol for each in self.predictions))
        return max(
            (each for each in self.predictions if each.protocol == protocol), key=lambda each: each.batch_size or 0
        )


def assess(
    predict: Predict,
    labels: torch.Tensor,
    protocols: Sequence[str],
    batch_sizes: Sequence[int],
    num_shuffles: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Assessment:
    r"""
    Measures under each protocol, with intervals and paired differences.

    Args:
        predict (`Predict`):
            Computes the logits of a batch.
        labels (`torch.LongTensor` of shape `(n,)`):
            Class numbers of the images in the logits.
        protocols (`Sequence[str]`), batch_sizes (`Sequence[int]`), num_shuffles (`int`):
            As in [`measure`].
        resamples (`int`, *optional*, defaults to 1000):
            Number of resamples of the [`Bootstrap`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the shuffles and resamples.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar if standard error is a terminal.

    Raises:
        UserError: as [`check_sizes`].
    """
    num_orders = count_orders(protocols, batch_sizes, num_shuffles)
    disable = not (progress and sys.stderr.isatty())
    with tqdm(total=num_orders, desc="Protocols", unit=" orders", leave=False, disable=disable) as bar:
        predictions = measure(predict, labels, protocols, batch_sizes, num_shuffles, seed, on_order=bar.update)
    values = {condition: mean_metrics(each) for condition, each in predictions.items()}
    # `sorted` has a single order, so its batches are resampled, also for its difference to `shuffled`.
    bootstraps: dict[int | None, Bootstrap] = {None: Bootstrap(labels, resamples, seed)}
    for condition in predictions:
        if condition.protocol == "sorted" and condition.batch_size is not None:
            (order,) = orders("sorted", labels, num_shuffles, seed)
            groups = in_batches(order, condition.batch_size)
            bootstraps[condition.batch_size] = Bootstrap(labels, resamples, seed, groups)

    @cache
    def resampled(condition: Condition, batches: int | None) -> dict[str, torch.Tensor]:
        return bootstraps[batches].metrics(predictions[condition])

    def estimate(condition: Condition, name: str) -> Estimate:
        batches = condition.batch_size if condition.protocol == "sorted" else None
        return interval(
            name,
            values[condition][name],
            resampled(condition, batches)[name],
            degrees_of_freedom=bootstraps[batches].degrees_of_freedom,
        )

    def difference(first: Condition, second: Condition, name: str, level: float = LEVEL) -> Estimate:
        batches = first.batch_size if first.protocol == "sorted" else None
        return interval(
            name,
            values[first][name] - values[second][name],
            resampled(first, batches)[name] - resampled(second, batches)[name],
            level,
            least=-1,
            degrees_of_freedom=bootstraps[batches].degrees_of_freedom,
        )

    metrics = {
        condition: {name: estimate(condition, name) for name in METRICS}
        for condition in tqdm(predictions, desc="Intervals", leave=False, disable=disable)
    }
    differences: dict[tuple[Condition, Condition], dict[str, Estimate]] = {}
    findings = {}
    for kind, (first_protocol, second_protocol) in DIFFERENCES.items():
        pairs = [
            (first, second)
            for first in predictions
            for second in predictions
            if (first.protocol, second.protocol) == (first_protocol, second_protocol)
            and second.batch_size in (None, first.batch_size)
        ]
        differences |= {pair: {name: difference(*pair, name) for name in METRICS} for pair in pairs}
        if pairs:
            # The clearest of several batch sizes is reported, so the level is corrected for their number (Bonferroni).
            pair = max(pairs, key=lambda pair: differences[pair]["accuracy"].clarity)
            level = 1 - (1 - LEVEL) / len(pairs)
            accuracy = difference(*pair, "accuracy", level)
            right, right_before = ((predictions[each].classes == labels).double().mean(0) for each in pair)
            changed = (right - right_before).abs().sum().item()
            sentence = _say(kind, accuracy, level, changed, pair[0].batch_size, len(pairs))
            findings[kind] = Finding(sentence, pair[0].batch_size, accuracy, level, changed)
    return Assessment(labels, predictions, metrics, differences, findings)


def _say(
    kind: str, accuracy: Estimate, level: float, changed: float, batch_size: int | None, num_batch_sizes: int
) -> str:
    """Says what a difference of accuracies means."""
    value, low, high = (100 * number for number in (accuracy.value, accuracy.low, accuracy.high))
    amount = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if batch_size is not None:
        amount += f" at batch size {batch_size}"
    if num_batch_sizes > 1:
        amount += f" (the clearest of {num_batch_sizes} batch sizes, with an interval that allows for the choice)"
    doubt = None
    if changed == 0:
        doubt = "no image changed between right and wrong"
    elif accuracy.contains_zero:
        doubt = "the interval contains 0"
    elif changed < math.log2(2 / (1 - level)):
        # Even if all of them changed in the same direction, a sign test would not be significant.
        doubt = f"{changed:.1f} images changed between right and wrong, too few to tell"
    if kind == "leak":
        if doubt:
            return f"No leak seen: class-ordered batches change the accuracy by {amount}; {doubt}."
        if accuracy.low > 0:
            return (
                f"Class-ordered batches add {amount}: the model reads labels off its neighbors, so `sorted` does not "
                "measure its accuracy."
            )
        return f"No leak, but class-ordered batches cost {amount}: predictions depend on the order of the images."
    neighbors = "random batches" if kind == "shuffled" else "the references"
    change = f"compared with no neighbors, {neighbors} change the accuracy by {amount}"
    if doubt:
        return f"Whether relations help is open: {change}; {doubt}."
    return f"Relations {'help' if accuracy.low > 0 else 'harm'}: {change}."
