# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Confusions, the pairs of classes that are confused most, and the table of results."""

import torch

from tests.training.evaluation.shared import planted_leak
from training.evaluation.assessment import assess
from training.evaluation.protocols import Condition, Predictions
from training.evaluation.report import confused_pairs, confusion, results_table


def test_confusion_counts_images_over_orders():
    labels = torch.tensor([0, 0, 1, 2])
    first, second = (torch.eye(3)[classes] for classes in ([0, 1, 1, 2], [0, 0, 1, 2]))
    second[3] = torch.nan
    counts = confusion(Predictions.stack([Predictions.from_scores(each, labels) for each in (first, second)]), labels)
    assert counts.tolist() == [[1.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]


def test_confused_pairs_come_worst_first_with_their_images():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    predictions = Predictions.from_scores(torch.eye(3)[[0, 1, 1, 1, 0, 1, 0, 2]], labels)
    worst, other = confused_pairs(predictions, labels, ["a", "b", "c"], 6)
    assert (worst.first, worst.second, worst.first_as_second, worst.second_as_first) == ("a", "b", 2, 1)
    assert worst.rows == {"first": [0], "first as second": [1, 2], "second as first": [4], "second": [3, 5]}
    assert (other.first, other.second) == ("a", "c") and other.rows["second as first"] == [6]
    assert confused_pairs(Predictions.from_scores(torch.eye(3)[labels], labels), labels, ["a", "b", "c"], 6) == []


def test_the_table_has_all_and_says_what_is_left_out(backbone_config):
    result = assess(*planted_leak(backbone_config), ["single", "shuffled", "sorted"], [10], resamples=100)
    table = results_table(result, {"reference": "[no bank]", "more": "[no bank]"})
    assert list(table.columns[0].cells) == ["single", "shuffled", "sorted", "sorted - shuffled", "shuffled - single"]
    assert str(table.caption) == "Left out: reference, more, since [no bank]."
    estimate = result.metrics[Condition("single")]["accuracy"]
    cell = next(iter(table.columns[2].cells))
    assert cell == f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
