# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Compares RBI with controls without relations, with BatchFormer, and with reference banks.

    python -m training.ablate --config training/recipes/orl_faces.yaml --freeze_backbone
    python -m training.ablate --config training/recipes/orl_faces.yaml --arms rbi rbi-kernel --num_seeds 3

Takes the arguments of `python -m training.train`. With `--freeze_backbone`, heads are trained on cached features,
which takes minutes; without it, each arm is trained end to end with each seed. A rerun with the same arguments keeps
what is finished. `--output_dir` gets the tables, `ablation.md`, and all figures, `ablation.json`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from .ablation.arguments import AblationArguments
from .ablation.run import RESULTS_FILE, TABLE_FILE, ablate
from .cli import Stopped, run_command
from .evaluation.text import interval_text, spread_text


def results_table(results: dict[str, Any]) -> Table:
    """Accuracy of each arm under each protocol, and its gain over the control under its last protocol."""
    protocols = ("single", "shuffled", "reference")
    table = Table(title="Test accuracy in %, mean ± standard deviation over the seeds")
    for column in ("arm", *protocols, "control", "gain over it [95 % interval]"):
        table.add_column(column, justify="left" if column in ("arm", "control") else "right")
    for name, arm in results["arms"].items():
        test, gains = arm["summary"]["test"], arm["over_control"]
        table.add_row(
            name,
            *(spread_text(test[protocol]["accuracy"]) if protocol in test else "" for protocol in protocols),
            arm["control"] or "",
            interval_text(list(gains.values())[-1]["accuracy"]) if gains else "",
        )
    return table


def command(argv: Sequence[str], console: Console):
    """Parses the arguments, runs the ablation and prints the accuracies."""
    args = AblationArguments.parse(argv, __doc__)
    try:
        results = ablate(args)
    except KeyboardInterrupt:
        raise Stopped(f"Go on with: {args.command}") from None
    console.print(results_table(results))
    console.print(
        f"All tables ({TABLE_FILE}) and all figures ({RESULTS_FILE}): {Path(args.training.output_dir).resolve()}",
        soft_wrap=True,
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv, width=140)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
