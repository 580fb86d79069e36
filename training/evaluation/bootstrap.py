# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of metrics and of differences between protocols, by a bootstrap over images and orders."""

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
# Images times resamples per step.
_CHUNK = 2**23
# Results that differ only by the order of summation become equal.
_DECIMALS = 9


@dataclass(frozen=True)
class Estimate:
    """A metric, or the difference between two conditions, with its interval."""

    value: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def clarity(self) -> float:
        """Distance of the value from 0, in widths of the interval."""
        return abs(self.value) / max(self.high - self.low, 1e-9)


class Bootstrap:
    r"""
    Resamples the images with replacement. All predictions share the resamples, so differences are paired.

    For a protocol with s random orders, each resample also draws s - 1 orders with replacement, independently of the
    images. Drawing s would make their variance too small by the factor (s - 1) / s. The variance of each image's
    prediction over the orders counts slightly too much, so intervals are, if anything, too wide.

    For a protocol with one order, whole batches are resampled (`groups`): what a batch shares, such as the mean that
    all its images attend to, makes them right or wrong together, the more so if they share a class. Each resample
    draws k - 1 of k batches, and the interval is widened by the ratio of the quantiles of Student's t, with k - 1
    degrees of freedom, and of the normal distribution. In simulations without a leak, where a batch shares only its
    noise, 4 to 9 % of these intervals of `sorted - shuffled` exclude 0; resampling images, up to 46 % do.

    Intervals are percentiles of the resamples. For macro-F1 and calibration error, which are not means, twice the bias
    of the resamples is subtracted: a resample deviates from the estimate in the same direction, and about as far, as
    the estimate deviates from the truth, so plain percentiles would contain this bias twice. Intervals cover the truth
    too rarely for an accuracy with fewer than about five errors (without errors, the interval is a point), for
    macro-F1 with one or two images of a class, and for the calibration error of a perfectly calibrated model, since
    every estimate is above 0.

    Args:
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the images.
        num_resamples (`int`, *optional*, defaults to 1000):
            Number of resamples.
        seed (`int`, *optional*, defaults to 0):
            Random seed.
        groups (`Sequence[torch.LongTensor]`, *optional*):
            Row numbers of the images that are drawn together; every image is in one group. By default, images are
            drawn independently.
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
        # How often each resample contains each image, (n, num_resamples).
        self.counts = torch.from_numpy(counts)
        if groups is not None:
            sizes = torch.tensor([len(group) for group in groups])
            by_group = self.counts.repeat_interleave(sizes, dim=0)
            self.counts = torch.empty_like(by_group).index_copy_(0, torch.cat(list(groups)), by_group)

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
        `METRICS` of one order in r resamples, `(len(METRICS), r)`. `counts`, `(n, r)`, tells how often each resample
        contains each image. Sums over the images give all resamples at once; the modules of `metrics` would need one
        pass over the scores per resample. The tests compare both.
        """
        classes, confidences = predictions.classes[order], predictions.confidences[order]
        is_right, num_drawn = (classes == self.labels).float(), counts.sum(0)

        def sums(groups: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
            return values.new_zeros(num_groups, values.shape[1]).index_add_(0, groups, values)

        right = sums(self.labels, counts * is_right[:, None], predictions.num_classes)
        # The last class stands for no prediction and has no F1.
        both = sums(torch.cat([classes, self.labels]), counts.repeat(2, 1), predictions.num_classes + 1)[:-1]
        occurs = both > 0
        if self.degrees_of_freedom is not None:
            # A resample of batches may lack whole classes. Predictions of such a class are wrong, but the class does
            # not count as missed.
            labeled = sums(self.labels, torch.ones_like(counts), predictions.num_classes) > 0
            occurs &= (sums(self.labels, counts, predictions.num_classes) > 0) | ~labeled
        f1 = (2 * right / both.clamp(min=1)).where(occurs, 0.0).sum(0) / occurs.sum(0)
        bins = (confidences * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
        gaps = sums(bins, counts * (confidences - is_right)[:, None], NUM_CALIBRATION_BINS)
        hits = torch.stack([is_right, predictions.in_top_k[order].float()]) @ counts
        return torch.cat([hits / num_drawn, f1[None], gaps.abs().sum(0, keepdim=True) / num_drawn])


def mean_metrics(predictions: Predictions) -> dict[str, float]:
    """Mean of each of `METRICS` over the orders."""
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
    Bootstrap interval of a metric or of a difference; see [`Bootstrap`].

    Args:
        metric (`str`):
            Name of the metric, one of `METRICS`.
        value (`float`):
            Estimate from all images.
        resampled (`torch.DoubleTensor` of shape `(num_resamples,)`):
            Estimate from each resample.
        level (`float`, *optional*, defaults to 0.95):
            Coverage of the interval.
        least (`float`, *optional*, defaults to 0):
            Lower bound of the metric or difference. The upper bound is 1.
        degrees_of_freedom (`int`, *optional*):
            `degrees_of_freedom` of the [`Bootstrap`].
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    mean = resampled.mean()
    bias = 0.0 if metric in _MEANS else mean - value
    stretch = 1.0
    if degrees_of_freedom is not None:
        stretch = scipy.stats.t.ppf((1 + level) / 2, degrees_of_freedom) / scipy.stats.norm.ppf((1 + level) / 2)
    low, high = (mean + stretch * (resampled.quantile(tails) - mean) - 2 * bias).clamp(least, 1).tolist()
    return Estimate(*(round(number, _DECIMALS) + 0.0 for number in (value, low, high)))
