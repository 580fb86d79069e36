# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures an RBI model, or any image classifier, with different neighbors of each image.

    python -m training.assess --model outputs/mine --train_dir images --output_dir outputs/assess

Protocols: single (no neighbors), reference (the model's references), shuffled (random batches) and sorted
(class-ordered batches). Writes results.json, results.csv, per_class.csv and figures to `--output_dir`.

Exit code 0: success. 1: model, data and arguments do not match. 2: invalid arguments.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import PreTrainedConfig, TrainingArguments

from modeling_rbi import RBIConfig, UserError

from .cli import parse_arguments, run_command
from .data.arguments import DataArguments
from .data.checks import check_images, drop_bad, refuse_bad
from .data.decode import decode_image
from .data.form import SPLITS, fingerprint, labels_of
from .data.image_dataset import ImageDataset
from .data.reading import load_images
from .data.transforms import EvalTransform, processed_size
from .evaluation.assessment import Assessment, assess
from .evaluation.classifiers import (
    class_names,
    count_in_bank,
    in_order_of_content,
    load_classifier,
    load_config,
    match_labels,
    predict_from,
)
from .evaluation.features import extract
from .evaluation.protocols import BATCH_PROTOCOLS, PROTOCOLS, check_sizes
from .evaluation.report import FILES, PROGRAM, RESULTS_FILE, as_json, plot, results_table, write_tables
from .files import check_output_dir, filled_whole, write_json
from .record import describe_environment, resolved_arguments, weights_fingerprint


DEFAULT_BATCH_SIZES = (8, 16, 32, 64, 128)


@dataclass
class AssessmentArguments:
    r"""
    What to measure, and how.

    Raises:
        UserError: if a value is out of range.
    """

    model: str = field(metadata={"help": "Folder or Hub repository of an RBI model or another image classifier."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    split: str = field(default="test", metadata={"help": "Images to measure on.", "choices": list(SPLITS)})
    protocols: list[str] | None = field(
        default=None,
        metadata={
            "help": "Neighbors of each image. Default: all protocols that the model supports.",
            "choices": list(PROTOCOLS),
        },
    )
    batch_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Approximate numbers of images that attend to each other under shuffled and sorted. Default: "
            f"{', '.join(map(str, DEFAULT_BATCH_SIZES))}, up to the number of images."
        },
    )
    num_shuffles: int = field(default=5, metadata={"help": "Number of random orders of the images, at least 2."})
    resamples: int = field(default=1000, metadata={"help": "Number of bootstrap resamples, at least 100."})
    seed: int = field(
        default=42, metadata={"help": "Random seed. It also selects the validation images, as in training."}
    )
    output_dir: str = field(
        default="outputs/assess",
        metadata={"help": "Folder for tables and figures. It must be new or hold an assessment, which is replaced."},
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Images per step of the backbone. It does not change the results."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Number of processes that read images. 0: the main process."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})

    def __post_init__(self):
        for name, least in (
            ("num_shuffles", 2),
            ("resamples", 100),
            ("seed", 0),
            ("per_device_eval_batch_size", 1),
            ("dataloader_num_workers", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.batch_sizes is not None:
            self.batch_sizes = sorted(set(self.batch_sizes))
            if self.batch_sizes[0] < 2:
                raise UserError(
                    f"--batch_sizes must be at least 2, got {self.batch_sizes[0]}: for single images, use "
                    "--protocols single."
                )


@dataclass(frozen=True)
class Plan:
    """Protocols and batch sizes to measure, and the reason for each one left out."""

    protocols: list[str]
    batch_sizes: list[int]
    left_out: dict[str, str]


def run(
    args: AssessmentArguments, data: DataArguments, start: float | None = None
) -> tuple[Assessment, dict[str, Any]]:
    r"""
    Loads the model and the images, measures, and writes all files.

    Args:
        args (`AssessmentArguments`):
            What to measure.
        data (`DataArguments`):
            Where the images are.
        start (`float`, *optional*):
            Start of the command, by `time.perf_counter`.

    Returns:
        The assessment, and the content of `results.json`.

    Raises:
        BadDataError: if the data or some of its images are unusable. It names the images.
        UserError, OSError: if model, data and arguments do not match. Raised before the backbone runs.
    """
    start = time.perf_counter() if start is None else start
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, "an assessment", FILES, _is_assessment)
    config = load_config(args.model, args.model_revision)
    choose_protocols(config, args.protocols)  # before the images are read
    images = load_images(data, args.seed)
    _fit(images, config, args)  # before the images are decoded
    report = check_images(images, max_pixels=data.max_pixels, allow_missing_classes=data.allow_missing_classes)
    if data.skip_bad_images:
        images = drop_bad(images, report)
    else:
        refuse_bad(report)
    split, class_numbers, plan = _fit(images, config, args)
    # Results must not depend on the order in which the data are read.
    split = in_order_of_content(split)
    model, image_processor = load_classifier(args.model, args.model_revision, config)
    processed_size(image_processor)
    training = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    checked = time.perf_counter()

    extracted = extract(
        model,
        ImageDataset(
            split, EvalTransform(image_processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels
        ),
        args.per_device_eval_batch_size,
        training.device,
        args.dataloader_num_workers,
        progress=not args.disable_tqdm,
    )
    assessment = assess(
        predict_from(model, extracted),
        class_numbers[extracted.labels],
        plan.protocols,
        plan.batch_sizes,
        args.num_shuffles,
        args.resamples,
        args.seed,
        progress=not args.disable_tqdm,
    )
    measured = time.perf_counter()

    content = {
        "program": PROGRAM,
        "model": {
            "name": args.model,
            "type": config.model_type,
            "classes": config.num_labels,
            "references": getattr(config, "references", None),
            "weights": weights_fingerprint(model),
        },
        "data": {
            "split": args.split,
            "images": len(split),
            "classes": len(labels_of(split).unique()),
            "fingerprint": fingerprint(datasets.DatasetDict({args.split: split})),
            "left_out": len(report.rows_to_leave_out().get(args.split, [])) if data.skip_bad_images else 0,
        },
        "arguments": resolved_arguments(args, data),
        "environment": describe_environment(training),
        "left_out": plan.left_out,
        "images_in_bank": count_in_bank(model, extracted),
        **as_json(assessment),
    }
    names = class_names(config)

    def load(row: int):
        example = split[row]
        box = example["box"] if data.crop_to_boxes else None
        return decode_image(example["image"], box=box, max_pixels=data.max_pixels)

    with filled_whole(output_dir, last=RESULTS_FILE) as draft:
        write_tables(draft, assessment, names)
        plot(draft, assessment, names, load)
        seconds = {
            "loading and checking": checked - start,
            "backbone pass": extracted.seconds,
            "protocols and intervals": measured - checked - extracted.seconds,
            "tables and figures": time.perf_counter() - measured,
            "total": time.perf_counter() - start,
        }
        content |= {"seconds": seconds, "time_ratio": seconds["total"] / extracted.seconds}
        write_json(draft / RESULTS_FILE, content)
        for name in FILES:  # remove files of an earlier assessment that this one does not write
            if not (draft / name).exists():
                (output_dir / name).unlink(missing_ok=True)
    return assessment, content


def _fit(
    images: datasets.DatasetDict, config: PreTrainedConfig, args: AssessmentArguments
) -> tuple[datasets.Dataset, torch.Tensor, Plan]:
    """Returns the split, the model's number of each of its classes, and the plan, if they match."""
    if args.split not in images:
        raise UserError(
            f"The data has no {args.split} split: choose --split {' or '.join(images)}, or name images for it."
        )
    split = images[args.split]
    return split, match_labels(split, config), make_plan(config, args, len(split))


def _is_assessment(folder: Path) -> bool:
    try:
        return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["program"] == PROGRAM
    except (OSError, ValueError, TypeError, KeyError):
        return False


def choose_protocols(config: PreTrainedConfig, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    r"""
    Protocols to measure, by default all that the model supports, and the reason why others are left out.

    Raises:
        UserError: if the model does not support a requested protocol.
    """
    impossible = {}
    if config.model_type != RBIConfig.model_type:
        reason = f"the predictions of a {config.model_type} model do not depend on the batch"
        impossible = {name: reason for name in PROTOCOLS if name != "single"}
    elif getattr(config, "references", None) is None:
        impossible = {"reference": "the model has no reference bank; `model.set_references` creates one"}
    for name in asked or ():
        if name in impossible:
            raise UserError(f"--protocols {name}: {impossible[name]}.")
    return [name for name in PROTOCOLS if name in (asked or PROTOCOLS) and name not in impossible], impossible


def make_plan(config: PreTrainedConfig, args: AssessmentArguments, num_images: int) -> Plan:
    r"""
    Protocols and batch sizes for this number of images.

    Raises:
        UserError: as [`choose_protocols`], and if a requested batch size, or every default one, exceeds the number of
            images.
    """
    protocols, left_out = choose_protocols(config, args.protocols)
    if not set(protocols) & set(BATCH_PROTOCOLS):
        return Plan(protocols, [], left_out)
    batch_sizes = args.batch_sizes or [size for size in DEFAULT_BATCH_SIZES if size <= num_images]
    if not batch_sizes:
        raise UserError(
            f"The {args.split} split has {num_images} images, fewer than the smallest batch size of "
            f"{DEFAULT_BATCH_SIZES[0]}: name smaller --batch_sizes, or --protocols single."
        )
    for size in batch_sizes:
        if size > num_images:
            raise UserError(
                f"--batch_sizes {size} is more than the {num_images} images of the {args.split} split: leave it out."
            )
    if too_large := [size for size in DEFAULT_BATCH_SIZES if size > num_images and args.batch_sizes is None]:
        left_out["batch sizes " + ", ".join(map(str, too_large))] = f"there are {num_images} images"
    check_sizes(num_images, batch_sizes, args.num_shuffles)
    return Plan(protocols, batch_sizes, left_out)


def command(argv: Sequence[str], console: Console):
    """Parses the arguments, measures, and prints the results."""
    start = time.perf_counter()
    args, data, _ = parse_arguments(argv, (AssessmentArguments, DataArguments), {}, description=__doc__)
    assessment, content = run(args, data, start)
    console.print(results_table(assessment, content["left_out"]))
    for finding in assessment.findings.values():
        console.print(finding.sentence, highlight=False)
    if number := content["images_in_bank"]:
        console.print(
            f"{number:,} of the images are also in the model's reference bank. They do not attend to themselves, but "
            "the bank was built with them."
        )
    data_facts, seconds = content["data"], content["seconds"]
    console.print(
        f"{data_facts['images']:,} images of {data_facts['classes']} classes. {seconds['total']:.1f} s in total, "
        f"{content['time_ratio']:.2f} times one backbone pass ({seconds['backbone pass']:.1f} s).\n"
        f"Tables and figures: {Path(args.output_dir).resolve()}",
        soft_wrap=True,
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
