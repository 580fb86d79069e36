# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measuring a saved model under the protocols of `training.protocols`, with intervals."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)

from modeling_rbi import RBIConfig, RBIForImageClassification, load_image_processor

from .data.checks import check_pictures, drop_bad, refuse_bad
from .data.decode import decode_image
from .data.pictures import Pictures
from .data.reading import SPLITS, DataArguments, fingerprint, iter_rows, labels_of, load_pictures
from .data.transforms import EvalTransform, processed_size
from .features import ExtractedPictures, extract, is_itself
from .files import filled_whole, names_in, write_json
from .intervals import LEVEL, METRICS, Bootstrap, Estimate, interval, mean_metrics
from .plots import ConfusedPair, plot_batch_sizes, plot_confused_pairs, plot_confusion_matrix, plot_reliability
from .protocols import (
    BATCH_PROTOCOLS,
    PROTOCOLS,
    Answers,
    Condition,
    Predict,
    check_sizes,
    count_orders,
    in_batches,
    measure,
    orders,
)
from .record import describe_environment, resolved_arguments, weights_fingerprint


PROGRAM = "training.assess"
RESULTS_FILE = "results.json"
FILES = (
    "results.csv",
    "per_class.csv",
    "batch_size.png",
    "confusion_matrix.png",
    "reliability.png",
    "confused_pairs.png",
    RESULTS_FILE,
)
DEFAULT_BATCH_SIZES = (8, 16, 32, 64, 128)
# Each difference and what it tells, see `_say`.
DIFFERENCES = {
    "leak": ("sorted", "shuffled"),
    "shuffled": ("shuffled", "single"),
    "reference": ("reference", "single"),
}
METRIC_TITLES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5",
    "macro_f1": "macro-F1",
    "calibration_error": "calibration error",
}
# The protocols whose answers are looked at class by class: the first of them that was measured.
_MOST_TELLING = ("reference", "single", "shuffled", "sorted")
_NUM_CONFUSED_PAIRS = 6
_EXAMPLES = 2
_MOST_NAMED = 5


