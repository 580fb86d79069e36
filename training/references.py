# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gives a trained classifier a reference bank, without training it.

    python -m training.references --model outputs/mine --unlabeled_dir camera --output_dir outputs/with-references

`--model` is an RBI model, or any image classifier that RBI can be plugged into. `--unlabeled_dir` is a folder of
unlabeled images from where the model is used. With labeled data (`--train_dir` etc., as in training), the training
images join the bank, and the validation images measure how much relations help and select temperature, gain and share.
If relations do not help, nothing is written. The test images are not used. An existing bank of the model is replaced.

Exit code 0: success. 1: model, images and arguments do not match, or relations do not help. 2: invalid arguments.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import EvalPrediction, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import MAX_REFERENCES, RBIForImageClassification, UserError

from .cli import find_recipes, parse_arguments, run_command
from .data.arguments import DataArguments
from .data.checks import load_checked_images, load_unlabeled_images
from .data.decode import DEFAULT_MAX_PIXELS
from .data.form import labels_of
from .data.image_dataset import ImageDataset
from .data.transforms import EvalTransform
from .evaluation.classifiers import load_classifier, load_config, match_labels
from .evaluation.features import CachedImages, extract
from .evaluation.metrics import METRIC_TITLES, compute_metrics
from .evaluation.reference_settings import (
    MIN_FOR_FIT,
    Candidate,
    ReferenceSettings,
    candidates_for,
    fit_references,
    is_better,
    paired_gain,
    scores_with_references,
)
from .files import check_output_dir, filled_whole, write_json
from .record import REFERENCES_FILE, RunRecord, describe_environment, resolved_arguments


_SOURCES = ("--dataset_name", "--dataset_format", "--train_dir", "--train_file")


@dataclass
class ReferenceArguments:
    """The model, its references and how to choose them."""

    model: str = field(metadata={"help": "Folder or Hub repository of an RBI model or another image classifier."})
    output_dir: str = field(metadata={"help": "New folder for the model with its references."})
    unlabeled_dir: list[str] | None = field(
        default=None,
        metadata={"help": "Folders of unlabeled images for the bank, searched with their subfolders."},
    )
    num_references: int = field(
        default=1000,
        metadata={"help": "Most images to take from each folder of --unlabeled_dir, at random."},
    )
    references_per_class: int | None = field(
        default=None,
        metadata={"help": "Training images to take per class, if labeled data are given. Default: all."},
    )
    strategy: str | None = field(
        default=None,
        metadata={
            "help": "How to choose training images: balanced, herding or random.",
            "choices": ["balanced", "herding", "random"],
        },
    )
    keep_images: bool = field(
        default=True,
        metadata={"help": "Store thumbnails of the references in the model, for PSNR. False: store only features."},
    )
    use_labels: bool = field(
        default=True,
        metadata={"help": "Let the labels of training images vote if this helps on held-out images."},
    )
    force: bool = field(
        default=False, metadata={"help": "Write the model even if relations do not help on held-out images."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per step of the backbone."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Number of processes that read images. 0: the main process."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})
    seed: int = field(
        default=42, metadata={"help": "Random seed. It also selects the validation images, as in training."}
    )

    def __post_init__(self):
        for name in ("num_references", "references_per_class", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        if self.strategy == "random" and self.references_per_class is not None:
            raise UserError(
                "--references_per_class needs --strategy balanced or herding. For fewer training images regardless of "
                "class, use --max_train_samples."
            )


@dataclass
class UnlabeledArguments:
    """Options for reading images without labeled data, a subset of `DataArguments`."""

    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS, metadata={"help": "Largest number of pixels of an image to decode."}
    )
    skip_bad_images: bool = field(default=False, metadata={"help": "Leave out images that cannot be read."})


def load_rbi(args: ReferenceArguments) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    r"""
    Loads the model, converted to RBI if necessary, and its image processor.

    Raises:
        UserError, OSError: if there is no such classifier, or RBI cannot be plugged into it.
    """
    config = load_config(args.model, args.model_revision)
    model, image_processor = load_classifier(args.model, args.model_revision, config)
    if not isinstance(model, RBIForImageClassification):
        model = RBIForImageClassification.from_image_classifier(model, image_processor=image_processor)
    return model.eval(), image_processor


