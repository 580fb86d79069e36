# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ablation: measures the effect of relations against controls without them, with one budget and the same seeds.

An arm is one training and evaluation setup. The seed fixes split, initialization and batch order, so arms are compared
seed by seed.
"""

import dataclasses
import hashlib
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import NO_LABEL, RBIConfig, RBIForImageClassification, UserError, load_image_processor

from ..cli import make_console
from ..data.arguments import DataArguments
from ..data.form import fingerprint, iter_rows, labels_of
from ..data.image_dataset import ImageDataset
from ..data.packaged.catalog import PACKAGED
from ..data.reading import load_images
from ..data.samplers import BalancedSampler
from ..data.transforms import EvalTransform
from ..evaluation.classifiers import predict_from
from ..evaluation.features import CachedImages, EightBitPixels, extract
from ..evaluation.protocols import Predict, measure
from ..files import check_output_dir, filled_whole, write_json
from ..fine_tuning.bank_trainer import BankTrainer
from ..fine_tuning.divergence import DivergedError
from ..fine_tuning.models import ModelArguments, check_model, load_model
from ..fine_tuning.run import load_data, train
from ..fine_tuning.trainer import RBITrainer, balanced_class_weights, checkpoint_to_resume
from ..record import RunRecord, describe_environment, differences, resolved_arguments
from .arguments import AblationArguments
from .arms import ARMS, Arm
from .batchformer import BatchFormerForImageClassification, BatchFormerTrainer
from .heads import FROZEN_ADVICE, Budget, TrainedHead, train_head, untrained_head
from .report import METRICS, ablation_markdown, arm_results


RESULTS_FILE = "ablation.json"
TABLE_FILE = "ablation.md"
# A rerun may have other arms and more seeds: finished ones are kept.
_EXTENDABLE = {"arms", "num_seeds"}


@dataclass(frozen=True)
class DataDraw:
    """Images of one seed: `train`, `validation`, `test` and, with `--num_unlabeled`, `unlabeled`."""

    seed: int
    images: datasets.DatasetDict
    record: dict[str, Any]


def draw_data(args: AblationArguments, seed: int) -> DataDraw:
    r"""
    Reads the images of one seed.

    Args:
        args (`AblationArguments`):
            Arguments of the ablation.
        seed (`int`):
            Seed of the split.

    Raises:
        BadDataError: if the images cannot be trained on.
        UserError: if there are no validation or test images, if there are fewer unlabeled images than requested, or
            if the batches do not fit the training images.
    """
    one = dataclasses.replace(args, training=dataclasses.replace(args.training, seed=seed))
    images, record = load_data(one)
    for part, advice in (("validation", "raise --train_val_split"), ("test", "name a test set")):
        if part not in images or len(images[part]) < 2:
            raise UserError(f"An ablation needs at least 2 {part} images: {advice}.")
    if args.options.num_unlabeled:
        images, record["unlabeled_from"] = _with_unlabeled(one, images)
        record["fingerprint"] = fingerprint(images)
    _check_batches(args, labels_of(images["train"]))
    return DataDraw(seed, images, record)


def _check_batches(args: AblationArguments, labels: torch.Tensor):
    if args.fine_tuning.batch_sampler == "shuffled":
        return
    batch_size = args.training.per_device_train_batch_size
    if batch_size > len(labels):
        raise UserError(
            f"--batch_sampler balanced: batches of {batch_size} images are larger than the training set of "
            f"{len(labels)}: lower --per_device_train_batch_size."
        )
    BalancedSampler(labels.tolist(), batch_size, images_per_class=args.fine_tuning.images_per_class)


def _with_unlabeled(args: AblationArguments, images: datasets.DatasetDict) -> tuple[datasets.DatasetDict, str]:
    """Adds the split `unlabeled`; also returns the source of its images."""
    number, seed = args.options.num_unlabeled, args.training.seed
    unused = _unused_images(args.data, images, seed)
    source = images["test"] if unused is None else unused
    if unused is None and number > len(source) - 2:
        raise UserError(
            f"--num_unlabeled {number}: the test has {len(source)} images, and must keep two of them. Lower it."
        )
    if number > len(source):
        raise UserError(f"--num_unlabeled {number}: the recipe leaves {len(source)} images unused. Lower it.")
    drawn, rest = (
        source.select(rows.sort().values.tolist())
        for rows in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tensor_split([number])
    )
    if unused is None:
        return datasets.DatasetDict(dict(images) | {"test": rest, "unlabeled": drawn}), "test"
    return datasets.DatasetDict(dict(images) | {"unlabeled": drawn}), "training images that the recipe leaves out"


def _unused_images(args: DataArguments, images: datasets.DatasetDict, seed: int) -> datasets.Dataset | None:
    """Training images of the data set that the arguments leave out; `None` if there are none."""
    whole: dict[str, Any] = {"max_train_samples": None, "train_samples_per_class": None, "max_eval_samples": None}
    packaged = PACKAGED.get(str(args.dataset_format))
    if packaged is not None and "full" in packaged.config_names:
        whole["dataset_config_name"] = "full"
    if all(getattr(args, name) == value for name, value in whole.items()):
        return None
    splits = load_images(dataclasses.replace(args, **whole), seed)
    everything = datasets.concatenate_datasets([splits[name] for name in ("train", "validation") if name in splits])
    used = {key for split in images.values() for key in _image_keys(split)}
    rows = [row for row, key in enumerate(_image_keys(everything)) if key not in used]
    return everything.select(rows) if rows else None


def _image_keys(split: datasets.Dataset) -> list[tuple[Any, ...]]:
    """Identifies each image by path, content and box."""
    return [
        (row["image"]["path"], hashlib.sha256(row["image"]["bytes"] or b"").hexdigest(), *(row.get("box") or ()))
        for row in iter_rows(split)
    ]


@dataclass(frozen=True)
class Cached:
    """Images with their features, and the row numbers, (n,), of each part."""

    images: CachedImages
    rows: dict[str, torch.Tensor]

    @classmethod
    def of_draw(cls, images: CachedImages, rows: dict[str, torch.Tensor]) -> "Cached":
        """Cached images of a draw; unlabeled ones get the label -100."""
        labels = images.labels
        if "unlabeled" in rows:
            labels = labels.index_fill(0, rows["unlabeled"], NO_LABEL)
        return cls(dataclasses.replace(images, labels=labels), rows)

    @property
    def bank(self) -> torch.Tensor:
        """Row numbers of the references: training images, then unlabeled images."""
        return torch.cat([self.rows[part] for part in ("train", "unlabeled") if part in self.rows])


def _backbone_images(args: AblationArguments, split: datasets.Dataset, processor: BaseImageProcessor) -> ImageDataset:
    data = args.data
    return ImageDataset(split, EvalTransform(processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels)


def _extract(args: AblationArguments, model: RBIForImageClassification, images: ImageDataset) -> CachedImages:
    training = args.training
    return extract(
        model,
        images,
        training.per_device_eval_batch_size,
        training.device,
        training.dataloader_num_workers,
        progress=not training.disable_tqdm,
    )


def cache_features(args: AblationArguments, draws: Sequence[DataDraw], folder: Path) -> tuple[RBIConfig, list[Cached]]:
    r"""
    Runs the frozen backbone once over each image of all seeds, and caches the features.

    Args:
        args (`AblationArguments`):
            Arguments of the ablation.
        draws (`Sequence[DataDraw]`):
            Images of each seed.
        folder (`Path`):
            Folder of the cache file, whose name is a hash of images, backbone and image size.

    Returns:
        The config of the model, and the cached images of each seed.
    """
    set_seed(args.training.seed)  # for a randomly initialized backbone
    model, processor = load_model(args.model, draws[0].record["label_names"])
    sizes = {arm.config(model.config, **args.model.rbi_fields).psnr_image_size for arm in args.arms}
    model.rbi.config.psnr_image_size = sizes.pop() if len(sizes) == 1 else None
    whole = datasets.concatenate_datasets([split for draw in draws for split in draw.images.values()])
    keys = _image_keys(whole)
    first_row: dict[tuple, int] = {}
    for row, image in enumerate(keys):
        first_row.setdefault(image, row)
    number_of = {image: number for number, image in enumerate(first_row)}
    numbers = torch.tensor([number_of[image] for image in keys])
    content = {
        "images": list(map(str, number_of)),
        "crop_to_boxes": args.data.crop_to_boxes,
        "model": resolved_arguments(dataclasses.replace(args.model, preset="paper", rbi_config=None)),
        "seed": args.training.seed if args.model.model_name_or_path is None else None,
        "pooling": model.config.pooling,
        "psnr_image_size": model.config.psnr_image_size,
    }
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"features-{name}.safetensors"
    for stale in set(folder.glob("features-*.safetensors")) - {path}:
        stale.unlink()
    if not path.exists():
        extracted = _extract(args, model, _backbone_images(args, whole.select(list(first_row.values())), processor))
        pixels = extracted.pixel_values
        with filled_whole(folder, last=path.name) as draft:
            save_file(
                {
                    "pixel_values": pixels.levels if isinstance(pixels, EightBitPixels) else pixels,
                    "features": extracted.features,
                    "labels": extracted.labels,
                },
                draft / path.name,
            )
    images = _read_features(path, model.config)
    sizes_of_parts = [len(split) for draw in draws for split in draw.images.values()]
    parts = iter(numbers.split(sizes_of_parts))
    return model.config, [Cached.of_draw(images, {name: next(parts) for name in draw.images}) for draw in draws]


def _read_features(path: Path, config: RBIConfig) -> CachedImages:
    content = load_file(path)
    pixels: Any = content["pixel_values"]
    if pixels.dtype == torch.uint8:
        levels, pixels = pixels, EightBitPixels(0, pixels.shape[1:], config)
        pixels.levels = levels
    return CachedImages(pixels, content["features"], content["labels"])


def train_frozen(
    args: AblationArguments, arm: Arm, seed: int, cached: Cached, base: RBIConfig, heads: dict[str, TrainedHead]
) -> TrainedHead:
    r"""
    Trains one arm on cached features.

    Args:
        args (`AblationArguments`):
            Arguments of the ablation.
        arm (`Arm`):
            The arm.
        seed (`int`):
            Seed of the initialization and of the batch order.
        cached (`Cached`):
            Images of this seed.
        base (`RBIConfig`):
            Config of the model whose backbone computed the features.
        heads (`dict[str, TrainedHead]`):
            Trained heads of this seed from which other arms take weights, by arm. Missing ones are trained and added.
    """
    config = arm.config(base, **args.model.rbi_fields)
    bank = cached.bank if arm.has_bank else None
    if arm.weights_of is not None:
        source = ARMS[arm.weights_of]
        head = heads.get(source.name) or train_frozen(args, source, seed, cached, base, heads)
        return _with_untrained_head(cached, head, config, bank)
    labels = cached.images.labels[cached.rows["train"]]
    head = train_head(
        cached.images,
        cached.rows["train"],
        config,
        _budget(args, labels, config.num_labels),
        seed,
        arm.train_scope,
        bank=bank,
        trains_attention=arm.trains_attention,
        self_loss_weight=arm.self_loss_weight,
        model_class=BatchFormerForImageClassification if arm.is_batchformer else RBIForImageClassification,
    )
    if arm.gives_weights:
        heads[arm.name] = head
    return head


def _with_untrained_head(
    cached: Cached, head: TrainedHead, config: RBIConfig, bank: torch.Tensor | None
) -> TrainedHead:
    untrained = untrained_head(cached.images, head, config, bank)
    return dataclasses.replace(untrained, num_parameters=head.num_parameters)


def _budget(args: AblationArguments, labels: torch.Tensor, num_labels: int) -> Budget:
    options, fine_tuning = args.options, args.fine_tuning
    return Budget(
        steps=options.frozen_steps,
        batch_size=args.training.per_device_train_batch_size,
        learning_rate=options.frozen_learning_rate,
        head_learning_rate=options.frozen_head_learning_rate,
        weight_decay=args.training.weight_decay,
        images_per_class=fine_tuning.images_per_class if fine_tuning.batch_sampler == "balanced" else None,
        class_weights=balanced_class_weights(labels.tolist(), num_labels) if fine_tuning.class_weights else None,
        label_smoothing=args.training.label_smoothing_factor,
    )


def train_end_to_end(
    args: AblationArguments,
    arm: Arm,
    draw: DataDraw,
    folder: Path,
    trained: dict[str, tuple[Cached, TrainedHead]],
) -> tuple[Cached, TrainedHead]:
    r"""
    Trains one arm end to end, in its own folder, unless that training is finished. The epoch is chosen on the
    validation images.

    Args:
        args (`AblationArguments`):
            Arguments of the ablation.
        arm (`Arm`):
            The arm.
        draw (`DataDraw`):
            Images of one seed.
        folder (`Path`):
            Folder of the ablation.
        trained (`dict[str, tuple[Cached, TrainedHead]]`):
            Trained models of this seed from which other arms take weights, by arm. Missing ones are trained and added.

    Returns:
        The images with the features of the trained backbone, and the head.
    """
    if arm.weights_of is not None:
        source = ARMS[arm.weights_of]
        cached, head = trained.get(source.name) or train_end_to_end(args, source, draw, folder, trained)
        config = arm.config(head.model.config, **args.model.rbi_fields)  # type: ignore[arg-type]
        return cached, _with_untrained_head(cached, head, config, cached.bank if arm.has_bank else None)
    output_dir = folder / arm.name / f"seed-{draw.seed}"
    record = RunRecord.read(output_dir)
    if record is None or record.get("status") != "finished":
        parts = {name: split for name, split in draw.images.items() if name != "unlabeled"}
        trainer_class: Any = BatchFormerTrainer if arm.is_batchformer else RBITrainer
        if arm.train_scope == "reference":
            trainer_class = partial(BankTrainer, unlabeled=draw.images.get("unlabeled"))
        record = train(
            args.of_run(arm, draw.seed, output_dir),
            datasets.DatasetDict(parts),
            draw.record,
            None if record is None else checkpoint_to_resume(output_dir),
            make_console(quiet=True),
            prepare_model=partial(_prepare_model, arm=arm),
            trainer_class=trainer_class,
        )
    model = RBIForImageClassification.from_pretrained(output_dir)
    whole = datasets.concatenate_datasets(list(draw.images.values()))
    processor = load_image_processor(str(output_dir))
    images = _extract(args, model, _backbone_images(args, whole, processor))
    ends = torch.tensor([len(split) for split in draw.images.values()]).cumsum(0)
    rows = torch.arange(len(whole)).tensor_split(ends[:-1])
    cached = Cached.of_draw(images, dict(zip(draw.images, rows, strict=True)))
    head = TrainedHead(
        model.cpu(),
        predict_from(model, images, exclude_self=False, only_scope="self" if arm.scopes == ("self",) else None),
        record["model"]["trainable_parameters"],
        record["results"]["train"]["runtime"],
    )
    if arm.gives_weights:
        trained[arm.name] = cached, head
    return cached, head


def _prepare_model(model: RBIForImageClassification, arm: Arm) -> RBIForImageClassification:
    if arm.is_batchformer:
        model = BatchFormerForImageClassification.from_model(model)
    model.rbi.rra.requires_grad_(arm.trains_attention)
    return model


def measure_arm(args: AblationArguments, arm: Arm, head: TrainedHead, cached: Cached, seed: int) -> dict[str, Any]:
    r"""
    Metrics of the validation and the test images under each protocol, as fractions in [0, 1].

    Raises:
        DivergedError: if an image gets logits that are not finite.
    """
    protocols = [*("single", "shuffled", "sorted"), *(["reference"] if arm.has_bank else [])]
    figures: dict[str, Any] = {"validation": {}, "test": {}}
    for part in figures:
        rows = cached.rows[part]
        predict: Predict = partial(_predict_rows, head.predict, rows)
        batch_size = min(args.training.per_device_eval_batch_size, len(rows))
        labels, num_shuffles = cached.images.labels[rows], args.options.num_shuffles
        measured = measure(predict, labels, protocols, [batch_size], num_shuffles, seed)
        for condition, predictions in measured.items():
            if (predictions.classes == predictions.num_classes).any():
                raise DivergedError(
                    f"{arm.name}, seed {seed}, gives {part} images logits that are not finite",
                    FROZEN_ADVICE if args.is_frozen else "lower --learning_rate",
                )
            metrics: dict[str, float] = {}
            for name in METRICS:
                by_order = [order[name] for order in predictions.metrics]
                metrics[name] = statistics.fmean(by_order)
                if condition.protocol == "shuffled":
                    metrics[f"{name}_std"] = statistics.stdev(by_order)
            figures[part][condition.protocol] = metrics
    return figures


def _predict_rows(predict: Predict, rows: torch.Tensor, batch: torch.Tensor, relation_scope: str) -> torch.Tensor:
    return predict(rows[batch], relation_scope)


def ablate(args: AblationArguments) -> dict[str, Any]:
    r"""
    Trains and measures all requested arms with all seeds. Arms and seeds that are finished in the output folder are
    kept.

    Args:
        args (`AblationArguments`):
            Arguments of the ablation.

    Returns:
        The content of `ablation.json`: arguments, environment and data; and for each arm the figures of each seed,
        their mean and standard deviation, and the paired differences to its control and to `plain`.

    Raises:
        UserError: for arguments or data that an ablation does not support, or for an output folder with other content.
    """
    args.check()
    folder, arms = Path(args.training.output_dir), args.arms
    before = _former_record(args, folder)
    _check_model(args.model)
    seeds = tqdm(args.seeds, desc="Reading the images of each seed", leave=False, disable=args.training.disable_tqdm)
    draws = [draw_data(args, seed) for seed in seeds]
    fingerprints = {str(draw.seed): draw.record["fingerprint"] for draw in draws}
    for seed, known in (before or {}).get("fingerprints", {}).items():
        if fingerprints.get(seed, known) != known:
            raise UserError(
                f"The data of seed {seed} differ from the data that the ablation in {folder} was started with: "
                "restore them, or name another --output_dir."
            )
    run = RunRecord(folder)
    run.update(
        status="running",
        command=args.command,
        recipes=args.recipes,
        arguments=args.resolved(),
        environment=describe_environment(args.training),
        fingerprints=(before or {}).get("fingerprints", {}) | fingerprints,
    )
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for arm, draw in _train_and_measure(args, arms, draws, folder):
        runs[arm.name].append(json.loads(_figures_file(folder, arm, draw.seed).read_text(encoding="utf-8")))
    results = {
        "command": args.command,
        "recipes": args.recipes,
        "arguments": args.resolved(),
        "environment": describe_environment(args.training),
        "data": {
            "label_names": draws[0].record["label_names"],
            "unlabeled_from": draws[0].record.get("unlabeled_from"),
            "fingerprints": fingerprints,
        },
        "seeds": args.seeds,
        "arms": {arm.name: arm_results(arm, runs) for arm in arms},
    }
    with filled_whole(folder, last=RESULTS_FILE) as draft:
        (draft / TABLE_FILE).write_text(ablation_markdown(results), encoding="utf-8")
        write_json(draft / RESULTS_FILE, results)
    run.update(status="finished")
    return results


def _train_and_measure(
    args: AblationArguments, arms: list[Arm], draws: list[DataDraw], folder: Path
) -> Iterator[tuple[Arm, DataDraw]]:
    """Goes through the arms, seed by seed, and yields each when its figures are written."""
    units = [(arm, draw) for draw in draws for arm in arms]
    base: RBIConfig | None = None
    cached_draws: list[Cached] = []
    if args.is_frozen and not all(_figures_file(folder, arm, draw.seed).exists() for arm, draw in units):
        base, cached_draws = cache_features(args, draws, folder)
    heads: dict[int, dict[str, Any]] = {}  # of the current seed, for arms that take the weights of others
    with tqdm(units, unit="arm x seed", disable=args.training.disable_tqdm) as bar:
        for number, (arm, draw) in enumerate(bar, start=1):
            path = _figures_file(folder, arm, draw.seed)
            if not path.exists():
                bar.set_description(f"{arm.name}, seed {draw.seed}: arm x seed {number} of {len(units)}")
                heads = {draw.seed: heads.get(draw.seed, {})}
                if base is not None:
                    cached = cached_draws[draws.index(draw)]
                    head = train_frozen(args, arm, draw.seed, cached, base, heads[draw.seed])
                else:
                    cached, head = train_end_to_end(args, arm, draw, folder, heads[draw.seed])
                path.parent.mkdir(exist_ok=True)
                write_json(
                    path,
                    {
                        "seed": draw.seed,
                        "seconds": head.seconds,
                        "parameters": head.num_parameters,
                        **measure_arm(args, arm, head, cached, draw.seed),
                    },
                )
                for checkpoint in (path.parent / path.stem).glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
            yield arm, draw


def _figures_file(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / arm.name / f"seed-{seed}.json"


def _check_model(args: ModelArguments):
    """Checks that the backbone exists, and that it is not an RBI model: each arm has its own head."""
    check_model(args)
    name = args.model_name_or_path
    if name is not None and not name.startswith("packaged/"):
        hub = {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.token}
        if AutoConfig.from_pretrained(name, **hub).model_type == RBIConfig.model_type:
            raise UserError(f"--model_name_or_path {name} is an RBI model, with its own head: name a backbone.")


def _former_record(args: AblationArguments, folder: Path) -> dict[str, Any] | None:
    """The record of the ablation in the folder, if there is one; it must have the same arguments."""
    record = RunRecord.read(folder) if folder.is_dir() else None
    if record is None:
        check_output_dir(folder)
        return None
    was, now = (
        {name: value for name, value in arguments.items() if name not in _EXTENDABLE}
        for arguments in (record.get("arguments", {}), args.resolved())
    )
    if changed := differences(was, now):
        raise UserError(
            f"The ablation in {folder} has other arguments: {'; '.join(changed)}. Give the same ones, or name another "
            "--output_dir."
        )
    return record


__all__ = ["ablate", "ablation_markdown"]