@dataclass
class AssessmentArguments:
    r"""
    What to measure, and how.

    Raises:
        ValueError: if a value is out of its range.
    """

    model: str = field(metadata={"help": "RBI model, or any image classifier, in a folder or of the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    split: str = field(default="test", metadata={"help": "Pictures to measure on.", "choices": list(SPLITS)})
    protocols: list[str] | None = field(
        default=None,
        metadata={"help": "Who the neighbours are; by default all that the model can.", "choices": list(PROTOCOLS)},
    )
    batch_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "About how many pictures attend to each other under shuffled and sorted; by default "
            f"{', '.join(map(str, DEFAULT_BATCH_SIZES))}, as far as there are so many pictures."
        },
    )
    num_shuffles: int = field(default=5, metadata={"help": "Random orders of the pictures. At least 2."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap. At least 100."})
    seed: int = field(
        default=42, metadata={"help": "Random seed; also of what is held out for validation, as in training."}
    )
    output_dir: str = field(
        default="outputs/assess",
        metadata={"help": "Folder for tables and figures: a new one, or that of an assessment, which is replaced."},
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Pictures in a step of the backbone. It changes no result."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read pictures; 0: the main one."})
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
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.batch_sizes is not None:
            self.batch_sizes = sorted(set(self.batch_sizes))
            if self.batch_sizes[0] < 2:
                raise ValueError(
                    f"--batch_sizes must be at least 2, got {self.batch_sizes[0]}: one picture alone is the protocol "
                    "single."
                )


@dataclass(frozen=True)
class Plan:
    """The protocols and batch sizes to measure, and why others are left out."""

    protocols: list[str]
    batch_sizes: list[int]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Finding:
    r"""
    What a difference of accuracies means, in words, and what this rests on: its interval, and the number of pictures
    that are answered right under one protocol and wrong under the other.
    """

    sentence: str
    batch_size: int | None
    accuracy: Estimate
    level: float
    pictures_changed: float


@dataclass(frozen=True)
class Assessment:
    """What was measured, fractions in [0, 1]. Differences are `first - second`."""

    labels: torch.Tensor  # (n,)
    answers: dict[Condition, Answers]
    metrics: dict[Condition, dict[str, Estimate]]
    differences: dict[tuple[Condition, Condition], dict[str, Estimate]]
    findings: dict[str, Finding]

    @property
    def most_telling(self) -> Condition:
        """What a deployed model answers, if that was measured; else the largest batches."""
        protocol = next(name for name in _MOST_TELLING if any(name == each.protocol for each in self.answers))
        return max((each for each in self.answers if each.protocol == protocol), key=lambda each: each.batch_size or 0)


def run(
    args: AssessmentArguments, data: DataArguments, start: float | None = None
) -> tuple[Assessment, dict[str, Any]]:
    r"""
    Loads a model and its pictures, measures, and writes all files.

    Args:
        args (`AssessmentArguments`):
            What to measure.
        data (`DataArguments`):
            Where the pictures are.
        start (`float`, *optional*):
            When the work began, by `time.perf_counter`.

    Returns:
        What was measured, and the content of `results.json`.

    Raises:
        BadDataError: if the data cannot be measured on, or hold files that cannot be; names them.
        ValueError, OSError: if model, data and arguments do not fit each other, before the backbone runs.
    """
    start = time.perf_counter() if start is None else start
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    config = load_config(args.model, args.model_revision)
    choose_protocols(config, args.protocols)  # before the pictures are read
    pictures = load_pictures(data, args.seed)
    _fit(pictures, config, args)  # before the pictures are decoded
    report = check_pictures(pictures, max_pixels=data.max_pixels, allow_missing_classes=data.allow_missing_classes)
    if data.skip_bad_images:
        pictures = drop_bad(pictures, report)
    else:
        refuse_bad(report)
    split, class_numbers, plan = _fit(pictures, config, args)
    # By content, so that no result depends on the order in which the data come.
    split = in_order_of_content(split)
    model, image_processor = load_classifier(args.model, args.model_revision, config)
    processed_size(image_processor)
    training = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    checked = time.perf_counter()

    extracted = extract(
        model,
        Pictures(split, EvalTransform(image_processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels),
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
            "pictures": len(split),
            "classes": len(labels_of(split).unique()),
            "fingerprint": fingerprint(datasets.DatasetDict({args.split: split})),
            "left_out": len(report.rows_to_leave_out().get(args.split, [])) if data.skip_bad_images else 0,
        },
        "arguments": resolved_arguments(args, data),
        "environment": describe_environment(training),
        "left_out": plan.left_out,
        "pictures_in_bank": count_in_bank(model, extracted),
        **_as_json(assessment),
    }
    names = class_names(config)

    def load(row: int):
        example = split[row]
        box = example["box"] if data.crop_to_boxes else None
        return decode_image(example["image"], box=box, max_pixels=data.max_pixels)

    with filled_whole(output_dir, last=RESULTS_FILE) as draft:
        write_tables(draft, assessment, names)
        draw(draft, assessment, names, load)
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
    pictures: datasets.DatasetDict, config: PreTrainedConfig, args: AssessmentArguments
) -> tuple[datasets.Dataset, torch.Tensor, Plan]:
    """The split, the model's number of each of its classes, and the plan; or an error where they don't go together."""
    if args.split not in pictures:
        raise ValueError(
            f"The data has no {args.split} split: choose --split {' or '.join(pictures)}, or name pictures for it."
        )
    split = pictures[args.split]
    return split, match_labels(split, config), make_plan(config, args, len(split))


