# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of an assessment."""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from .assessment import Assessment
from .bootstrap import LEVEL, Estimate
from .metrics import METRIC_TITLES
from .plots import (
    ConfusedPair,
    plot_batch_sizes,
    plot_confused_pairs,
    plot_confusion_matrix,
    plot_reliability,
    short_names,
)
from .protocols import BATCH_PROTOCOLS, Condition, Predictions
from .text import percent_with_interval


PROGRAM = "training.assess"
RESULTS_FILE = "results.json"
FILES = (
    "results.csv",
    "per_class.csv",
    "batch_size.png",
    "confusion_matrix.png",
    "reliability.png",
    "confused_pairs.png",
    RESULTS_FILE,
)
_NUM_CONFUSED_PAIRS = 6
_EXAMPLES = 2


def results_table(assessment: Assessment, left_out: Mapping[str, str]) -> Table:
    """Metrics in % and, below, differences in points, with their intervals."""
    table = Table(title=f"In %, with {LEVEL:.0%} intervals", caption_justify="left")
    for title in ("", "batch", *METRIC_TITLES.values()):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for condition, metrics in assessment.metrics.items():
        table.add_row(
            condition.protocol, _size(condition), *(percent_with_interval(metrics[name]) for name in METRIC_TITLES)
        )
    table.add_section()
    for (first, second), metrics in assessment.differences.items():
        table.add_row(
            f"{first.protocol} - {second.protocol}",
            _size(first),
            *(percent_with_interval(metrics[name], "+") for name in METRIC_TITLES),
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    table.caption = Text(
        "\n".join(f"Left out: {', '.join(names)}, since {reason}." for reason, names in reasons.items())
    )
    return table


def _size(condition: Condition) -> str:
    return "" if condition.batch_size is None else str(condition.batch_size)


def write_tables(folder: Path, assessment: Assessment, names: Sequence[str]):
    """Writes `results.csv`, with a row per condition, and `per_class.csv`, with a row per condition and class."""
    rows: list[dict[str, Any]] = []
    for condition, metrics in assessment.metrics.items():
        row: dict[str, Any] = _columns(condition) | {
            "images": len(assessment.labels),
            "orders": len(assessment.predictions[condition].metrics),
        }
        for name, estimate in metrics.items():
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        row["accuracy_std_over_orders"] = _std(assessment.predictions[condition])
        rows.append(row)
    _write_csv(folder / "results.csv", rows)
    rows = []
    for condition, predictions in assessment.predictions.items():
        counts = confusion(predictions, assessment.labels)
        images, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
        for label in ((images + predicted)[: len(names)] > 0).nonzero().flatten().tolist():
            rows.append(
                _columns(condition)
                | {
                    "class": names[label],
                    "images": int(images[label]),
                    "predicted": float(predicted[label]),
                    "recall": _ratio(right[label], images[label]),
                    "precision": _ratio(right[label], predicted[label]),
                    "f1": _ratio(2 * right[label], images[label] + predicted[label]),
                }
            )
    _write_csv(folder / "per_class.csv", rows)


def confusion(predictions: Predictions, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Number of images by class (row) and predicted class (column), the mean over the orders, `(num_classes + 1,
    num_classes + 1)`. The last column counts images without a prediction; the last row is empty.
    """
    size = predictions.num_classes + 1
    cells = (labels * size + predictions.classes).flatten().bincount(minlength=size * size)
    return cells.view(size, size).double() / len(predictions.classes)


def confused_pairs(
    predictions: Predictions, labels: torch.Tensor, names: Sequence[str], number: int
) -> list[ConfusedPair]:
    """The pairs of classes with most images of one predicted as the other, the worst first."""
    counts = confusion(predictions, labels)[: len(names), : len(names)]
    errors = (counts + counts.T).triu(diagonal=1)
    order = errors.flatten().argsort(descending=True, stable=True)[:number].tolist()
    first_order = predictions.classes[0]

    def rows(label: int, predicted: int) -> list[int]:
        # Examples from the first order or, if it has none, from any.
        found = ((labels == label) & (first_order == predicted)).nonzero().flatten()
        if not len(found):
            found = ((labels == label) & (predictions.classes == predicted).any(0)).nonzero().flatten()
        return found[:_EXAMPLES].tolist()

    pairs = []
    for first, second in (divmod(cell, len(names)) for cell in order):
        if errors[first, second] > 0:
            examples = {
                "first": rows(first, first),
                "first as second": rows(first, second),
                "second as first": rows(second, first),
                "second": rows(second, second),
            }
            pairs.append(
                ConfusedPair(
                    names[first], names[second], float(counts[first, second]), float(counts[second, first]), examples
                )
            )
    return pairs


def plot(folder: Path, assessment: Assessment, names: Sequence[str], load: Callable[[int], Any]):
    """Writes the figures; accuracy over batch size only if measured. `load` returns the image of a row number."""
    curves: dict[str, dict[int | None, Estimate]] = {}
    for condition, metrics in assessment.metrics.items():
        curves.setdefault(condition.protocol, {})[condition.batch_size] = metrics["accuracy"]
    if set(curves) & set(BATCH_PROTOCOLS):
        plot_batch_sizes(folder / "batch_size.png", curves)
    shown = assessment.most_telling
    predictions, labels = assessment.predictions[shown], assessment.labels
    title = f"{shown}: accuracy {100 * assessment.metrics[shown]['accuracy'].value:.1f} %"
    counts = confusion(predictions, labels)
    used = ((counts.sum(0) + counts.sum(1)) > 0).nonzero().flatten()
    names = short_names([*names, "(no prediction)"])
    plot_confusion_matrix(
        folder / "confusion_matrix.png", counts[used][:, used], [names[label] for label in used.tolist()], title
    )
    # The last condition of a protocol has its largest batches.
    largest = {condition.protocol: condition for condition in assessment.predictions}
    plot_reliability(
        folder / "reliability.png",
        {protocol: (str(condition), assessment.predictions[condition]) for protocol, condition in largest.items()},
        labels,
    )
    pairs = confused_pairs(predictions, labels, names[:-1], _NUM_CONFUSED_PAIRS)
    plot_confused_pairs(folder / "confused_pairs.png", pairs, load, title)


def as_json(assessment: Assessment) -> dict[str, Any]:
    """Results, differences and findings, for `results.json`."""
    return {
        "results": [
            _columns(condition)
            | {name: asdict(estimate) for name, estimate in metrics.items()}
            | {
                "orders": list(assessment.predictions[condition].metrics),
                "accuracy_std_over_orders": _std(assessment.predictions[condition]),
            }
            for condition, metrics in assessment.metrics.items()
        ],
        "differences": [
            {"difference": f"{first.protocol} - {second.protocol}", "batch_size": first.batch_size}
            | {name: asdict(estimate) for name, estimate in metrics.items()}
            for (first, second), metrics in assessment.differences.items()
        ],
        "findings": {kind: asdict(finding) for kind, finding in assessment.findings.items()},
    }


def _columns(condition: Condition) -> dict[str, Any]:
    return dataclasses.asdict(condition)


def _std(predictions: Predictions) -> float | None:
    """Standard deviation of the accuracy over the orders; `None` if there is only one."""
    accuracies = torch.tensor([metrics["accuracy"] for metrics in predictions.metrics], dtype=torch.float64)
    return accuracies.std().item() if len(accuracies) > 1 else None


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return float(part / whole) if whole else None


def _write_csv(path: Path, rows: list[dict[str, Any]]):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
