# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes RBI on labeled images.

    python -m training.train --config training/recipes/orl_faces.yaml
    accelerate launch -m training.train --train_dir images --model_name_or_path facebook/dinov2-small

`--output_dir` gets the model with the best validation metric, its image processor and code; the checkpoints; and
`run.json`, the record of the run.
"""

import errno
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from modeling_rbi import UserError

from .cli import Stopped, run_command
from .evaluation.metrics import METRIC_TITLES
from .evaluation.text import spread_text
from .fine_tuning.arguments import Arguments
from .fine_tuning.models import check_model
from .fine_tuning.run import cross_validate, dry_run, load_data, prepare_output_dir, train
from .fine_tuning.trainer import last_complete_checkpoint
from .record import RECORD_FILE


# With less free space than this, a file that could not be written did not fit.
_MIN_FREE_BYTES = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, on_stop="Nothing was begun.")


def command(argv: Sequence[str], console: Console):
    """Parses the arguments, trains, and prints the results."""
    args = Arguments.parse(argv, __doc__)
    try:
        _log_to_stderr(args.training.get_process_log_level() if args.training.should_log else logging.ERROR)
        if args.run.dry_run:
            dry_run(args)
            console.print("Dry run passed: the model, one training step on made-up images, evaluation and saving.")
            return
        checkpoint = _agreed(prepare_output_dir(args), args)
        with args.training.main_process_first(desc="reading the data"):
            check_model(args.model)
            images, data_record = load_data(args)
        if args.run.num_folds is not None:
            record = cross_validate(args, args.run.num_folds, images, data_record)
        else:
            record = train(args, images, data_record, checkpoint)
    except KeyboardInterrupt as stop:
        raise Stopped(_how_to_go_on(args)) from stop
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_disk_full(error, Path(args.training.output_dir)):
            raise
        raise UserError(
            f"the disk is full ({error}). What was saved before is whole. Make room. {_how_to_go_on(args)}"
        ) from error
    if args.training.should_log:
        _print_results(record, args, console)


def _print_results(record: dict[str, Any], args: Arguments, console: Console):
    console.print(results_table(record["results"]))
    if (references := record.get("model", {}).get("references")) and references["has_images"]:
        console.print(
            f"The model contains thumbnails of its {references['num_references']} references: publish it only if "
            "others may see them."
        )
    console.print(
        f"Model, record ({RECORD_FILE}) and checkpoints{' of each fold' if args.run.num_folds else ''}: "
        f"{Path(args.training.output_dir).resolve()}",
        soft_wrap=True,
        highlight=False,
    )


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """The metrics of each split in %; after cross-validation, their mean and standard deviation over the folds."""
    table = Table()
    table.add_column("in %")
    for title in METRIC_TITLES.values():
        table.add_column(title, justify="right")
    for part, metrics in results.items():
        if part != "train":
            table.add_row(part.replace("_", ", "), *(_percent(metrics[name]) for name in METRIC_TITLES))
    return table


def _percent(value: Any) -> str:
    if isinstance(value, dict):
        return spread_text(value)
    return f"{100 * value:.2f}"


def _log_to_stderr(level: int):
    """Shows the messages of this package; the libraries show their own."""
    messages = logging.getLogger(__package__)
    if not messages.handlers:
        messages.addHandler(logging.StreamHandler())
    messages.setLevel(level)


def _agreed(checkpoint: Path | None, args: Arguments) -> Path | None:
    r"""
    Returns the checkpoint after comparing it over all processes.

    Raises:
        UserError: if the processes see different checkpoints, as on machines that do not share the output folder.
    """
    names = gather_object([checkpoint.name if checkpoint else None]) if args.training.world_size > 1 else []
    if len(set(names)) > 1:
        raise UserError(
            f"The processes see different checkpoints ({names}): --output_dir must be on a disk that they share."
        )
    return checkpoint


def _is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether writing failed for lack of space. safetensors and torch raise errors of their own for that."""
    if isinstance(error, OSError) or "No space left" in str(error):
        return getattr(error, "errno", errno.ENOSPC) == errno.ENOSPC
    return folder.exists() and shutil.disk_usage(folder).free < _MIN_FREE_BYTES


def _how_to_go_on(args: Arguments) -> str:
    if args.training.save_only_model:
        return "With --save_only_model, the run cannot be continued."
    if args.run.num_folds is None and last_complete_checkpoint(Path(args.training.output_dir)) is None:
        return "There is no checkpoint yet."
    return f"Go on with: {args.resume_command}"


if __name__ == "__main__":
    sys.exit(main())
