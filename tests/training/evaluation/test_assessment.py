# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What an assessment says of planted data: a leak where there is one, and none where there is none."""

import pytest
import torch
from transformers import EvalPrediction

from tests.training.evaluation.shared import no_leak, planted_leak
from training.evaluation.assessment import assess
from training.evaluation.bootstrap import METRICS
from training.evaluation.metrics import compute_metrics
from training.evaluation.protocols import Condition


def test_neighbors_that_reveal_the_label_are_a_leak(backbone_config):
    result = assess(*planted_leak(backbone_config), ["single", "shuffled", "sorted"], [10, 20], resamples=500)
    leak = result.findings["leak"]
    assert leak.accuracy.low > 0.2
    assert "reads labels off its neighbors" in leak.sentence
    assert leak.sentence.startswith(f"Class-ordered batches add +{100 * leak.accuracy.value:.1f} points [")
    for size in (10, 20):
        first, second = Condition("sorted", size), Condition("shuffled", size)
        leak = result.differences[first, second]["accuracy"]
        values = [result.metrics[condition]["accuracy"].value for condition in (first, second)]
        assert leak.low > 0.2 and leak.value == pytest.approx(values[0] - values[1])


@pytest.mark.slow
def test_neighbors_that_tell_nothing_are_none(backbone_config):
    """In 95 of 100 data sets, whatever their noise."""
    false_alarms = changed = 0
    for seed in range(12):
        torch.manual_seed(seed)
        predict, labels = no_leak(backbone_config)
        result = assess(predict, labels, ["single", "shuffled", "sorted"], [5, 10], resamples=300, seed=seed)
        leak = result.findings["leak"]
        false_alarms += not leak.sentence.startswith("No leak seen")
        changed += leak.images_changed > 10
        assert leak.accuracy.contains_zero == ("contains 0" in leak.sentence)
        # What any batch does for the answers is seen.
        assert result.findings["shuffled"].sentence.startswith(
            "Relations help: compared with no neighbors, random batches"
        )
    assert false_alarms <= 2
    assert changed == 12, "the batch must matter, or nothing was tested"


def test_few_changes_tell_nothing():
    """Four images of 100 gained, none lost: the interval may be above 0, but so it would by chance 1 time in 8."""
    labels = torch.arange(100) % 2

    def predict(rows, scope):
        is_right = (rows >= (8 if scope == "self" else 4)).long()
        return 5 * torch.eye(2)[(labels[rows] + 1 - is_right) % 2]

    finding = assess(predict, labels, ["single", "shuffled"], [50], resamples=500).findings["shuffled"]
    assert finding.accuracy.value == pytest.approx(0.04) and finding.images_changed == pytest.approx(4)
    assert finding.sentence.startswith("Whether relations help is open")
    assert "too few to tell" in finding.sentence or "contains 0" in finding.sentence


@pytest.mark.slow
def test_the_choice_of_a_batch_size_widens_the_interval(backbone_config):
    predict, labels = planted_leak(backbone_config)
    alone = assess(predict, labels, ["shuffled", "sorted"], [20], resamples=1000).findings["leak"]
    several = assess(predict, labels, ["shuffled", "sorted"], [20, 10, 5], resamples=1000)
    finding = several.findings["leak"]
    plain = several.differences[Condition("sorted", finding.batch_size), Condition("shuffled", finding.batch_size)]
    assert alone.level == 0.95 and finding.level == pytest.approx(1 - 0.05 / 3)
    assert finding.accuracy.low < plain["accuracy"].low and finding.accuracy.high > plain["accuracy"].high


def test_the_metrics_are_those_of_the_whole_scores(backbone_config):
    predict, labels = planted_leak(backbone_config)
    result = assess(predict, labels, ["single", "shuffled"], [10], num_shuffles=3, resamples=100)
    expected = compute_metrics(EvalPrediction(predict(torch.arange(200), "self"), labels))
    for name in METRICS:
        estimate = result.metrics[Condition("single")][name]
        assert estimate.value == pytest.approx(expected[name])
        shuffles = [metrics[name] for metrics in result.predictions[Condition("shuffled", 10)].metrics]
        assert len(shuffles) == 3
        assert result.metrics[Condition("shuffled", 10)][name].value == pytest.approx(sum(shuffles) / 3)


def test_references_are_asked_for_in_their_scope():
    scopes = []

    def predict(rows, scope):
        scopes.append(scope)
        return torch.eye(2)[(rows % 2 + (scope != "reference") * (rows % 3 == 0)) % 2]

    result = assess(predict, torch.arange(90) % 2, ["single", "reference"], [], resamples=200)
    assert set(scopes) == {"self", "reference"}
    assert list(result.findings) == ["reference"]
    assert result.findings["reference"].sentence.startswith(
        "Relations help: compared with no neighbors, the references"
    )
    assert result.most_telling == Condition("reference")
