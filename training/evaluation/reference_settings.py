# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Chooses, on held-out images, how a model attends to its references."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from rich.progress import track
from torch import nn
from transformers import EvalPrediction

from modeling_rbi import RBIForImageClassification

from .bootstrap import Bootstrap, interval
from .classifiers import predict_from
from .features import CachedImages
from .metrics import compute_metrics
from .protocols import Predictions


# With fewer held-out images, the best settings are a matter of chance, so the model keeps its settings.
MIN_FOR_FIT = 100
SHARES = (0.25, 0.5)
# Pairs of temperature and gain.
KERNELS = ((0.1, 0.25), (0.2, 0.5), (0.2, 1.0), (0.3, 0.5), (0.3, 1.0), (0.5, 0.5), (0.5, 1.0))
VOTE_WEIGHTS = (0.0, 0.5)
# Factors of the logits. Each candidate gets its best factor, so that confidence does not decide the comparison.
_CONFIDENCES = [2.0 ** (step / 2) for step in range(-8, 7)]
_STEP = 256
# Probability of accepting settings that are no better than no relations.
_CHANCE = 0.05


@dataclass(frozen=True)
class ReferenceSettings:
    """How an image attends to references. `share` is `None` if it does not."""

    share: float | None = None
    temperature: float | None = None
    gain: float | None = None
    vote_weight: float = 0.0

    def apply(self, model: RBIForImageClassification):
        """Writes the settings to the model's config; does nothing if `share` is `None`."""
        if self.share is not None:
            model.config.reference_share = self.share
            model.config.reference_temperature, model.config.reference_gain = self.temperature, self.gain
            model.config.reference_vote_weight = self.vote_weight

    @classmethod
    def of(cls, model: RBIForImageClassification) -> "ReferenceSettings":
        """Reads the settings from the model's config."""
        config = model.config
        return cls(
            config.reference_share,
            config.reference_temperature,
            config.reference_gain,
            config.reference_vote_weight,
        )


@dataclass(frozen=True)
class Candidate:
    """Settings and their results on the held-out images."""

    settings: ReferenceSettings
    scope: str
    metrics: dict[str, float]
    loss: float  # mean negative log-likelihood at the best confidence
    advantage: float  # loss without relations minus this loss
    advantage_error: float  # standard error of the advantage


def candidates_for(model: RBIForImageClassification) -> list[ReferenceSettings]:
    """Settings to choose from: temperatures and gains if the head has them, votes if references have labels."""
    kernels: Sequence[tuple[float | None, float | None]] = [(None, None)]
    if model.config.attention_type == "cosine":
        references = model.describe_references()
        has_gain = model.config.relation_position_encoding == "bias" and references["has_images"]
        kernels = KERNELS if has_gain else [(temperature, None) for temperature in sorted({tau for tau, _ in KERNELS})]
    votes = VOTE_WEIGHTS if model.describe_references()["num_labeled"] else VOTE_WEIGHTS[:1]
    return [
        ReferenceSettings(share, temperature, gain, vote)
        for share, (temperature, gain), vote in itertools.product(SHARES, kernels, votes)
    ]


def scores_with_references(
    model: RBIForImageClassification,
    images: CachedImages,
    scope: str,
    rows: torch.Tensor | None = None,
    exclude_self: bool = True,
) -> torch.Tensor:
    """Logits, `(n, num_labels)`, of these rows, by default of all images, in this relation scope; see
    [`predict_from`]."""
    predict = predict_from(model, images, exclude_self=exclude_self)
    rows = torch.arange(len(images.labels)) if rows is None else rows
    return torch.cat([predict(step, scope) for step in rows.split(_STEP)])


def fit_references(
    model: RBIForImageClassification,
    held_out: CachedImages,
    candidates: Sequence[ReferenceSettings],
    progress: bool = False,
) -> list[Candidate]:
    r"""
    Measures settings on held-out images. The model is not changed.

    Args:
        model (`RBIForImageClassification`):
            Model with a bank.
        held_out (`CachedImages`):
            Images as expected in use, which were not trained on and are not in the bank.
        candidates (`Sequence[ReferenceSettings]`):
            Settings to measure.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        The model without relations, followed by the candidates in order. The best has the lowest `loss`, the negative
        log-likelihood after a factor of the logits was fitted, since relations also change the model's confidence.
    """
    names = ("reference_share", "reference_temperature", "reference_gain", "reference_vote_weight")
    before = {name: getattr(model.config, name) for name in names}
    results: list[Candidate] = []
    without_relations = torch.zeros(())
    try:
        for settings in track(
            [ReferenceSettings(), *candidates], "Trying settings", transient=True, disable=not progress
        ):
            settings.apply(model)
            scope = "self" if settings.share is None else "reference"
            scores = scores_with_references(model, held_out, scope)
            by_factor = [
                nn.functional.cross_entropy(factor * scores, held_out.labels, reduction="none")
                for factor in _CONFIDENCES
            ]
            losses = min(by_factor, key=lambda each: each.mean().item()).double()
            without_relations = without_relations if results else losses
            advantages = without_relations - losses
            metrics = compute_metrics(EvalPrediction(scores.numpy(), held_out.labels.numpy()))
            error = advantages.std().item() / len(losses) ** 0.5
            results.append(Candidate(settings, scope, metrics, losses.mean().item(), advantages.mean().item(), error))
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    return results


def is_better(candidate: Candidate, num_candidates: int) -> bool:
    """Whether the best of `num_candidates` has a significantly lower loss than no relations (Bonferroni)."""
    least = NormalDist().inv_cdf(1 - _CHANCE / num_candidates)
    return candidate.scope == "reference" and candidate.advantage > least * candidate.advantage_error


def paired_gain(
    model: RBIForImageClassification, held_out: CachedImages, name: str = "accuracy", seed: int = 0
) -> tuple[float, float, float]:
    """Gain of `reference` over `single` and its 95 % interval, `(value, low, high)`, in points."""
    single, reference = (
        Predictions.from_scores(scores_with_references(model, held_out, scope), held_out.labels)
        for scope in ("self", "reference")
    )
    bootstrap = Bootstrap(held_out.labels, seed=seed)
    value = reference.metrics[0][name] - single.metrics[0][name]
    gain = interval(name, value, bootstrap.metrics(reference)[name] - bootstrap.metrics(single)[name], least=-1.0)
    return 100 * gain.value, 100 * gain.low, 100 * gain.high
