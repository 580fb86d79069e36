# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exports a saved RBI model to ONNX or to a program of torch.export, and checks that it answers as the model does.

    python -m training.export --model outputs/mine --output_dir outputs/onnx
    python -m training.export --model outputs/mine --dtype float32 int8 --train_dir pictures --output_dir outputs/onnx

ONNX comes in the layout that transformers.js loads: onnx/model.onnx (model_fp16.onnx, model_quantized.onnx),
config.json and preprocessor_config.json. With data, all files are measured on their pictures, and int8 is calibrated
on the training pictures.

Exit code 0: exported. 1: model, data and arguments do not fit each other, or the export answers otherwise than the
model: nothing is written. 2: the arguments are wrong.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape

from .arguments import parse_arguments
from .exporting import ExportArguments, MeasuringArguments, results_table, run


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    args = None
    try:
        args, data, _ = parse_arguments(
            sys.argv[1:] if argv is None else argv, (ExportArguments, MeasuringArguments), {}, description=__doc__
        )
        facts, notes = run(args, data)
    except KeyboardInterrupt:
        print("Stopped. Nothing was written.", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        logger.debug("Where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2 if args is None else 1
    console.print(results_table(facts))
    for note in notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print(f"Written: {escape(str(Path(args.output_dir).resolve()))}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
