# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Intervals for metrics and for differences between protocols, by a bootstrap over images and orders."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch

from .metrics import METRIC_TITLES, NUM_CALIBRATION_BINS
from .protocols import Predictions


LEVEL = 0.95
METRICS = tuple(METRIC_TITLES)
_MEANS = ("accuracy", "top5_accuracy")
# Numbers, of images times resamples, that are worked on at a time.
_CHUNK = 2**23
_DECIMALS = 9


@dataclass(frozen=True)
class Estimate:
    """A metric, or a difference of two, and its interval."""

    value: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def clarity(self) -> float:
        """How far it is from 0, in widths of the interval."""
        return abs(self.value) / max(self.high - self.low, 1e-9)


class Bootstrap:
    r"""
    Draws the images anew, with replacement, the same ones for all predictions, so that differences are paired.

    Where a protocol has s random orders, s - 1 of them are drawn with replacement as well, independently of the
    images. Drawing s would make their variance too small by the factor (s - 1) / s; that of a single image's
    answer over the orders counts somewhat too much, so the interval is rather too wide than too narrow.

    Where answers stand in one order alone, whole batches are drawn (`groups`): what a batch has in common, such as the
    mean that all its images attend to, makes them right or wrong together, the more so if they share a class. k - 1
    of k batches are drawn, and the interval is wider by the ratio of Student's t with k - 1 degrees of freedom to the
    normal distribution. (In simulations without a leak, where a batch has nothing but its noise in common, 4 to 9 % of
    such intervals of `sorted - shuffled` exclude 0; of intervals over images, up to 46 %.)

    The interval is that of the percentiles; of macro-F1 and calibration error, which are no means, less twice the bias
    of the resamples: they are off the estimate there, to the same side and about as far as the estimate is off the
    truth, and percentiles alone would double what this corrects. It covers the truth too seldom where there is little
    to draw from: an accuracy of less than about five errors (without any, the interval is a point), macro-F1 with one
    or two images of a class, and the calibration error of a model that has none, since every estimate is above 0.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the images.
        num_resamples (`int`, *optional*, defaults to 1000):
            How often to draw.
        seed (`int`, *optional*, defaults to 0):
            Of the draws.
        groups (`Sequence[torch.LongTensor]`, *optional*):
            Row numbers of the images that are drawn together; every image is in one. By default each by itself.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        num_resamples: int = 1000,
        seed: int = 0,
        groups: Sequence[torch.Tensor] | None = None,
    ):
        self.labels, self.seed = labels, seed
        self.degrees_of_freedom = None if groups is None else max(1, len(groups) - 1)
        rng = np.random.default_rng(seed)
        num_units = len(labels) if groups is None else len(groups)
        counts = np.empty((num_units, num_resamples), dtype=np.uint8)
        for resample in range(num_resamples):
            units = rng.integers(num_units, size=self.degrees_of_freedom or num_units)
            counts[:, resample] = np.bincount(units, minlength=num_units)
        # How often each image is drawn, (n, num_resamples).
        self.counts = torch.from_numpy(counts)
        if groups is not None:
            sizes = torch.tensor([len(group) for group in groups])
            of_rows = self.counts.repeat_interleave(sizes, dim=0)
            self.counts = torch.empty_like(of_rows).index_copy_(0, torch.cat(list(groups)), of_rows)

    def metrics(self, predictions: Predictions) -> dict[str, torch.Tensor]:
        """Each of `METRICS` in each resample, `(num_resamples,)`."""
        num_orders, num_resamples = len(predictions.classes), self.counts.shape[1]
        size = max(1, _CHUNK // len(self.labels))
        by_order = torch.stack(
            [
                torch.cat(
                    [self._metrics(predictions, order, counts.float()) for counts in self.counts.split(size, dim=1)], 1
                )
                for order in range(num_orders)
            ]
        )  # (s, len(METRICS), num_resamples)
        rng, num_drawn = np.random.default_rng([self.seed, num_orders]), max(1, num_orders - 1)
        draws = rng.multinomial(num_drawn, np.full(num_orders, 1 / num_orders), size=num_resamples)
        resampled = torch.einsum("smr,rs->mr", by_order.double(), torch.from_numpy(draws / num_drawn))
        return dict(zip(METRICS, resampled, strict=True))

    def _metrics(self, predictions: Predictions, order: int, counts: torch.Tensor) -> torch.Tensor:
        r"""
        `METRICS` of one order, `(len(METRICS), r)`, where each image occurs `counts` times, `(n, r)`. Sums over the
        images give all resamples at once; the modules of `metrics` would need a pass over the scores for each of the r
        resamples. The tests compare both.
        """
        classes, confidences = predictions.classes[order], predictions.confidences[order]
        is_right, num_drawn = (classes == self.labels).float(), counts.sum(0)

        def sums(groups: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
            return values.new_zeros(num_groups, values.shape[1]).index_add_(0, groups, values)

        right = sums(self.labels, counts * is_right[:, None], predictions.num_classes)
        # The last is no answer, of which there is no F1.
        both = sums(torch.cat([classes, self.labels]), counts.repeat(2, 1), predictions.num_classes + 1)[:-1]
        occurs = both > 0
        if self.degrees_of_freedom is not None:
            # Whole classes are missing from a draw of batches: those that were answered with them are wrong, but
            # these classes are not missed.
            labeled = sums(self.labels, torch.ones_like(counts), predictions.num_classes) > 0
            occurs &= (sums(self.labels, counts, predictions.num_classes) > 0) | ~labeled
        f1 = (2 * right / both.clamp(min=1)).where(occurs, 0.0).sum(0) / occurs.sum(0)
        bins = (confidences * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
        gaps = sums(bins, counts * (confidences - is_right)[:, None], NUM_CALIBRATION_BINS)
        hits = torch.stack([is_right, predictions.in_top_k[order].float()]) @ counts
        return torch.cat([hits / num_drawn, f1[None], gaps.abs().sum(0, keepdim=True) / num_drawn])


def mean_metrics(predictions: Predictions) -> dict[str, float]:
    """Each of `METRICS`, the mean over the orders."""
    return {name: sum(metrics[name] for metrics in predictions.metrics) / len(predictions.metrics) for name in METRICS}


def interval(
    metric: str,
    value: float,
    resampled: torch.Tensor,
    level: float = LEVEL,
    least: float = 0.0,
    degrees_of_freedom: int | None = None,
) -> Estimate:
    r"""
    The interval of a bootstrap, see [`Bootstrap`].

    Args:
        metric (`str`):
            Which of `METRICS` it is, or a difference of.
        value (`float`):
            The estimate.
        resampled (`torch.DoubleTensor` of shape `(num_resamples,)`):
            The same of the resamples.
        level (`float`, *optional*, defaults to 0.95):
            Its coverage.
        least (`float`, *optional*, defaults to 0):
            The metric is not below; nor is it above 1.
        degrees_of_freedom (`int`, *optional*):
            Those of the [`Bootstrap`].
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    mean = resampled.mean()
    bias = 0.0 if metric in _MEANS else mean - value
    stretch = 1.0
    if degrees_of_freedom is not None:
        stretch = scipy.stats.t.ppf((1 + level) / 2, degrees_of_freedom) / scipy.stats.norm.ppf((1 + level) / 2)
    low, high = (mean + stretch * (resampled.quantile(tails) - mean) - 2 * bias).clamp(least, 1).tolist()
    # What is equal but for the order of its sums is equal.
    return Estimate(*(round(number, _DECIMALS) + 0.0 for number in (value, low, high)))
