# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Figures of an assessment, as PNG files. They open no window and leave matplotlib's global state unchanged."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from modeling_rbi.errors_rbi import shown_names

from .bootstrap import Estimate
from .metrics import NUM_CALIBRATION_BINS
from .protocols import Predictions


COLORS = {"single": "#444444", "reference": "#0072b2", "shuffled": "#009e73", "sorted": "#d55e00"}
# Most classes with a row of their own in a confusion matrix, and most classes with numbers in the cells.
_MOST_CLASSES = 40
_MOST_NUMBERS = 16
_LONGEST_NAME = 24
_DPI = 150


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes, the number of images of one that are predicted as the other, and example rows of each kind."""

    first: str
    second: str
    first_as_second: float
    second_as_first: float
    rows: dict[str, list[int]]  # "first", "first as second", "second as first", "second"


def short_names(names: Sequence[str]) -> list[str]:
    """Names of classes, in the order of their numbers, that fit into a figure and are all different."""
    return list(shown_names(dict(enumerate(map(_short, names)))).values())


def plot_batch_sizes(path: Path, curves: Mapping[str, Mapping[int | None, Estimate]]):
    r"""
    Plots accuracy over batch size, with bands for the intervals.

    Args:
        path (`Path`):
            File to write.
        curves (mapping of protocols to estimates by batch size):
            The batch size `None` stands for a protocol without batches, drawn as a horizontal line.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({size for points in curves.values() for size in points if size is not None})
    for protocol, points in curves.items():
        level = points.get(None)
        style: dict = {"color": COLORS[protocol], "label": protocol}
        if level is not None:
            axes.axhline(100 * level.value, linestyle="--", **style)
            axes.axhspan(100 * level.low, 100 * level.high, color=COLORS[protocol], alpha=0.1, linewidth=0)
            continue
        value, low, high = ([100 * getattr(points[size], name) for size in sizes] for name in ("value", "low", "high"))
        axes.plot(sizes, value, marker="o", **style)
        if len(sizes) == 1:  # a band would have no width
            errors = [np.subtract(value, low), np.subtract(high, value)]
            axes.errorbar(sizes, value, errors, color=COLORS[protocol], capsize=4)
        else:
            axes.fill_between(sizes, low, high, color=COLORS[protocol], alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images that attend to each other (batch size)")
    axes.set_ylabel("accuracy in %, 95 % intervals")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=_DPI)


def plot_confusion_matrix(path: Path, counts: torch.Tensor, names: Sequence[str], title: str):
    r"""
    Plots a confusion matrix. With more than 40 classes, it shows the 39 with the most errors and groups the others.

    Args:
        path (`Path`):
            File to write.
        counts (`torch.Tensor` of shape `(num_classes, num_classes)`):
            Number of images by class (row) and predicted class (column).
        names (`Sequence[str]`):
            Class names.
        title (`str`):
            Title of the figure.
    """
    ticks = short_names(names)
    if len(names) > _MOST_CLASSES:
        errors = counts - counts.diagonal().diag()
        shown = (
            (errors.sum(0) + errors.sum(1)).argsort(descending=True, stable=True)[: _MOST_CLASSES - 1].sort().values
        )
        group = torch.full((len(names),), len(shown)).index_copy_(0, shown, torch.arange(len(shown)))
        # Sum rows by group, then columns.
        counts = counts.new_zeros(_MOST_CLASSES, len(names)).index_add_(0, group, counts)
        counts = counts.new_zeros(_MOST_CLASSES, _MOST_CLASSES).index_add_(1, group, counts)
        ticks = [*(ticks[row] for row in shown.tolist()), f"{len(names) - len(shown)} others"]
        title += f"\nThe {len(shown)} classes with the most errors"
    side = 3.5 + 0.22 * len(ticks)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    totals = counts.sum(1, keepdim=True)
    # A class that is predicted but has no images has an empty row.
    shares = (counts / totals.clamp(min=1e-9)).where(totals > 0, float("nan"))
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the images of the class")
    places = range(len(ticks))
    axes.set_xticks(places, ticks, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(places, ticks, fontsize=7, parse_math=False)
    if len(ticks) <= _MOST_NUMBERS:
        for row in places:
            for column in places:
                if number := float(counts[row, column]):
                    color = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, f"{number:.3g}", ha="center", va="center", color=color, fontsize=7)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=9, parse_math=False)
    figure.savefig(path, dpi=_DPI)


def plot_reliability(path: Path, predictions: Mapping[str, tuple[str, Predictions]], labels: torch.Tensor):
    r"""
    Plots accuracy over confidence in the bins of the calibration error and, below, the share of predictions per bin.

    Args:
        path (`Path`):
            File to write.
        predictions (mapping of protocols to a name and `Predictions`):
            Predictions to compare.
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the images.
    """
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="calibrated")
    centers = (np.arange(NUM_CALIBRATION_BINS) + 0.5) / NUM_CALIBRATION_BINS
    for protocol, (name, each) in predictions.items():
        confidences = each.confidences.flatten()
        bins = (confidences * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
        is_right = (each.classes == labels).flatten().float()
        number, right, confidence = (
            torch.zeros(NUM_CALIBRATION_BINS).index_add_(0, bins, values).numpy()
            for values in (torch.ones_like(confidences), is_right, confidences)
        )
        used = number > 0
        style = {"color": COLORS[protocol], "marker": "o", "markersize": 4}
        upper.plot(confidence[used] / number[used], right[used] / number[used], label=name, **style)
        lower.step(centers, number / number.sum(), where="mid", color=COLORS[protocol])
    upper.set_ylabel("accuracy")
    upper.legend()
    lower.set_ylabel("share of predictions")
    lower.set_xlabel("confidence (probability of the predicted class)")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)


def plot_confused_pairs(path: Path, pairs: Sequence[ConfusedPair], load: Callable[[int], Image.Image], title: str):
    r"""
    Plots the most confused pairs of classes, one pair a row: images of both classes and, between them, errors.

    Args:
        path (`Path`):
            File to write.
        pairs (`Sequence[ConfusedPair]`):
            Pairs to show.
        load (`Callable`):
            Returns the image of a row number.
        title (`str`):
            Title of the figure.
    """
    columns = (("first", 2), ("first as second", 2), ("second as first", 2), ("second", 2))
    width = sum(number for _, number in columns)
    figure = Figure(figsize=(1.5 * width, 0.9 + 1.9 * max(1, len(pairs))), layout="constrained")
    figure.suptitle(title if pairs else f"{title}\nAll predictions are correct.", fontsize=10, parse_math=False)
    grid = figure.subplots(max(1, len(pairs)), width, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, pair in zip(grid, pairs, strict=False):
        headings = {
            "first": _short(pair.first),
            "first as second": f"{_short(pair.first)}\npredicted as {_short(pair.second)}: {pair.first_as_second:.3g}",
            "second as first": f"{_short(pair.second)}\npredicted as {_short(pair.first)}: {pair.second_as_first:.3g}",
            "second": _short(pair.second),
        }
        place = 0
        for kind, number in columns:
            if pair.rows[kind]:
                line[place].set_title(headings[kind], fontsize=7, loc="left", parse_math=False)
            for axes, row in zip(line[place : place + number], pair.rows[kind], strict=False):
                image = load(row)
                image.thumbnail((192, 192))
                axes.imshow(image)
            place += number
    figure.savefig(path, dpi=_DPI)


def _short(name: str) -> str:
    """A name of a class, cut to fit into a figure. A class number at its end stays."""
    number = "".join(re.findall(r" \(\d{1,6}\)\Z", name))
    name = name.removesuffix(number)
    return (name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…") + number
