# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures a saved RBI model, or any image classifier, by who the neighbors of an image are.

    python -m training.assess --model outputs/mine --train_dir images --output_dir outputs/assess

Protocols: single (each image alone), reference (with the model's references), shuffled (random batches) and sorted
(class-ordered batches). `--output_dir` gets results.json, results.csv, per_class.csv and figures.

Exit code 0: measured. 1: model, data and arguments do not fit each other. 2: the arguments are wrong.
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
from rich.markup import escape
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
        UserError: if a value is out of its range.
    """

    model: str = field(metadata={"help": "RBI model, or any image classifier, in a folder or of the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    split: str = field(default="test", metadata={"help": "Images to measure on.", "choices": list(SPLITS)})
    protocols: list[str] | None = field(
        default=None,
        metadata={"help": "Who the neighbors are; by default all that the model can.", "choices": list(PROTOCOLS)},
    )
    batch_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "About how many images attend to each other under shuffled and sorted; by default "
            f"{', '.join(map(str, DEFAULT_BATCH_SIZES))}, as far as there are so many images."
        },
    )
    num_shuffles: int = field(default=5, metadata={"help": "Random orders of the images. At least 2."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap. At least 100."})
    seed: int = field(
        default=42, metadata={"help": "Random seed; also of what is held out for validation, as in training."}
    )
    output_dir: str = field(
        default="outputs/assess",
        metadata={"help": "Folder for tables and figures: a new one, or that of an assessment, which is replaced."},
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Images in a step of the backbone. It changes no result."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images; 0: the main one."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress."})

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
                    f"--batch_sizes must be at least 2, got {self.batch_sizes[0]}: one image alone is the protocol "
                    "single."
                )


@dataclass(frozen=True)
class Plan:
    """The protocols and batch sizes to measure, and why others are left out."""

    protocols: list[str]
    batch_sizes: list[int]
    left_out: dict[str, str]


def run(
    args: AssessmentArguments, data: DataArguments, start: float | None = None
) -> tuple[Assessment, dict[str, Any]]:
    r"""
    Loads a model and its images, measures, and writes all files.

    Args:
        args (`AssessmentArguments`):
            What to measure.
        data (`DataArguments`):
            Where the images are.
        start (`float`, *optional*):
            When the work began, by `time.perf_counter`.

    Returns:
        What was measured, and the content of `results.json`.

    Raises:
        BadDataError: if the data cannot be measured on, or hold files that cannot be; names them.
        UserError, OSError: if model, data and arguments do not fit each other, before the backbone runs.
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
    # By content, so that no result depends on the order in which the data come.
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
        for name in FILES:  # what an earlier assessment had and this one has not
            if not (draft / name).exists():
                (output_dir / name).unlink(missing_ok=True)
    return assessment, content


def _fit(
    images: datasets.DatasetDict, config: PreTrainedConfig, args: AssessmentArguments
) -> tuple[datasets.Dataset, torch.Tensor, Plan]:
    """The split, the model's number of each of its classes, and the plan; or an error where they don't go together."""
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
    The protocols to measure a model under, by default all that there are for it, and why the others are left out.

    Raises:
        UserError: if one is asked for that the model cannot have.
    """
    impossible = {}
    if config.model_type != RBIConfig.model_type:
        reason = f"the predictions of a {config.model_type} model do not depend on the batch"
        impossible = {name: reason for name in PROTOCOLS if name != "single"}
    elif getattr(config, "references", None) is None:
        impossible = {"reference": "the model has no reference bank; `model.set_references` makes one"}
    for name in asked or ():
        if name in impossible:
            raise UserError(f"--protocols {name}: {impossible[name]}.")
    return [name for name in PROTOCOLS if name in (asked or PROTOCOLS) and name not in impossible], impossible


def make_plan(config: PreTrainedConfig, args: AssessmentArguments, num_images: int) -> Plan:
    r"""
    What to measure on so many images.

    Raises:
        UserError: as [`choose_protocols`], and if there are fewer images than a batch size that is asked for, or
            than any of the default ones.
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
        console.print(escape(finding.sentence), highlight=False)
    if number := content["images_in_bank"]:
        console.print(
            f"{number:,} of the images are in the model's reference bank. They do not attend to themselves, but the "
            "bank was not made without them."
        )
    data_facts, seconds = content["data"], content["seconds"]
    console.print(
        f"{data_facts['images']:,} images of {data_facts['classes']} classes. {seconds['total']:.1f} s in all, "
        f"{content['time_ratio']:.2f} times one pass of the backbone over them ({seconds['backbone pass']:.1f} s).\n"
        f"Tables and figures: {escape(str(Path(args.output_dir).resolve()))}",
        soft_wrap=True,
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