def check_output_dir(folder: Path):
    r"""
    Raises:
        ValueError: if the folder holds anything but an earlier assessment.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder.")
    names = names_in(folder)
    others = [name for name in names if name not in FILES]
    if others or (names and not _is_assessment(folder / RESULTS_FILE)):
        raise ValueError(
            f"--output_dir {folder} holds other things than an assessment ({_listed(others or names)}): name another "
            "folder."
        )


def _is_assessment(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["program"] == PROGRAM
    except (OSError, ValueError, TypeError, KeyError):
        return False


def load_config(name: str, revision: str = "main") -> PreTrainedConfig:
    r"""
    Raises:
        ValueError: if it is a folder that is not there.
        OSError: if it is no model of the Hub, or the Hub cannot be reached.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: there is no such folder.")
    return AutoConfig.from_pretrained(name, revision=revision)


def load_classifier(name: str, revision: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, Any]:
    r"""
    The model, in evaluation mode, and its image processor.

    Raises:
        ValueError: if it is no image classifier, lacks weights, which would start at random, or they cannot be read.
        OSError: if there is no such model, or no image processor beside it.
    """
    image_processor = load_image_processor(name, revision=revision)
    is_rbi = config.model_type == RBIConfig.model_type
    model_class = RBIForImageClassification if is_rbi else AutoModelForImageClassification
    try:
        model, info = model_class.from_pretrained(name, revision=revision, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"--model {name}: its weights cannot be read ({error}).") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"--model {name} lacks {len(missing)} weights of {type(model).__name__}, for instance `{missing[0]}`: it "
            "is not an image classifier that was trained, or was saved by a model of another kind."
        )
    return model.eval(), image_processor


