# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exports a saved RBI model to ONNX or torch.export, and checks that the file gives the same logits as the model.

    python -m training.export --model outputs/mine --output_dir outputs/onnx
    python -m training.export --model outputs/mine --dtype float32 int8 --train_dir images --output_dir outputs/onnx

ONNX files have the layout of transformers.js: onnx/model.onnx (model_fp16.onnx, model_quantized.onnx), config.json and
preprocessor_config.json. With a data set, the command measures the accuracy of all files and calibrates int8 on the
training images.

Exit code 0: exported. 1: model, data and arguments do not match, or the export differs from the model; nothing is
written. 2: wrong arguments.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import RBIForImageClassification, UserError

from .cli import parse_arguments, run_command
from .data.arguments import DataArguments
from .data.checks import check_images, drop_bad, refuse_bad
from .data.reading import load_images
from .deployment.client import client_config, client_image_processor, scores_note
from .deployment.exporters import (
    CONFIG_FILE,
    DTYPES,
    FORMATS,
    ONNX_FOLDER,
    PROCESSOR_FILE,
    PROGRAM,
    PROGRAM_FILE,
    SCOPES,
    OnnxExporter,
    ProgramExporter,
    backbone_type,
    choose_scope,
    describe_export,
    describe_references,
    image_size,
    make_loader,
    measure,
    require_packages,
    results_table,
)
from .evaluation.classifiers import in_order_of_content, load_classifier, load_config, match_labels
from .files import check_output_dir, filled_whole, write_json


_NAMES = {CONFIG_FILE, PROCESSOR_FILE, ONNX_FOLDER, PROGRAM_FILE}


