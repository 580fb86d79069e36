# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures a saved RBI model, or any image classifier, by who the neighbours of a picture are.

    python -m training.assess --model outputs/mine --train_dir pictures --output_dir outputs/assess

Protocols: single (each picture alone), reference (with the model's references), shuffled (random batches) and sorted
(class-ordered batches). `--output_dir` gets results.json, results.csv, per_class.csv and figures.

Exit code 0: measured. 1: model, data and arguments do not fit each other. 2: the arguments are wrong.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape

from .arguments import parse_arguments
from .assessment import AssessmentArguments, results_table, run
from .data.reading import DataArguments


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    start = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    args = None
    try:
        args, data, _ = parse_arguments(
            sys.argv[1:] if argv is None else argv, (AssessmentArguments, DataArguments), {}, description=__doc__
        )
        assessment, content = run(args, data, start)
    except KeyboardInterrupt:
        print("Stopped. Nothing was written.", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        logger.debug("Where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2 if args is None else 1
    console.print(results_table(assessment, content["left_out"]))
    for finding in assessment.findings.values():
        console.print(escape(finding.sentence), highlight=False)
    if number := content["pictures_in_bank"]:
        console.print(
            f"{number:,} of the pictures are in the model's reference bank. They do not attend to themselves, but the "
            "bank was not made without them."
        )
    data_facts, seconds = content["data"], content["seconds"]
    console.print(
        f"{data_facts['pictures']:,} pictures of {data_facts['classes']} classes. {seconds['total']:.1f} s in all, "
        f"{content['time_ratio']:.2f} times one pass of the backbone over them ({seconds['backbone pass']:.1f} s).\n"
        f"Tables and figures: {escape(str(Path(args.output_dir).resolve()))}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
