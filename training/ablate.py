# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Compares RBI with controls that have no relations, with a peer, and with reference banks.

    python -m training.ablate --config training/recipes/orl_faces.yaml --freeze_backbone
    python -m training.ablate --config training/recipes/orl_faces.yaml --arms rbi rbi-kernel --num_seeds 3

Takes the arguments of `python -m training.train`; `--recipe` is another name of `--config`. With `--freeze_backbone`
heads are trained on cached features, in minutes; without it, each arm and seed is a training of its own. What is
there of an earlier call with the same arguments is kept. `--output_dir` gets `ablation.md`, the tables, and
`ablation.json`, every figure.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from .ablation.arguments import AblationArguments
from .ablation.report import interval, mean_and_std
from .ablation.run import RESULTS_FILE, TABLE_FILE, ablate


logger = logging.getLogger(__name__)


def results_table(results: dict[str, Any]) -> Table:
    """Accuracy of each arm by protocol, and what it gains over its control in the last protocol that it has."""
    protocols = ("single", "shuffled", "reference")
    table = Table(title="Test accuracy in %, mean ± standard deviation over the seeds")
    for column in ("arm", *protocols, "control", "gain over it [95 % interval]"):
        table.add_column(column, justify="left" if column in ("arm", "control") else "right")
    for name, arm in results["arms"].items():
        test, gains = arm["summary"]["test"], arm["over_control"]
        table.add_row(
            name,
            *(mean_and_std(test[protocol]["accuracy"]) if protocol in test else "" for protocol in protocols),
            arm["control"] or "",
            interval(list(gains.values())[-1]["accuracy"]) if gains else "",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = [_as_config(word) for word in (sys.argv[1:] if argv is None else argv)]
    console = Console()
    if not console.is_terminal:
        console.width = 140
    args = None
    try:
        args = AblationArguments.parse(argv)
        transformers.utils.logging.disable_progress_bar()
        console.print(results_table(ablate(args)))
        console.print(
            f"All tables ({TABLE_FILE}) and every figure ({RESULTS_FILE}): {Path(args.training.output_dir).resolve()}",
            soft_wrap=True,
            highlight=False,
        )
        return 0
    except KeyboardInterrupt:
        how = f"Go on with: {args.command}" if args is not None else "Nothing was begun."
        print(f"Stopped. {how}", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        logger.debug("Where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2 if args is None else 1


def _as_config(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--config{equals}{value}" if flag == "--recipe" else word


if __name__ == "__main__":
    sys.exit(main())
