# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Numbers as text, and tables in Markdown."""

import re
import statistics
from collections.abc import Collection, Iterable, Sequence

from .bootstrap import Estimate


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation of at least 2 values."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values)}


def spread_text(summary: dict[str, float], scale: float = 100) -> str:
    r"""
    `mean ± std`.

    Args:
        summary (`dict[str, float]`):
            Return value of [`mean_and_std`].
        scale (`float`, *optional*, defaults to 100):
            Factor of all numbers. 100 turns fractions into percent.
    """
    return f"{scale * summary['mean']:.2f} ± {scale * summary['std']:.2f}"


def interval_text(difference: dict[str, float] | None, scale: float = 100, mark: bool = False) -> str:
    r"""
    `mean [low, high]`.

    Args:
        difference (`dict[str, float]`, *optional*):
            With the keys `mean`, `low` and `high`. `None`: the text is empty.
        scale (`float`, *optional*, defaults to 100):
            Factor of all numbers. 100 turns fractions into points.
        mark (`bool`, *optional*, defaults to `False`):
            Whether an interval that excludes zero is set in bold.
    """
    if difference is None:
        return ""
    # After rounding, a rounding error is neither -0.00 nor different from zero.
    mean, low, high = (round(scale * difference[name], 2) + 0.0 for name in ("mean", "low", "high"))
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if mark and (low > 0 or high < 0) else text


def percent_with_interval(estimate: Estimate, sign: str = "") -> str:
    """`value [low, high]` in percent or, with `sign="+"`, in points."""
    # Adding 0.0 turns -0.0 into 0.0.
    value, low, high = (round(100 * number, 1) + 0.0 for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} [{low:.1f}, {high:.1f}]"


def markdown_code(text: str) -> str:
    """A text of the user, such as a name or a path, as Markdown code on one line. It may contain backticks."""
    text = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    if not longest:
        return f"`{text}`"
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def markdown_cell(text: str) -> str:
    """A text as one cell of a table in Markdown, where also code must not have a plain `|`."""
    return " ".join(text.split()).replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """A table in Markdown. The columns named in `numbers` are aligned to the right."""
    rule = "|".join("---:" if name in numbers else "---" for name in header)
    cells = [" | ".join(map(markdown_cell, row)) for row in (header, *rows)]
    return "\n".join([f"| {cells[0]} |", f"|{rule}|", *(f"| {row} |" for row in cells[1:])])