class _Relabeled(torch.utils.data.Dataset):
    """Images labeled with the model's class numbers."""

    def __init__(self, images: ImageDataset, numbers: torch.Tensor):
        self.images = images
        self.labels = numbers[torch.tensor(images.labels)].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.images[row] | {"labels": self.labels[row]}


def run(args: ReferenceArguments, data: DataArguments | UnlabeledArguments, console: Console) -> dict[str, Any]:
    r"""
    Builds the bank, chooses the settings, and writes the model.

    Returns:
        The content of `references.json`.

    Raises:
        UserError, OSError: if model, images and arguments do not match, or relations do not help.
    """
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    is_labeled = isinstance(data, DataArguments)
    if not args.unlabeled_dir and not is_labeled:
        raise UserError("Name images for the bank: --unlabeled_dir FOLDER, or labeled data (--train_dir etc.).")
    for name in ("references_per_class", "strategy"):
        if getattr(args, name) is not None and not is_labeled:
            raise UserError(f"--{name} is for training images: also name labeled data (--train_dir etc.).")
    model, image_processor = load_rbi(args)
    unlabeled = [
        load_unlabeled_images(folder, data.max_pixels, data.skip_bad_images) for folder in args.unlabeled_dir or []
    ]
    images = load_checked_images(data, args.seed)[0] if isinstance(data, DataArguments) else None
    numbers = None if images is None else match_labels(images["train"], model.config)
    _check_classes(model, numbers)
    model.remove_references()
    _check_size(args, images, unlabeled)
    training = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    device = training.device
    model.to(device)
    if not args.use_labels:
        model.config.reference_vote_weight = 0.0

    def prepared(split) -> ImageDataset:
        crop = isinstance(data, DataArguments) and data.crop_to_boxes and "box" in split.column_names
        return ImageDataset(split, EvalTransform(image_processor), crop_to_boxes=crop, max_pixels=data.max_pixels)

    options: dict[str, Any] = {"seed": args.seed, "batch_size": args.per_device_eval_batch_size}
    if images is not None and numbers is not None:
        strategy = args.strategy or ("random" if args.references_per_class is None else "balanced")
        labeled = _Relabeled(prepared(images["train"]), numbers)
        model.set_references(
            labeled,
            per_class=args.references_per_class,
            strategy=strategy,
            keep_images=args.keep_images,
            **options,
        )
    for split in unlabeled:
        options |= {"num_references": min(args.num_references, len(split)), "strategy": "random"}
        if model.config.references is None:
            model.set_references(prepared(split), keep_images=args.keep_images, **options)
        else:
            model.add_references(prepared(split), **options)

    record: dict[str, Any] = {
        "model": args.model,
        "run": RunRecord.read(Path(args.model)),
        "arguments": resolved_arguments(args, data),
        "references": model.describe_references(),
        "environment": describe_environment(training),
    }
    if images is not None and numbers is not None and "validation" in images:
        validation = prepared(images["validation"])
        seen = extract(
            model,
            validation,
            args.per_device_eval_batch_size,
            device,
            args.dataloader_num_workers,
            progress=not args.disable_tqdm,
        )
        held_out = CachedImages(seen.pixel_values[:], seen.features, numbers[seen.labels])
        record |= _choose(model, held_out, args, console)
    else:
        console.print("There are no held-out labeled images, so the gain of the references was not measured.")
    record["settings"] = asdict(ReferenceSettings.of(model))
    with filled_whole(output_dir, last="config.json") as draft:
        model.save_pretrained(draft)
        image_processor.save_pretrained(draft)
        write_json(draft / REFERENCES_FILE, record)
    return record


def _check_classes(model: RBIForImageClassification, numbers: torch.Tensor | None):
    """Added classes exist only in the bank, so a new bank must have references of all classes."""
    config = model.config
    known = set() if numbers is None else set(numbers.tolist())
    if config.num_added_classes and (missing := [label for label in config.id2label if label not in known]):
        raise UserError(
            "The model has classes that were added by references, and recognizes all classes by references: name "
            f"labeled data with images of each class, for instance {model.class_names[missing[0]]!r}."
        )


