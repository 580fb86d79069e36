# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Numbers are rounded, signed and marked as their docstrings say, and tables are Markdown."""

import statistics

import numpy as np
import pytest

from training.evaluation.bootstrap import Estimate
from training.evaluation.text import (
    interval_text,
    markdown_code,
    markdown_table,
    mean_and_std,
    percent_with_interval,
    spread_text,
)


@pytest.mark.parametrize("number", [2, 7])
def test_the_deviation_is_that_of_a_sample(number):
    values = np.random.default_rng(number).uniform(size=number)
    expected = {"mean": values.mean(), "std": values.std(ddof=1)}
    assert mean_and_std(values.tolist()) == pytest.approx(expected)


def test_one_value_has_no_deviation():
    with pytest.raises(statistics.StatisticsError):
        mean_and_std([0.5])


@pytest.mark.parametrize(
    ("mean", "std", "scale", "text"),
    [
        (0.91236, 0.0123, {}, "91.24 ± 1.23"),
        (1, 0, {}, "100.00 ± 0.00"),
        (91.236, 1.234, {"scale": 1}, "91.24 ± 1.23"),
    ],
)
def test_spreads(mean, std, scale, text):
    assert spread_text({"mean": mean, "std": std}, **scale) == text


@pytest.mark.parametrize(
    ("numbers", "more", "text"),
    [
        ((0.02, 0.0149, 0.0251), {}, "+2.00 [+1.49, +2.51]"),
        ((2, 1.491, 2.509), {"scale": 1}, "+2.00 [+1.49, +2.51]"),
        ((0.02, 0.01, 0.03), {"mark": True}, "**+2.00 [+1.00, +3.00]**"),
        ((-0.02, -0.03, -0.01), {"mark": True}, "**-2.00 [-3.00, -1.00]**"),
        ((0.01, -0.01, 0.03), {"mark": True}, "+1.00 [-1.00, +3.00]"),
        # What is shown as zero is not marked as different from it, and has the sign of zero.
        ((0.01, 0.00001, 0.02), {"mark": True}, "+1.00 [+0.00, +2.00]"),
        ((-0.01, -0.02, -0.00001), {"mark": True}, "-1.00 [-2.00, +0.00]"),
        ((-1e-15, -1e-15, -1e-15), {"mark": True}, "+0.00 [+0.00, +0.00]"),
    ],
)
def test_intervals_of_differences(numbers, more, text):
    assert interval_text(dict(zip(("mean", "low", "high"), numbers, strict=True)), **more) == text


def test_without_a_difference_the_text_is_empty():
    assert interval_text(None) == interval_text(None, scale=1, mark=True) == ""


@pytest.mark.parametrize(
    ("numbers", "sign", "text"),
    [
        ((0.9126, 0.8, 1), "", "91.3 [80.0, 100.0]"),
        ((0.0126, -0.02, 0.04), "+", "+1.3 [-2.0, 4.0]"),
        ((-0.0126, -0.04, 0.02), "+", "-1.3 [-4.0, 2.0]"),
        ((-1e-9, -1e-9, -1e-9), "+", "+0.0 [0.0, 0.0]"),
        ((-1e-9, -1e-9, -1e-9), "", "0.0 [0.0, 0.0]"),
    ],
)
def test_estimates_in_percent(numbers, sign, text):
    assert percent_with_interval(Estimate(*numbers), sign) == text


def test_a_table_in_markdown():
    assert markdown_table(["a", "b"], [["1", "2"], ["", "x"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n|  | x |"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("cat", "`cat`"),
        ("*b* <i> [x](y) _z_ $a$ # |", "`*b* <i> [x](y) _z_ $a$ # |`"),
        ("a`b", "`` a`b ``"),
        ("``", "``` `` ```"),
        ("two\n\n# lines", "`two # lines`"),
    ],
)
def test_texts_of_users_as_code(text, code):
    assert markdown_code(text) == code


def test_a_cell_stays_one_cell():
    table = markdown_table(["a|b"], [["`x|y`"], ["two\nlines"]])
    assert table == "| a\\|b |\n|---|\n| `x\\|y` |\n| two lines |"


def test_columns_of_numbers_are_aligned_to_the_right():
    assert markdown_table(["a", "b"], iter([["x", "1"]]), ["b"]) == "| a | b |\n|---|---:|\n| x | 1 |"
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|---|"