@dataclass
class ExportArguments:
    r"""
    Arguments of `training.export`.

    Raises:
        UserError: if a value is out of range, or values contradict each other.
    """

    model: str = field(metadata={"help": "RBI model: a folder or a repository of the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    format: str = field(
        default="onnx",
        metadata={
            "help": "onnx, or torch_export for a .pt2 file that torch.export.load reads.",
            "choices": list(FORMATS),
        },
    )
    relation_scope: str | None = field(
        default=None,
        metadata={
            "help": "What an image attends to: only itself, the model's references, or the other images of the batch "
            "(default: the model's own relation_scope).",
            "choices": list(SCOPES),
        },
    )
    dtype: list[str] | None = field(
        default=None,
        metadata={
            "help": "Precisions, one file for each (default: float32). float16 stores float16 weights and computes in "
            "float32; int8 needs images for calibration. transformers.js uses the first by default.",
            "choices": list(DTYPES),
        },
    )
    output_dir: str = field(
        default="outputs/export",
        metadata={"help": "Folder for the export: a new one, or one of an earlier export, which is replaced."},
    )
    split: str = field(
        default="test",
        metadata={"help": "Split to measure on, if a data set is given.", "choices": ["validation", "test"]},
    )
    num_calibration_images: int = field(
        default=128, metadata={"help": "Number of random training images for the calibration of int8."}
    )
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "Batch size of measurement and calibration."}
    )
    seed: int = field(
        default=42,
        metadata={"help": "Random seed of the calibration images and, as in training, of the validation split."},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})

    def __post_init__(self):
        self.dtype = list(dict.fromkeys(self.dtype or ["float32"]))
        for name, least in (("num_calibration_images", 1), ("per_device_eval_batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.dtype != ["float32"] and self.format != "onnx":
            raise UserError(
                f"--dtype {' '.join(self.dtype)} goes with --format onnx: {self.format} supports only float32."
            )


@dataclass
class MeasuringArguments(DataArguments):
    """Data set for calibration and measurement, which is optional."""

    def __post_init__(self):
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        """Whether any of the arguments differs from its default."""
        return any(getattr(self, each.name) != each.default for each in dataclasses.fields(self))


def run(args: ExportArguments, data: MeasuringArguments | None = None) -> tuple[dict[str, Any], list[str]]:
    r"""
    Exports a model, checks the files and, with a data set, measures them. Writes all files or none.

    Args:
        args (`ExportArguments`):
            Arguments of the command.
        data (`MeasuringArguments`, *optional*):
            Images to calibrate int8 and to measure on.

    Returns:
        `rbi_export` of the export's `config.json`, and notes for the user.

    Raises:
        UserError: if model, data and arguments do not match, or the export differs from the model.
        OSError: if a file cannot be read or written.
        MissingPackageError: if the packages for ONNX are not installed.
    """
    assert args.dtype is not None
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, "an export", _NAMES, _is_export)
    is_onnx = args.format == "onnx"
    if is_onnx:
        require_packages("onnx", "onnxruntime", "onnxscript")
    if data is not None and not data.is_given:
        data = None
    if data is None and args.split != "test":
        raise UserError(f"--split {args.split} needs a data set: name one, for instance with --train_dir.")
    if "int8" in args.dtype and data is None:
        raise UserError(
            "--dtype int8 needs images for calibration and for measuring its accuracy: name them, for instance with "
            "--train_dir."
        )
    config = load_config(args.model, args.model_revision)
    scope = choose_scope(args.model, config, args.relation_scope)
    splits = None if data is None else _load_labeled(args, data, config)
    model, image_processor = _load_model(args, config)
    size = image_size(image_processor)
    processor_fields, client_note = client_image_processor(image_processor, len(config.image_mean))
    notes = [note for note in (client_note if is_onnx else None, scores_note(config) if is_onnx else None) if note]

    with filled_whole(output_dir, last=CONFIG_FILE) as draft:
        exporter = OnnxExporter(model, scope, size) if is_onnx else ProgramExporter(model, scope, size)
        folder = draft / ONNX_FOLDER if is_onnx else draft
        folder.mkdir(exist_ok=True)
        exported = {"float32": exporter.export(folder)}
        if isinstance(exporter, OnnxExporter):
            if "float16" in args.dtype:
                exported["float16"] = exporter.halve(folder)
            if "int8" in args.dtype:
                assert splits is not None and data is not None
                images = _drawn(splits["train"], args.num_calibration_images, args.seed)
                loader = make_loader(images, image_processor, data, args.per_device_eval_batch_size)
                exported["int8"] = exporter.quantize(folder, (batch["pixel_values"] for batch in loader), len(loader))
        measured: dict[str, dict[str, Any]] = {}
        if splits is not None and data is not None:
            predicts = {dtype: file.predict for dtype, file in exported.items() if dtype in args.dtype}
            split = in_order_of_content(splits[args.split])
            loader = make_loader(split, image_processor, data, args.per_device_eval_batch_size)
            numbers = match_labels(split, config)
            measured = measure(exporter.reference, predicts, loader, numbers, progress=not args.disable_tqdm)
        if "float32" not in args.dtype:
            for path in exported.pop("float32").paths:
                path.unlink()
        references = describe_references(model) if scope == "reference" else None
        facts: dict[str, Any] = {
            "program": PROGRAM,
            "format": args.format,
            "relation_scope": scope,
            "answers_depend_on_batch": scope == "batch",
            "note": describe_export(model, scope),
            "backbone": backbone_type(model),
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
        # Remove an earlier export first: renaming cannot replace a folder.
        (output_dir / CONFIG_FILE).unlink(missing_ok=True)
        shutil.rmtree(output_dir / ONNX_FOLDER, ignore_errors=True)
        (output_dir / PROGRAM_FILE).unlink(missing_ok=True)
    if scope == "batch":
        notes.append("Predictions depend on the other images in a batch: a client must not batch unrelated images.")
    if references:
        copies = " and small copies" if references["has_images"] else ""
        notes.append(f"The files carry features{copies} of {references['num_references']} reference images.")
    if not is_onnx:
        notes.append("torch.export.load may run code in a .pt2 file: load only files that you trust.")
    return facts, notes


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["rbi_export"]["program"] == PROGRAM
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
            f"--model {args.model} has no image processor, which defines how images are prepared: save it there with "
            "`image_processor.save_pretrained`."
        ) from error
    # `eval` again recomputes keys and values of the references in float32.
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


def command(argv: Sequence[str], console: Console):
    """Exports and prints a table of the files."""
    args, data, _ = parse_arguments(argv, (ExportArguments, MeasuringArguments), {}, description=__doc__)
    facts, notes = run(args, data)
    console.print(results_table(facts))
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"Written: {Path(args.output_dir).resolve()}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