def _check_size(args: ReferenceArguments, images: DatasetDict | None, unlabeled: Sequence[Dataset]):
    """Refuses a bank that would be too large, before the backbone runs."""
    num_labeled = 0
    if images is not None:
        counts = labels_of(images["train"]).bincount()
        num_labeled = int(counts.clamp(max=args.references_per_class or counts.max()).sum())
    num_unlabeled = sum(min(args.num_references, len(split)) for split in unlabeled)
    if num_labeled + num_unlabeled > MAX_REFERENCES:
        raise UserError(
            f"The bank would have {num_labeled} training images and {num_unlabeled} from --unlabeled_dir, above the "
            f"limit of {MAX_REFERENCES}: set --references_per_class, or lower --num_references."
        )


def _choose(
    model: RBIForImageClassification, held_out: CachedImages, args: ReferenceArguments, console: Console
) -> dict[str, Any]:
    """Applies the settings that are best on the held-out images, and prints the gain."""
    number = len(held_out.labels)
    is_fitted = number >= MIN_FOR_FIT
    defaults = ReferenceSettings.of(model)
    settings = candidates_for(model) if is_fitted else []
    if not args.use_labels:
        settings = [each for each in settings if not each.vote_weight]
    results = fit_references(model, held_out, settings, progress=console.is_terminal and not args.disable_tqdm)
    best = min(results, key=lambda result: result.loss) if is_fitted else None
    if best is not None:
        best.settings.apply(model)
    gains = {name: paired_gain(model, held_out, name, args.seed) for name in ("accuracy", "macro_f1")}
    if not is_fitted:
        console.print(
            f"{number} held-out images are too few to choose settings (fewer than {MIN_FOR_FIT}). They remain "
            f"{asdict(defaults)}."
        )
    helps = gains["accuracy"][0] > 0 if best is None else is_better(best, len(settings)) and gains["accuracy"][0] >= 0
    console.print(_table(results, model, held_out))
    sentence = "; ".join(
        f"{METRIC_TITLES[name]} {gain:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        for name, (gain, low, high) in gains.items()
    )
    optimistic = (
        " The settings were chosen on these images, so the gain is somewhat optimistic." if is_fitted and helps else ""
    )
    console.print(f"References, on {number} held-out images: {sentence}.{optimistic}", highlight=False)
    if not helps and not args.force:
        raise UserError(
            "The held-out images do not show that relations help: nothing was written. Keep the original model, try "
            "other references, or write the model anyway with --force."
        )
    return {
        "held_out_images": number,
        "fitted": is_fitted,
        "gains": {name: dict(zip(("value", "low", "high"), gain, strict=True)) for name, gain in gains.items()},
        "candidates": [asdict(result) for result in results],
    }


def _table(results: list[Candidate], model: RBIForImageClassification, held_out: CachedImages) -> Table:
    """Metrics without relations, and with the references and the settings in the model's config."""
    table = Table(title="Held-out images, in %")
    for column in ("", *METRIC_TITLES.values()):
        table.add_column(column, justify="left" if not column else "right")
    scores = scores_with_references(model, held_out, "reference")
    with_references = compute_metrics(EvalPrediction(scores.numpy(), held_out.labels.numpy()))
    settings = ReferenceSettings.of(model)
    description = ", ".join(f"{name} {value:g}" for name, value in asdict(settings).items() if value)
    described = f"references: {description}" if description else "references"
    for title, metrics in (("no references", results[0].metrics), (described, with_references)):
        values = (metrics[name] for name in METRIC_TITLES)
        table.add_row(title, *(f"{100 * value:.2f}" for value in values))
    return table


def command(argv: Sequence[str], console: Console):
    """Parses the arguments, builds the bank, and prints what the model contains."""
    names_data = find_recipes(argv) or any(word.split("=")[0] in _SOURCES for word in argv)
    types = (ReferenceArguments, DataArguments if names_data else UnlabeledArguments)
    args, data, _ = parse_arguments(argv, types, {}, description=__doc__)
    record = run(args, data, console)
    references = record["references"]
    console.print(
        f"{references['num_references']} references, {references['num_bytes'] / 2**20:.1f} MiB, "
        f"{references['multiply_adds_per_image'] / 1e6:.1f} million multiply-adds per image."
    )
    if references["has_images"]:
        console.print(
            f"The model now contains thumbnails ({' x '.join(map(str, references['image_shape'][1:]))} pixels) "
            "of these images: publish it only if others may see them, or use --keep_images False.",
            style="bold",
        )
    place = Path(args.output_dir).resolve()
    console.print(f"Model and record: {place}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
