# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checks a data set before training on it.

    python -m training.check_data --train_dir images
    python -m training.check_data --config training/recipes/orl_faces.yaml

It takes the arguments and recipes of `training.train`, uses those that describe the data, and ignores the others. Exit
code 0: fit for training. 1: a finding prevents training. 2: wrong arguments.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainingArguments

from modeling_rbi import UserError

from .cli import parse_arguments, run_command
from .data.arguments import DataArguments
from .data.checks import DEFAULT_MIN_PER_CLASS, KINDS, DataReport, check_images
from .data.folders import ignored_files
from .data.form import fingerprint
from .data.reading import load_images
from .data.transforms import AugmentationArguments
from .files import write_json
from .fine_tuning.arguments import FineTuningArguments, RunArguments
from .fine_tuning.models import ModelArguments


# Arguments of a training that do not concern its data.
_IGNORED_TYPES = (ModelArguments, AugmentationArguments, FineTuningArguments, RunArguments, TrainingArguments)


@dataclass
class CheckArguments:
    """Options of the check."""

    report: str | None = field(default=None, metadata={"help": "JSON file to write all findings to."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Number of threads that decode images. Default: one per core."}
    )
    min_per_class: int = field(
        default=DEFAULT_MIN_PER_CLASS, metadata={"help": "Report classes with fewer training images than this."}
    )
    num_files: int = field(default=3, metadata={"help": "Number of findings of each kind to print; 0: all."})
    seed: int = field(
        default=42,
        metadata={"help": "Random seed, as in the training: it decides which images are held out for validation."},
    )

    def __post_init__(self):
        if self.report is not None and not Path(self.report).absolute().parent.is_dir():
            raise UserError(f"--report {self.report}: there is no folder {Path(self.report).absolute().parent}.")
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"--num_workers must be at least 1, got {self.num_workers}.")
        for name in ("min_per_class", "num_files"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be at least 0, got {getattr(self, name)}.")


def findings_table(report: DataReport, num_files: int) -> Table:
    """One row for each kind of finding, with the messages of its first `num_files` findings (0: of all)."""
    table = Table(title="Findings")
    for column in ("finding", "fatal", "number", "where"):
        table.add_column(column, justify="right" if column == "number" else "left", overflow="fold")
    for kind, findings in report.by_kind().items():
        shown = [finding.message for finding in findings[: num_files or None]]
        more = [f"and {len(findings) - len(shown)} more"] if len(shown) < len(findings) else []
        stops = "yes" if any(finding.fatal for finding in findings) else "no"
        table.add_row(f"{kind}: {KINDS[kind]}", stops, str(len(findings)), Text("\n".join(shown + more)))
    return table


def check(data_args: DataArguments, args: CheckArguments, console: Console) -> DataReport:
    r"""
    Checks the data, prints the findings and, with `--report`, writes them to a file.

    Raises:
        UserError, OSError: see [`load_images`].
    """
    # Report missing classes and unreadable files as findings, together with all others.
    dataset = load_images(dataclasses.replace(data_args, allow_missing_classes=True, skip_bad_images=True), args.seed)
    report = check_images(
        dataset,
        max_pixels=data_args.max_pixels,
        min_per_class=args.min_per_class,
        num_workers=args.num_workers,
        ignored=ignored_files(data_args),
        allow_missing_classes=data_args.allow_missing_classes,
    )
    if args.report is not None:
        content = {
            "arguments": dataclasses.asdict(data_args) | {"seed": args.seed},
            "fingerprint": fingerprint(dataset),
        }
        write_json(Path(args.report), content | report.to_dict())
    console.print(", ".join(f"{name}: {number} images" for name, number in report.images.items()))
    if report.findings:
        console.print(findings_table(report, args.num_files))
    left_out = {name: len(rows) for name, rows in report.rows_to_leave_out().items()}
    if left_out:
        console.print(
            "--skip_bad_images would leave out "
            + ", ".join(f"{number} of {name}" for name, number in left_out.items())
            + "."
        )
    console.print(f"{len(report.fatal)} findings prevent training, {len(report.notes)} are notes.")
    return report


def command(argv: Sequence[str], console: Console) -> int:
    """Runs the check and returns the exit code; see the module's docstring."""
    data_args, args, _ = parse_arguments(
        argv, (DataArguments, CheckArguments), {}, description=__doc__, ignored_types=_IGNORED_TYPES
    )
    return 1 if check(data_args, args, console).fatal else 0


def main(argv: Sequence[str] | None = None) -> int:
    """See [`run_command`]."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
