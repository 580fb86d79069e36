# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exports a saved RBI model to ONNX or to a program of torch.export, and checks that it answers as the model does.

    python -m training.export --model outputs/mine --output_dir outputs/onnx
    python -m training.export --model outputs/mine --dtype float32 int8 --train_dir images --output_dir outputs/onnx

ONNX comes in the layout that transformers.js loads: onnx/model.onnx (model_fp16.onnx, model_quantized.onnx),
config.json and preprocessor_config.json. With data, all files are measured on their images, and int8 is calibrated
on the training images.

Exit code 0: exported. 1: model, data and arguments do not fit each other, or the export answers otherwise than the
model: nothing is written. 2: the arguments are wrong.
"""

import dataclasses
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import RBIForImageClassification, UserError

from .cli import parse_arguments
from .data.arguments import DataArguments
from .data.checks import check_images, drop_bad, refuse_bad
from .data.reading import load_images
from .deployment.client import client_config, client_image_processor, scores_note
from .deployment.exporters import (
    _PROGRAM_FILE,
    CONFIG_FILE,
    DTYPES,
    FORMATS,
    ONNX_FOLDER,
    PROCESSOR_FILE,
    PROGRAM,
    SCOPES,
    _backbone_type,
    _image_size,
    _loader,
    _note,
    _OnnxExporter,
    _ProgramExporter,
    _references,
    _require_packages,
    choose_scope,
    measure,
    results_table,
)
from .evaluation.classifiers import in_order_of_content, load_classifier, load_config, match_labels
from .files import filled_whole, names_in, write_json


@dataclass
class ExportArguments:
    r"""
    What to export, and how.

    Raises:
        UserError: if a value is out of its range, or the values do not go together.
    """

    model: str = field(metadata={"help": "RBI model, in a folder or of the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    format: str = field(
        default="onnx",
        metadata={"help": "onnx, or torch_export: a .pt2 file for torch.export.load.", "choices": list(FORMATS)},
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Whom an image attends to: itself, the model's references, or the others of the batch; by "
            "default the model's own relation_scope.",
            "choices": list(SCOPES),
        },
    )
    dtype: list[str] | None = field(
        default=None,
        metadata={
            "help": "float32 if not given. float16: weights in half precision, arithmetic in single. int8: both in 8 "
            "bits, which needs data to calibrate it. With several there is a file of each, and transformers.js takes "
            "the first.",
            "choices": list(DTYPES),
        },
    )
    output_dir: str = field(
        default="outputs/export",
        metadata={"help": "Folder for the export: a new one, or that of another export, which is replaced."},
    )
    split: str = field(
        default="test",
        metadata={"help": "Images to measure on, if data are named.", "choices": ["validation", "test"]},
    )
    num_calibration_images: int = field(
        default=128, metadata={"help": "Training images that the ranges for int8 are taken from, drawn at random."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images in a step of the measurement."})
    seed: int = field(
        default=42, metadata={"help": "Random seed; also of what is held out for validation, as in training."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress."})

    def __post_init__(self):
        self.dtype = list(dict.fromkeys(self.dtype or ["float32"]))
        for name, least in (("num_calibration_images", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.dtype != ["float32"] and self.format != "onnx":
            raise UserError(f"--dtype {' '.join(self.dtype)} goes with --format onnx: {self.format} is float32 alone.")


@dataclass
class MeasuringArguments(DataArguments):
    """Images to calibrate and to measure on; none need be named."""

    def __post_init__(self):
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        """Whether any of the arguments is."""
        return any(getattr(self, each.name) != each.default for each in dataclasses.fields(self))


def run(args: ExportArguments, data: MeasuringArguments | None = None) -> tuple[dict[str, Any], list[str]]:
    r"""
    Exports, checks and, with data, measures; and writes all files, or none.

    Args:
        args (`ExportArguments`):
            What to export.
        data (`MeasuringArguments`, *optional*):
            Images to calibrate int8 and to measure on.

    Returns:
        What `config.json` says of the export, and remarks for its user.

    Raises:
        UserError, OSError: if model, data and arguments do not fit each other, or the export answers otherwise than
            the model.
        MissingPackageError: if the packages for ONNX are not installed.
    """
    assert args.dtype is not None
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    is_onnx = args.format == "onnx"
    if is_onnx:
        _require_packages("onnx", "onnxruntime", "onnxscript")
    if data is not None and not data.is_given:
        data = None
    if data is None and args.split != "test":
        raise UserError(f"--split {args.split} is of data: name them, for instance by --train_dir.")
    if "int8" in args.dtype and data is None:
        raise UserError(
            "--dtype int8 needs images to calibrate it and to measure what it costs: name them, for instance by "
            "--train_dir."
        )
    config = load_config(args.model, args.model_revision)
    scope = choose_scope(args.model, config, args.scope)
    splits = None if data is None else _load_labeled(args, data, config)
    model, image_processor = _load_model(args, config)
    size = _image_size(image_processor)
    processor_fields, client_note = client_image_processor(image_processor, len(config.image_mean))
    notes = [note for note in (client_note if is_onnx else None, scores_note(config) if is_onnx else None) if note]

    with filled_whole(output_dir, last=CONFIG_FILE) as draft:
        exporter = _OnnxExporter(model, scope, size) if is_onnx else _ProgramExporter(model, scope, size)
        folder = draft / ONNX_FOLDER if is_onnx else draft
        folder.mkdir(exist_ok=True)
        exported = {"float32": exporter.export(folder)}
        if isinstance(exporter, _OnnxExporter):
            if "float16" in args.dtype:
                exported["float16"] = exporter.halve(folder)
            if "int8" in args.dtype:
                assert splits is not None and data is not None
                images = _drawn(splits["train"], args.num_calibration_images, args.seed)
                loader = _loader(images, image_processor, data, args.batch_size)
                exported["int8"] = exporter.quantize(folder, (batch["pixel_values"] for batch in loader), len(loader))
        measured: dict[str, dict[str, Any]] = {}
        if splits is not None and data is not None:
            predicts = {dtype: file.predict for dtype, file in exported.items() if dtype in args.dtype}
            split = in_order_of_content(splits[args.split])
            loader = _loader(split, image_processor, data, args.batch_size)
            numbers = match_labels(split, config)
            measured = measure(exporter.reference, predicts, loader, numbers, progress=not args.disable_tqdm)
        if "float32" not in args.dtype:
            for path in exported.pop("float32").paths:
                path.unlink()
        references = _references(model) if scope == "reference" else None
        facts: dict[str, Any] = {
            "program": PROGRAM,
            "format": args.format,
            "relation_scope": scope,
            "answers_depend_on_batch": scope == "batch",
            "note": _note(model, scope),
            "backbone": _backbone_type(model),
            "references": references,
            "image_size": "dynamic" if exporter.is_dynamic else list(size),
            "files": {
                exported[dtype].path.relative_to(draft).as_posix(): {
                    "dtype": dtype,
                    "bytes": sum(path.stat().st_size for path in exported[dtype].paths),
                    "max_logit_difference": exported[dtype].difference,
                }
                | ({"measured": measured[dtype]} if dtype in measured else {})
                for dtype in args.dtype
            },
            "measured_on": None if splits is None else {"split": args.split, "images": len(splits[args.split])},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", *(("onnx", "onnxruntime", "onnxscript") if is_onnx else ()))
            },
        }
        if processor_fields is None:
            image_processor.save_pretrained(draft)
        else:
            write_json(draft / PROCESSOR_FILE, processor_fields)
        write_json(
            draft / CONFIG_FILE, client_config(config, facts, [exported[dtype] for dtype in args.dtype], is_onnx)
        )
        # Of an earlier export; a folder does not replace another one.
        (output_dir / CONFIG_FILE).unlink(missing_ok=True)
        shutil.rmtree(output_dir / ONNX_FOLDER, ignore_errors=True)
        (output_dir / _PROGRAM_FILE).unlink(missing_ok=True)
    if scope == "batch":
        notes.append("Answers depend on the other images of a batch: a client that is given several relates them.")
    if references:
        copies = " and small copies" if references["has_images"] else ""
        notes.append(f"The files carry features{copies} of {references['num_references']} reference images.")
    if not is_onnx:
        notes.append("torch.export.load may run code that a .pt2 file holds: load such files from yourself alone.")
    return facts, notes


def check_output_dir(folder: Path):
    r"""
    Raises:
        UserError: if the folder holds anything but an earlier export.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder.")
    names = names_in(folder)
    others = set(names) - {CONFIG_FILE, PROCESSOR_FILE, ONNX_FOLDER, _PROGRAM_FILE}
    if others or (names and not _is_export(folder / CONFIG_FILE)):
        listed = ", ".join((sorted(others) or names)[:5])
        raise UserError(
            f"--output_dir {folder} holds other things than an export ({listed}): name another folder. An export "
            "cannot share that of its model, as each has its own config.json."
        )


def _is_export(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rbi_export"]["program"] == PROGRAM
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _load_model(
    args: ExportArguments, config: PreTrainedConfig
) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    try:
        model, image_processor = load_classifier(args.model, args.model_revision, config)
    except OSError as error:
        if "image processor" not in str(error):
            raise
        raise UserError(
            f"--model {args.model} has no image processor, which says how its images are prepared: save it beside "
            "the model (`image_processor.save_pretrained`)."
        ) from error
    # In evaluation again, so that keys and values of the references are of this precision, too.
    return model.float().eval(), image_processor


def _load_labeled(args: ExportArguments, data: DataArguments, config: PreTrainedConfig) -> datasets.DatasetDict:
    images = load_images(data, args.seed)
    if args.split not in images:
        raise UserError(f"The data has no {args.split} split: choose --split validation, or name images for it.")
    match_labels(images[args.split], config)  # before the images are decoded
    report = check_images(images, max_pixels=data.max_pixels, allow_missing_classes=data.allow_missing_classes)
    if data.skip_bad_images:
        return drop_bad(images, report)
    refuse_bad(report)
    return images


def _drawn(split: datasets.Dataset, number: int, seed: int) -> datasets.Dataset:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.select(order[:number].tolist())


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
