# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Paired differences and their intervals, the results of an arm, and the tables."""

import pytest
import torch
from scipy import stats

from training.ablation.arms import ARMS
from training.ablation.report import ablation_markdown, arm_results, paired_difference


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_the_interval_is_that_of_the_paired_t_test(num_seeds):
    values, controls = torch.rand(2, num_seeds, dtype=torch.float64).tolist()
    difference = paired_difference(values, controls)
    expected = stats.ttest_rel(values, controls).confidence_interval(0.95)
    assert (difference["low"], difference["high"]) == pytest.approx((expected.low, expected.high))
    assert difference["mean"] == pytest.approx(sum(values) / num_seeds - sum(controls) / num_seeds)


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_difference([0.5, 0.75], [0.25, 0.5]) == {"mean": 0.25, "low": 0.25, "high": 0.25}


@pytest.fixture
def runs():
    """Made-up figures of an arm and its control with two seeds, in exact binary fractions."""

    def run(seconds=1.0, **accuracies):
        figures = {name: {"accuracy": value, "macro_f1": value / 2} for name, value in accuracies.items()}
        return {"test": figures, "validation": figures, "parameters": 1234, "seconds": seconds}

    return {
        "plain": [run(single=single, shuffled=single, sorted=single) for single in (0.5, 0.25)],
        "bank-untrained": [
            run(3.0, single=0.5, shuffled=0.5, sorted=0.75, reference=0.625),
            run(4.0, single=0.25, shuffled=0.5, sorted=0.625, reference=0.5),
        ],
    }


def test_results_of_an_arm(runs):
    arm = ARMS["bank-untrained"]
    results = arm_results(arm, runs)
    assert results["runs"] == runs["bank-untrained"] and results["scopes"] == ["self", "reference"]
    assert (results["control"], results["description"]) == ("plain", arm.description)
    for part in ("validation", "test"):
        assert results["summary"][part].keys() == {"single", "shuffled", "sorted", "reference"}
    summary = results["summary"]["test"]["reference"]
    assert summary["accuracy"] == pytest.approx({"mean": 0.5625, "std": 0.125 / 2**0.5})
    assert summary["macro_f1"] == pytest.approx({"mean": 0.28125, "std": 0.0625 / 2**0.5})
    # `plain` has no bank: its images are classified independently.
    pairs = {"single": [0.5, 0.25], "reference": [0.625, 0.5]}
    gains = {
        protocol: {
            "accuracy": paired_difference(own, [0.5, 0.25]),
            "macro_f1": paired_difference([value / 2 for value in own], [0.25, 0.125]),
        }
        for protocol, own in pairs.items()
    }
    assert results["over_control"] == results["over_plain"] == gains


def test_plain_is_compared_with_nothing(runs):
    results = arm_results(ARMS["plain"], runs)
    assert results["over_control"] is results["over_plain"] is None


@pytest.mark.parametrize("source", ["test", "images that the recipe leaves out"])
def test_the_tables_of_made_up_figures(runs, make, source):
    results = {
        "arguments": make(freeze_backbone=True).resolved() | {"dataset_format": None, "train_dir": "a*b*|[red]"},
        "environment": {
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "hardware": {"processor": "A Processor", "threads": 1, "device": "cpu"},
        },
        "data": {
            "label_names": ["a", "b"],
            "unlabeled_from": source,
            "fingerprints": {"42": {"splits": {"train": {"images": 32}, "unlabeled": {"images": 7}}}},
        },
        "seeds": [42, 43],
        "arms": {name: arm_results(ARMS[name], runs) for name in runs},
    }
    text = ablation_markdown(results)
    assert "`a*b*|[red]`: 32 train" in text and """Backbone `{"model_type": """ in text
    accuracy, macro_f1, gains, arms = (section.strip() for section in text.split("\n## ")[1:])
    assert accuracy.splitlines()[-1] == (
        "| `bank-untrained` | 37.50 ± 17.68 | 50.00 ± 0.00 | 68.75 ± 8.84 | 56.25 ± 8.84 | +18.75 | 37.50 ± 17.68 "
        "| 1,234 | 3.5 |"
    )
    # No bank, so no figure with it.
    assert macro_f1.splitlines()[-2] == (
        "| `plain` | 18.75 ± 8.84 | 18.75 ± 8.84 | 18.75 ± 8.84 |  | +0.00 | 18.75 ± 8.84 | 1,234 | 1.0 |"
    )
    single, reference = gains.splitlines()[-2:]
    none = "+0.00 [+0.00, +0.00]"
    assert single == f"| `bank-untrained` | single | `plain` | {' | '.join([none] * 4)} |"
    assert reference.startswith("| `bank-untrained` | reference | `plain` | +18.75 [-60.")
    assert arms == "Arms\n\n" + "\n".join(f"- `{name}`: {ARMS[name].description}." for name in runs)
    assert "32 train, 7 unlabeled images of 2 classes" in text and "2 seeds, 42 to 43" in text
    assert f"7 unlabeled images taken from the {source}" in text
    assert ("not used for testing" in text) == (source == "test")