def choose_protocols(config: PreTrainedConfig, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    r"""
    The protocols to measure a model under, by default all that there are for it, and why the others are left out.

    Raises:
        ValueError: if one is asked for that the model cannot have.
    """
    impossible = {}
    if config.model_type != RBIConfig.model_type:
        reason = f"the answers of a {config.model_type} model do not depend on the batch"
        impossible = {name: reason for name in PROTOCOLS if name != "single"}
    elif getattr(config, "references", None) is None:
        impossible = {"reference": "the model has no reference bank; `model.set_references` makes one"}
    for name in asked or ():
        if name in impossible:
            raise ValueError(f"--protocols {name}: {impossible[name]}.")
    return [name for name in PROTOCOLS if name in (asked or PROTOCOLS) and name not in impossible], impossible


def make_plan(config: PreTrainedConfig, args: AssessmentArguments, num_pictures: int) -> Plan:
    r"""
    What to measure on so many pictures.

    Raises:
        ValueError: as [`choose_protocols`], and if there are fewer pictures than a batch size that is asked for, or
            than any of the default ones.
    """
    protocols, left_out = choose_protocols(config, args.protocols)
    if not set(protocols) & set(BATCH_PROTOCOLS):
        return Plan(protocols, [], left_out)
    batch_sizes = args.batch_sizes or [size for size in DEFAULT_BATCH_SIZES if size <= num_pictures]
    if not batch_sizes:
        raise ValueError(
            f"The {args.split} split has {num_pictures} pictures, fewer than the smallest batch size of "
            f"{DEFAULT_BATCH_SIZES[0]}: name smaller --batch_sizes, or --protocols single."
        )
    for size in batch_sizes:
        if size > num_pictures:
            raise ValueError(
                f"--batch_sizes {size} is more than the {num_pictures} pictures of the {args.split} split: leave it "
                "out."
            )
    if too_large := [size for size in DEFAULT_BATCH_SIZES if size > num_pictures and args.batch_sizes is None]:
        left_out["batch sizes " + ", ".join(map(str, too_large))] = f"there are {num_pictures} pictures"
    check_sizes(num_pictures, batch_sizes, args.num_shuffles)
    return Plan(protocols, batch_sizes, left_out)


def in_order_of_content(split: datasets.Dataset) -> datasets.Dataset:
    r"""
    The pictures in an order, of no meaning, that depends on what they are and not on how they come: by a hash of
    their path below the folder that they share, or of their bytes where the data set holds them.
    """
    images, boxes = zip(*((row["image"], row.get("box")) for row in iter_rows(split)), strict=True)
    folders = {os.path.dirname(image["path"]) for image in images if image["bytes"] is None}
    root = os.path.commonpath(folders) if folders else ""
    keys = [
        hashlib.sha256(
            (image["bytes"] if image["bytes"] is not None else os.path.relpath(image["path"], root).encode())
            + json.dumps(box).encode()
        ).digest()
        for image, box in zip(images, boxes, strict=True)
    ]
    return split.select(sorted(range(len(keys)), key=keys.__getitem__))


def match_labels(split: datasets.Dataset, config: PreTrainedConfig) -> torch.Tensor:
    r"""
    The model's number of each class of the data, `(num_classes,)`, by name; -100 for classes without pictures.

    Raises:
        ValueError: if the pictures are of one class, or of classes that the model does not have.
    """
    names = split.features["label"].names
    present = labels_of(split).unique().tolist()
    if len(present) < 2:
        raise ValueError(f'All pictures are of one class, "{names[present[0]]}": there is nothing to tell apart.')
    numbers = {name: number for number, name in enumerate(class_names(config))} | (config.label2id or {})
    if unknown := [names[label] for label in present if names[label] not in numbers]:
        raise ValueError(
            f"{len(unknown)} of the {len(present)} labels of the data are none of the model's ({_listed(unknown)}; "
            f"the model has {_listed(class_names(config))}): name them alike, in the data or in `id2label` and "
            "`label2id` of the model's config."
        )
    matched = torch.full((len(names),), -100)
    matched[present] = torch.tensor([int(numbers[names[label]]) for label in present])
    if len(matched[present].unique()) < len(present):
        raise ValueError("Several labels of the data are one class of the model: see `label2id` of its config.")
    return matched


def class_names(config: PreTrainedConfig) -> list[str]:
    """Of `id2label` or, where that has but numbered names, of `label2id`."""
    named = {int(number): name for name, number in (config.label2id or {}).items()}
    names = {int(number): name for number, name in config.id2label.items()}
    return [
        named.get(number, names[number]) if names[number] == f"LABEL_{number}" else names[number]
        for number in sorted(names)
    ]


@torch.no_grad()
def count_in_bank(model: PreTrainedModel, pictures: ExtractedPictures) -> int:
    """How many of the pictures are in the model's bank themselves."""
    if not isinstance(model, RBIForImageClassification) or model.rbi.references is None:
        return 0
    number = 0
    for rows in torch.arange(len(pictures.labels)).split(256):
        pixel_values, features, _ = (values.to(model.device) for values in pictures.batch(rows))
        number += int(is_itself(model.rbi.rpe, model.rbi.references, pixel_values, features).any(1).sum())
    return number


def predict_from(model: PreTrainedModel, pictures: ExtractedPictures) -> Predict:
    """
    Logits of rows of the pictures, from their features alone; of a classifier that is not RBI, they are these. A
    picture that is in the model's bank itself does not attend to itself there.
    """

    @torch.no_grad()
    def predict(rows: torch.Tensor, relation_scope: str) -> torch.Tensor:
        pixel_values, features, _ = pictures.batch(rows)
        if not isinstance(model, RBIForImageClassification):
            return features.float()
        pixel_values, features, mask = pixel_values.to(model.device), features.to(model.device), None
        if relation_scope == "reference" and model.rbi.references is not None:
            mask = ~is_itself(model.rbi.rpe, model.rbi.references, pixel_values, features)
        output = model(
            pixel_values=pixel_values, image_features=features, relation_scope=relation_scope, reference_mask=mask
        )
        return output.logits.float().cpu()

    return predict


def assess(
    predict: Predict,
    labels: torch.Tensor,
    protocols: Sequence[str],
    batch_sizes: Sequence[int],
    num_shuffles: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Assessment:
    r"""
    Measures under each protocol, with intervals and paired differences.

    Args:
        predict (`Predict`):
            Gives the logits of one batch.
        labels (`torch.LongTensor` of shape `(n,)`):
            Classes of the pictures, as the logits have them.
        protocols (`Sequence[str]`), batch_sizes (`Sequence[int]`), num_shuffles (`int`):
            As in [`measure`].
        resamples (`int`, *optional*, defaults to 1000):
            Of the [`Bootstrap`].
        seed (`int`, *optional*, defaults to 0):
            Of shuffles and resamples.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar, on a terminal.

    Raises:
        ValueError: as [`check_sizes`].
    """
    num_orders = count_orders(protocols, batch_sizes, num_shuffles)
    disable = not (progress and sys.stderr.isatty())
    with tqdm(total=num_orders, desc="Protocols", unit=" orders", leave=False, disable=disable) as bar:
        answers = measure(predict, labels, protocols, batch_sizes, num_shuffles, seed, on_order=bar.update)
    values = {condition: mean_metrics(each) for condition, each in answers.items()}
    # `sorted` has one order alone, so its batches are drawn; for their difference, those of `shuffled` with them.
    bootstraps: dict[int | None, Bootstrap] = {None: Bootstrap(labels, resamples, seed)}
    for condition in answers:
        if condition.protocol == "sorted" and condition.batch_size is not None:
            (order,) = orders("sorted", labels, num_shuffles, seed)
            groups = in_batches(order, condition.batch_size)
            bootstraps[condition.batch_size] = Bootstrap(labels, resamples, seed, groups)

    @cache
    def resampled(condition: Condition, batches: int | None) -> dict[str, torch.Tensor]:
        return bootstraps[batches].metrics(answers[condition])

    def estimate(condition: Condition, name: str) -> Estimate:
        batches = condition.batch_size if condition.protocol == "sorted" else None
        return interval(
            name,
            values[condition][name],
            resampled(condition, batches)[name],
            degrees_of_freedom=bootstraps[batches].degrees_of_freedom,
        )

    def difference(first: Condition, second: Condition, name: str, level: float = LEVEL) -> Estimate:
        batches = first.batch_size if first.protocol == "sorted" else None
        return interval(
            name,
            values[first][name] - values[second][name],
            resampled(first, batches)[name] - resampled(second, batches)[name],
            level,
            least=-1,
            degrees_of_freedom=bootstraps[batches].degrees_of_freedom,
        )

    metrics = {
        condition: {name: estimate(condition, name) for name in METRICS}
        for condition in tqdm(answers, desc="Intervals", leave=False, disable=disable)
    }
    differences: dict[tuple[Condition, Condition], dict[str, Estimate]] = {}
    findings = {}
    for kind, (first_protocol, second_protocol) in DIFFERENCES.items():
        pairs = [
            (first, second)
            for first in answers
            for second in answers
            if (first.protocol, second.protocol) == (first_protocol, second_protocol)
            and second.batch_size in (None, first.batch_size)
        ]
        differences |= {pair: {name: difference(*pair, name) for name in METRICS} for pair in pairs}
        if pairs:
            # Of several batch sizes the clearest, so the level is that of all together (Bonferroni).
            pair = max(pairs, key=lambda pair: differences[pair]["accuracy"].clarity)
            level = 1 - (1 - LEVEL) / len(pairs)
            accuracy = difference(*pair, "accuracy", level)
            right, right_before = ((answers[each].classes == labels).double().mean(0) for each in pair)
            changed = (right - right_before).abs().sum().item()
            sentence = _say(kind, accuracy, level, changed, pair[0].batch_size, len(pairs))
            findings[kind] = Finding(sentence, pair[0].batch_size, accuracy, level, changed)
    return Assessment(labels, answers, metrics, differences, findings)


def _say(
    kind: str, accuracy: Estimate, level: float, changed: float, batch_size: int | None, num_batch_sizes: int
) -> str:
    """What a difference of accuracies tells."""
    value, low, high = (100 * number for number in (accuracy.value, accuracy.low, accuracy.high))
    amount = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if batch_size is not None:
        amount += f" at batch size {batch_size}"
    if num_batch_sizes > 1:
        amount += f" (the clearest of {num_batch_sizes} batch sizes, with an interval that allows for the choice)"
    doubt = None
    if changed == 0:
        doubt = "no picture changed between right and wrong"
    elif accuracy.contains_zero:
        doubt = "the interval contains 0"
    elif changed < math.log2(2 / (1 - level)):
        # Not even if all of them changed to the same side would a sign test tell that from chance.
        doubt = f"{changed:.1f} pictures changed between right and wrong, too few to tell"
    if kind == "leak":
        if doubt:
            return f"No leak seen: class-ordered batches change the accuracy by {amount}; {doubt}."
        if accuracy.low > 0:
            return (
                f"Class-ordered batches add {amount}: the model reads labels off its neighbours; `sorted` is not its "
                "accuracy."
            )
        return f"No leak, but class-ordered batches cost {amount}: the answers depend on the order of the pictures."
    neighbours = "random batches" if kind == "shuffled" else "the references"
    change = f"{neighbours} change the accuracy of each picture alone by {amount}"
    if doubt:
        return f"Whether relations help is open: {change}; {doubt}."
    return f"Relations {'help' if accuracy.low > 0 else 'harm'}: {change}."


def results_table(assessment: Assessment, left_out: Mapping[str, str]) -> Table:
    """Metrics in % and, below, differences in points, with their intervals."""
    table = Table(title=f"In %, with {LEVEL:.0%} intervals", caption_justify="left")
    for title in ("", "batch", *METRIC_TITLES.values()):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for condition, metrics in assessment.metrics.items():
        table.add_row(condition.protocol, _size(condition), *(_percent(metrics[name]) for name in METRIC_TITLES))
    table.add_section()
    for (first, second), metrics in assessment.differences.items():
        table.add_row(
            f"{first.protocol} - {second.protocol}",
            _size(first),
            *(_percent(metrics[name], "+") for name in METRIC_TITLES),
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    table.caption = "\n".join(
        f"Left out: {escape(', '.join(names))}, since {escape(reason)}." for reason, names in reasons.items()
    )
    return table


def _size(condition: Condition) -> str:
    return "" if condition.batch_size is None else str(condition.batch_size)


def _percent(estimate: Estimate, sign: str = "") -> str:
    # Without the sign of what rounds to 0.
    value, low, high = (round(100 * number, 1) + 0.0 for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} [{low:.1f}, {high:.1f}]"


def write_tables(folder: Path, assessment: Assessment, names: Sequence[str]):
    """Writes `results.csv`, a row for each condition, and `per_class.csv`, one for each of its classes."""
    rows: list[dict[str, Any]] = []
    for condition, metrics in assessment.metrics.items():
        row: dict[str, Any] = _columns(condition) | {
            "pictures": len(assessment.labels),
            "orders": len(assessment.answers[condition].metrics),
        }
        for name, estimate in metrics.items():
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        row["accuracy_std_over_orders"] = _std(assessment.answers[condition])
        rows.append(row)
    _write_csv(folder / "results.csv", rows)
    rows = []
    for condition, answers in assessment.answers.items():
        counts = confusion(answers, assessment.labels)
        pictures, answered, right = counts.sum(1), counts.sum(0), counts.diagonal()
        for label in ((pictures + answered)[: len(names)] > 0).nonzero().flatten().tolist():
            rows.append(
                _columns(condition)
                | {
                    "class": names[label],
                    "pictures": int(pictures[label]),
                    "answered": float(answered[label]),
                    "recall": _ratio(right[label], pictures[label]),
                    "precision": _ratio(right[label], answered[label]),
                    "f1": _ratio(2 * right[label], pictures[label] + answered[label]),
                }
            )
    _write_csv(folder / "per_class.csv", rows)


def confusion(answers: Answers, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Pictures by class (row) and answer (column), the mean over the orders, `(num_classes + 1, num_classes + 1)`; the
    last column is of no answer, the last row empty.
    """
    size = answers.num_classes + 1
    cells = (labels * size + answers.classes).flatten().bincount(minlength=size * size)
    return cells.view(size, size).double() / len(answers.classes)


def confused_pairs(answers: Answers, labels: torch.Tensor, names: Sequence[str], number: int) -> list[ConfusedPair]:
    """The pairs of classes with most pictures of one answered as the other, the worst first."""
    counts = confusion(answers, labels)[: len(names), : len(names)]
    errors = (counts + counts.T).triu(diagonal=1)
    order = errors.flatten().argsort(descending=True, stable=True)[:number].tolist()
    answered = answers.classes[0]

    def rows(label: int, answer: int) -> list[int]:
        # Of the first order; where that has none, of any.
        found = ((labels == label) & (answered == answer)).nonzero().flatten()
        if not len(found):
            found = ((labels == label) & (answers.classes == answer).any(0)).nonzero().flatten()
        return found[:_EXAMPLES].tolist()

    pairs = []
    for first, second in (divmod(cell, len(names)) for cell in order):
        if errors[first, second] > 0:
            examples = {
                "first": rows(first, first),
                "first as second": rows(first, second),
                "second as first": rows(second, first),
                "second": rows(second, second),
            }
            pairs.append(
                ConfusedPair(
                    names[first], names[second], float(counts[first, second]), float(counts[second, first]), examples
                )
            )
    return pairs


def draw(folder: Path, assessment: Assessment, names: Sequence[str], load: Callable[[int], Any]):
    """Draws the figures; that over batch sizes only where there are any. `load` gives the picture of a row."""
    curves: dict[str, dict[int | None, Estimate]] = {}
    for condition, metrics in assessment.metrics.items():
        curves.setdefault(condition.protocol, {})[condition.batch_size] = metrics["accuracy"]
    if set(curves) & set(BATCH_PROTOCOLS):
        plot_batch_sizes(folder / "batch_size.png", curves)
    shown = assessment.most_telling
    answers, labels = assessment.answers[shown], assessment.labels
    title = f"{shown}: accuracy {100 * assessment.metrics[shown]['accuracy'].value:.1f} %"
    counts = confusion(answers, labels)
    used = ((counts.sum(0) + counts.sum(1)) > 0).nonzero().flatten()
    all_names = [*names, "(no answer)"]
    plot_confusion_matrix(
        folder / "confusion_matrix.png", counts[used][:, used], [all_names[label] for label in used.tolist()], title
    )
    largest = {condition.protocol: condition for condition in assessment.answers}  # the last has the largest batches
    plot_reliability(
        folder / "reliability.png",
        {protocol: (str(condition), assessment.answers[condition]) for protocol, condition in largest.items()},
        labels,
    )
    pairs = confused_pairs(answers, labels, names, _NUM_CONFUSED_PAIRS)
    plot_confused_pairs(folder / "confused_pairs.png", pairs, load, title)


def _as_json(assessment: Assessment) -> dict[str, Any]:
    return {
        "results": [
            _columns(condition)
            | {name: asdict(estimate) for name, estimate in metrics.items()}
            | {
                "orders": list(assessment.answers[condition].metrics),
                "accuracy_std_over_orders": _std(assessment.answers[condition]),
            }
            for condition, metrics in assessment.metrics.items()
        ],
        "differences": [
            {"difference": f"{first.protocol} - {second.protocol}", "batch_size": first.batch_size}
            | {name: asdict(estimate) for name, estimate in metrics.items()}
            for (first, second), metrics in assessment.differences.items()
        ],
        "findings": {kind: asdict(finding) for kind, finding in assessment.findings.items()},
    }


def _columns(condition: Condition) -> dict[str, Any]:
    return dataclasses.asdict(condition)


def _std(answers: Answers) -> float | None:
    """Standard deviation of the accuracy over the orders, where there are several."""
    accuracies = torch.tensor([metrics["accuracy"] for metrics in answers.metrics], dtype=torch.float64)
    return accuracies.std().item() if len(accuracies) > 1 else None


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return float(part / whole) if whole else None


def _write_csv(path: Path, rows: list[dict[str, Any]]):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
