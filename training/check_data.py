# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set, before training on it: `python -m training.check_data --train_dir FOLDER`.

Exit code 0: fit to train on. 1: something stops a training. 2: the arguments are wrong.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import HfArgumentParser

from modeling_rbi import UserError

from .data.checks import DEFAULT_MIN_PER_CLASS, KINDS, DataReport, check_images
from .data.reading import BadDataError, DataArguments, fingerprint, ignored_files, load_images
from .files import write_json


@dataclass
class CheckArguments:
    """Options of the check."""

    report: str | None = field(default=None, metadata={"help": "JSON file to write all findings to."})
    num_workers: int | None = field(default=None, metadata={"help": "Threads that decode; by default one a core."})
    min_per_class: int = field(
        default=DEFAULT_MIN_PER_CLASS, metadata={"help": "Note classes with fewer training images."}
    )
    num_files: int = field(default=3, metadata={"help": "Findings of each kind that are printed; 0: all."})
    seed: int = field(default=42, metadata={"help": "Random seed of what is held out for validation, as in training."})

    def __post_init__(self):
        if self.report is not None and not Path(self.report).absolute().parent.is_dir():
            raise UserError(f"--report {self.report}: there is no folder {Path(self.report).absolute().parent}.")
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"--num_workers must be at least 1, got {self.num_workers}.")
        for name in ("min_per_class", "num_files"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be at least 0, got {getattr(self, name)}.")


def findings_table(report: DataReport, num_files: int) -> Table:
    """One row for each kind of finding, with the first `num_files` of them; all with 0."""
    table = Table(title="Findings")
    for column in ("finding", "stops training", "number", "where"):
        table.add_column(column, justify="right" if column == "number" else "left", overflow="fold")
    for kind, findings in report.by_kind().items():
        shown = [escape(finding.message) for finding in findings[: num_files or None]]
        more = [f"and {len(findings) - len(shown)} more"] if len(shown) < len(findings) else []
        stops = "yes" if any(finding.fatal for finding in findings) else "no"
        table.add_row(f"{kind}: {KINDS[kind]}", stops, str(len(findings)), "\n".join(shown + more))
    return table


def check(data_args: DataArguments, args: CheckArguments, console: Console) -> DataReport:
    r"""
    Checks the data, prints the findings and writes the report if there is to be one.

    Raises:
        UserError, OSError: see [`load_images`].
    """
    # Missing classes are findings here, beside all others.
    dataset = load_images(dataclasses.replace(data_args, allow_missing_classes=True), args.seed)
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
    console.print(f"{len(report.fatal)} findings stop a training, {len(report.notes)} are notes.")
    return report


def main(argv: list[str] | None = None) -> int:
    """Runs the check and gives the exit code; see the module's description."""
    console, errors = Console(), Console(stderr=True)
    for each in (console, errors):
        if not each.is_terminal:
            each.width = 120
    try:
        data_args, args = HfArgumentParser((DataArguments, CheckArguments)).parse_args_into_dataclasses(argv)
        report = check(data_args, args, console)
    except (ValueError, OSError) as error:
        errors.print(escape(str(error)), soft_wrap=True, highlight=False)
        return 1 if isinstance(error, BadDataError) else 2
    return 1 if report.fatal else 0


if __name__ == "__main__":
    sys.exit(main())
