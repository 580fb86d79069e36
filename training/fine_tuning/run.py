# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning RBI on labeled images: from arguments to a model and the record of its training."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modeling_rbi import MAX_REFERENCES, RBIForImageClassification, UserError
from modeling_rbi.errors_rbi import listed

from ..cli import make_console
from ..data import layouts
from ..data.arguments import DataArguments
from ..data.checks import load_checked_images, load_unlabeled_images
from ..data.form import fingerprint, labels_of
from ..data.image_dataset import Collator, ImageDataset, WithUnlabeled
from ..data.mixing import Mixing
from ..data.splits import stratified_folds
from ..data.tiny import make_published
from ..data.transforms import EvalTransform, TrainTransform
from ..evaluation.metrics import compute_metrics
from ..evaluation.text import mean_and_std
from ..files import check_output_dir, filled_whole, write_json
from ..record import RecordCallback, RunRecord, best_so_far, describe_environment, differences, metrics_by_epoch
from .arguments import Arguments, FineTuningArguments
from .bank_trainer import BankTrainer
from .models import load_model
from .optimization import add_lora, freeze_backbone, freeze_batch_norm, merge_lora, rbi_model, set_batch_norm_momentum
from .trainer import RBITrainer, checkpoint_to_resume, missing_parts, plan_neighborhoods
from .training_arguments import SCHEDULES_BY_METRIC


logger = logging.getLogger(__name__)

RESULTS_FILE = "all_results.json"


def prepare_output_dir(args: Arguments) -> Path | None:
    r"""
    Checks the output folder before any work is done, so that nothing in it is overwritten.

    Returns:
        The checkpoint to resume from, or `None` to start from the beginning.

    Raises:
        UserError: if the folder holds another run, or the run to resume does not exist or had other arguments.
    """
    folder, resume = Path(args.training.output_dir), args.training.resume_from_checkpoint
    record = RunRecord.read(folder) if folder.is_dir() else None
    if resume is None or str(resume).lower() == "false":
        if record is None:
            check_output_dir(folder)
            return None
        if record.get("status") == "finished":
            raise UserError(f"--output_dir {folder} holds a finished run: name another folder.")
        raise UserError(
            f"--output_dir {folder} holds an unfinished run: continue it with --resume_from_checkpoint last, or name "
            "another folder."
        )
    if record is not None and record.get("status") == "finished":
        raise UserError(f"The run in {folder} is finished: there is nothing to resume.")
    if record is not None and (changed := differences(record.get("arguments", {}), args.resolved())):
        raise UserError(
            f"The run in {folder} cannot continue with other arguments: {'; '.join(changed)}. Give the same ones, or "
            "name another --output_dir."
        )
    if str(resume).lower() in ("true", "last"):
        if record is None:
            raise UserError(f"--output_dir {folder} holds no run to resume.")
        return checkpoint_to_resume(folder) if args.run.num_folds is None else None
    checkpoint = Path(resume)
    if missing := missing_parts(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint, since it lacks "
            f"{' and '.join(missing)}: name another one, or `last`."
        )
    return checkpoint


def load_data(args: Arguments) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    r"""
    Reads and checks the images.

    Returns:
        The splits, with the images of `--unlabeled_dir` as the split `unlabeled`; and a description for the record.

    Raises:
        BadDataError: if a training on them is not possible; names the files at fault.
        UserError: if there are fewer unlabeled images than asked for.
    """
    images, report = load_checked_images(args.data, args.training.seed)
    skipped = [
        {"kind": finding.kind, "message": finding.message, "images": [place.name for place in finding.leave_out]}
        for finding in report.findings
        if finding.leave_out
    ]
    if args.fine_tuning.unlabeled_dir is not None:
        images["unlabeled"] = _load_unlabeled(args)
    return images, {
        "fingerprint": fingerprint(images),
        "label_names": images["train"].features["label"].names,
        "cropped_to_boxes": args.data.crop_to_boxes,
        "skipped": skipped,
        "notes": [finding.message for finding in report.notes],
    }


def _load_unlabeled(args: Arguments) -> datasets.Dataset:
    """Reads the images of `--unlabeled_dir` and checks that there are enough for all processes."""
    options = args.fine_tuning
    images = load_unlabeled_images(str(options.unlabeled_dir), args.data.max_pixels, args.data.skip_bad_images)
    is_in_batches = options.train_relation_scope == "batch"
    per_batch = options.unlabeled_per_batch * args.training.world_size if is_in_batches else 0
    references = options.num_references or 0
    for name, number in (("unlabeled_per_batch", per_batch), ("num_references", references)):
        if number > len(images):
            raise UserError(
                f"--unlabeled_dir {options.unlabeled_dir} has {len(images)} images, but --{name} needs {number}"
                f"{' on all processes' if number > getattr(options, name) else ''}: lower it."
            )
    return images


def train(
    args: Arguments,
    images: datasets.DatasetDict,
    data_record: dict[str, Any],
    checkpoint: Path | None = None,
    console: Console | None = None,
    prepare_model: Callable[[RBIForImageClassification], RBIForImageClassification] | None = None,
    trainer_class: Callable[..., RBITrainer] = RBITrainer,
) -> dict[str, Any]:
    r"""
    Trains one model, keeps the best epoch by validation, tests it, and saves the model and the record of the run.

    Args:
        args (`Arguments`):
            All arguments of the training.
        images (`datasets.DatasetDict`):
            The splits from [`load_data`]: `train`; `validation`, to choose the best epoch; `test`; and `unlabeled`,
            which are neighbors in training only. All but `train` are optional.
        data_record (`dict[str, Any]`):
            Description of the data for the record.
        checkpoint (`Path`, *optional*):
            Checkpoint to resume from.
        console (`Console`, *optional*):
            Console to print to.
        prepare_model (`Callable`, *optional*):
            Changes the model before it is trained, or returns another one.
        trainer_class (`Callable`, *optional*):
            Builds the trainer from the arguments of [`RBITrainer`].

    Returns:
        `dict[str, Any]`: the record of the run.

    Raises:
        UserError: if the arguments do not fit the data or each other.
    """
    console = console or make_console(quiet=not args.training.should_log)
    set_seed(args.training.seed)
    output_dir = Path(args.training.output_dir)
    if checkpoint is not None:
        _check_same_run(RunRecord.read(output_dir), data_record, args.training)
    unlabeled = images.get("unlabeled")
    _check_references(args.fine_tuning, images["train"], data_record["label_names"])
    record = RunRecord(output_dir, args.training.should_save)
    if args.training.save_only_model:
        logger.warning("With --save_only_model, this run cannot be continued if it is stopped.")
    arguments = args.resolved()  # the trainer changes them later
    model, image_processor = load_model(args.model, data_record["label_names"], from_scratch=args.run.dry_run)
    if args.training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing: {type(model.rbi.backbone).__name__}, the backbone, does not support it: leave "
            "it out, or choose another backbone."
        )
    if prepare_model is not None:
        model = prepare_model(model)
    if args.fine_tuning.freeze_backbone:
        freeze_backbone(model)
    if args.fine_tuning.freeze_batch_norm:
        freeze_batch_norm(model)
    if args.fine_tuning.batch_norm_momentum is not None:
        set_batch_norm_momentum(model, args.fine_tuning.batch_norm_momentum)
    trained: nn.Module = model
    if args.fine_tuning.lora_rank is not None:
        trained = add_lora(
            model, args.fine_tuning.lora_rank, args.fine_tuning.lora_alpha, args.fine_tuning.lora_dropout
        )
    if "validation" not in images:
        _check_no_validation(args)
        args.training.eval_strategy = IntervalStrategy.NO
        args.training.load_best_model_at_end = False
    make = partial(ImageDataset, crop_to_boxes=args.data.crop_to_boxes, max_pixels=args.data.max_pixels)
    parts = {
        name: make(split, EvalTransform(image_processor)) for name, split in images.items() if name != "unlabeled"
    }
    transform = TrainTransform(image_processor, args.augmentation)
    labeled = make(images["train"], transform, augment=True)
    train_set: ImageDataset | WithUnlabeled = labeled
    if args.fine_tuning.train_relation_scope == "reference":
        trainer_class = partial(BankTrainer, unlabeled=unlabeled)
    elif unlabeled is not None:
        others = ImageDataset(unlabeled, transform, augment=True, max_pixels=args.data.max_pixels)
        train_set = WithUnlabeled(labeled, others)
    callbacks: list[transformers.TrainerCallback] = [RecordCallback(record)]
    if args.fine_tuning.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.fine_tuning.early_stopping_patience))
    try:
        trainer = trainer_class(
            trained,
            args.training,
            fine_tuning=args.fine_tuning,
            train_dataset=train_set,
            eval_dataset=parts.get("validation"),
            data_collator=Collator(Mixing(args.augmentation, model.num_labels) if args.augmentation.mixes else None),
            processing_class=image_processor,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )
    # `Trainer` refuses arguments that do not fit each other, and trackers that are not installed.
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    record.update(
        status="running",
        command=args.command,
        recipes=args.recipes,
        arguments=arguments,
        seed=args.training.seed,
        environment=describe_environment(args.training),
        data=data_record,
        model={
            "backbone": _place_or_name(args.model.model_name_or_path) or args.model.backbone_fields,
            "preset": args.model.preset,
            "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            "trainable_parameters": sum(
                parameter.numel() for parameter in trained.parameters() if parameter.requires_grad
            ),
        },
        next={} if args.training.save_only_model else {"resume": args.resume_command},
    )
    console.print(
        f"{_sizes(images)} of {len(data_record['label_names'])} classes; "
        f"{record.content['model']['trainable_parameters']:,} parameters to train. Output: {output_dir.resolve()}",
        soft_wrap=True,
        highlight=False,
    )
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trained is not model:
            merge_lora(trained)
            trainer.model = trainer.model_wrapped = model
        trainer.check_weights()
        trainer.average_batch_statistics()  # the bank must be computed by the backbone that is saved
        if isinstance(trainer, BankTrainer):
            trainer.take_references(is_stale=True)  # the best epoch had another backbone
        _set_references(model, parts["train"], unlabeled, image_processor, args)
        # After a resume, this loss covers only the steps since then. The record has the loss of each epoch.
        speed = {name: value for name, value in _plain(result.metrics).items() if name != "loss"}
        results = {"train": speed} | _evaluate(trainer, parts, args)
        _save(trainer, output_dir, results)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk, keep the record of the last epoch
            record.update(
                status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
                error=f"{type(error).__name__}: {error}",
                best=best_so_far(trainer.state),
            )
        raise
    record.content.pop("error", None)
    if model.config.references is not None:
        record.content["model"]["references"] = model.describe_references()
    record.update(
        status="finished",
        metrics_by_epoch=metrics_by_epoch(trainer.state.log_history),
        best=best_so_far(trainer.state),
        results=results,
        next={"use": f'AutoModelForImageClassification.from_pretrained("{output_dir}", trust_remote_code=True)'},
    )
    if trainer.args.push_to_hub:
        _push(trainer, args)
    return record.content


def _check_no_validation(args: Arguments):
    """Refuses options that need validation images."""
    options = {
        "--early_stopping_patience": args.fine_tuning.early_stopping_patience is not None,
        "--save_strategy best": args.training.save_strategy == SaveStrategy.BEST,
        "--eval_on_start": args.training.eval_on_start,
    } | {f"--lr_scheduler_type {name}": args.training.lr_scheduler_type == name for name in SCHEDULES_BY_METRIC}
    if chosen := [name for name, is_on in options.items() if is_on]:
        raise UserError(f"{' and '.join(chosen)} needs validation images: raise --train_val_split above 0.")


def _check_references(options: FineTuningArguments, train_set: datasets.Dataset, label_names: list[str]):
    r"""
    Checks that the trained model can be given the reference bank that the arguments ask for.

    Raises:
        UserError: if a class has no training images, or the bank would be too large.
    """
    size = options.num_references or 0
    if options.references_per_class is not None:
        counts = labels_of(train_set).bincount(minlength=len(label_names))
        if absent := [label_names[label] for label in (counts == 0).nonzero().flatten().tolist()]:
            raise UserError(
                f"--references_per_class needs training images of each class, but there are none of "
                f"{listed(absent)}: add some, or leave the option out."
            )
        size += int(counts.clamp(max=options.references_per_class).sum())
    if size > MAX_REFERENCES:
        raise UserError(
            f"The reference bank would have {size} images, but a model holds at most {MAX_REFERENCES}: lower "
            "--references_per_class or --num_references."
        )


def _set_references(
    model: RBIForImageClassification,
    train_set: ImageDataset,
    unlabeled: datasets.Dataset | None,
    image_processor: BaseImageProcessor,
    args: Arguments,
):
    """Gives the trained model its reference bank, of training images, unlabeled images, or both, if asked to."""
    options, seed = args.fine_tuning, args.training.seed
    model.eval()
    if options.references_per_class is not None:
        model.set_references(train_set, per_class=options.references_per_class, seed=seed)
    if options.num_references is not None and unlabeled is not None:
        put = model.set_references if options.references_per_class is None else model.add_references
        images = ImageDataset(unlabeled, EvalTransform(image_processor), max_pixels=args.data.max_pixels)
        put(images, num_references=options.num_references, strategy="random", seed=seed)


def _save(trainer: RBITrainer, output_dir: Path, results: dict[str, Any]):
    """Saves the model, its image processor and code, and the results."""
    is_writer = trainer.args.should_save
    place = filled_whole(output_dir, last="config.json") if is_writer else contextlib.nullcontext(output_dir)
    with place as draft:
        trainer.save_model(str(draft), _internal_call=True)  # a collective call if weights are sharded
        if is_writer:
            write_json(draft / RESULTS_FILE, results)


def _push(trainer: RBITrainer, args: Arguments):
    r"""
    Uploads the model and its record to the Hub with `Trainer.push_to_hub`.

    Raises:
        ConnectionError: if the upload fails. The model is already saved.
    """
    about = {
        "tasks": "image-classification",
        "tags": ["rbi"],
        "dataset": args.data.dataset_name or args.data.dataset_format,
    }
    backbone = args.model.model_name_or_path
    if backbone and not backbone.startswith("packaged/") and not Path(backbone).exists():
        about["finetuned_from"] = backbone
    try:
        trainer.push_to_hub(**{name: value for name, value in about.items() if value})
    # No error of the Hub client may lose a finished training run.
    except Exception as error:
        raise ConnectionError(
            f"the model is trained and saved, but publishing it failed ({error}). Publish it with `python -m "
            f"training.publish --model {args.training.output_dir} --repo_id {trainer.hub_model_id}`."
        ) from error


def _place_or_name(name: str | None) -> str | None:
    """The absolute path of a model in a folder, which cannot be mistaken for a name on the Hub; otherwise its name."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _check_same_run(before: dict[str, Any] | None, data_record: dict[str, Any], training: TrainingArguments):
    """Checks that a resumed run draws the same batches as without the interruption."""
    if before is None:
        return
    if before["data"]["fingerprint"] != data_record["fingerprint"]:
        raise UserError(
            "The data have changed since the run was started (other images, labels or file sizes): restore them, or "
            "start another run."
        )
    was, now = before["environment"]["hardware"], describe_environment(training)["hardware"]
    for name in ("processes", "distributed", "mixed_precision"):
        if was[name] != now[name]:
            raise UserError(
                f"The run was started with {name.replace('_', ' ')} {was[name]}, not {now[name]}: use the same."
            )


def _evaluate(trainer: RBITrainer, parts: dict[str, ImageDataset], args: Arguments) -> dict[str, dict[str, float]]:
    """
    Metrics of the validation and test images: without neighbors; with the model's references, if it has any; and, for
    the test images, in shuffled batches.
    """
    results = {}
    config = rbi_model(trainer.model).config
    usual_scope = config.relation_scope
    for part, prefix in (("validation", "validation"), ("test", "test_single")):
        if part not in parts:
            continue
        config.relation_scope = "self"
        results[prefix] = _plain(trainer.evaluate(parts[part], metric_key_prefix=prefix))
        config.relation_scope = usual_scope
        if config.references is not None:
            name = f"{part}_reference"
            config.relation_scope = "reference"
            results[name] = _plain(trainer.evaluate(parts[part], metric_key_prefix=name))
            config.relation_scope = usual_scope
    if "test" in parts and len(parts["test"]) >= args.training.world_size:
        metrics = trainer.evaluate_shuffled(parts["test"], metric_key_prefix="test_shuffled")
        results["test_shuffled"] = _plain(metrics)
    return results


def cross_validate(
    args: Arguments, num_folds: int, images: datasets.DatasetDict, data_record: dict[str, Any]
) -> dict[str, Any]:
    r"""
    Trains one model per fold, each in its own folder. Finished folds are not trained again.

    Args:
        args, images, data_record:
            As in [`train`]. The folds are made of the training and validation images together.
        num_folds (`int`):
            Number of folds, at least 2.

    Returns:
        `dict[str, Any]`: the record, with mean and standard deviation of each metric over the folds.

    Raises:
        UserError: if the run is resumed with other data or processes.
    """
    console = make_console(quiet=not args.training.should_log)
    whole = datasets.concatenate_datasets([images[name] for name in ("train", "validation") if name in images])
    folds = stratified_folds(labels_of(whole), num_folds, args.training.seed)
    output_dir = Path(args.training.output_dir)
    _check_same_run(RunRecord.read(output_dir), data_record, args.training)
    root = RunRecord(output_dir, args.training.should_save)
    root.update(
        status="running",
        command=args.command,
        recipes=args.recipes,
        arguments=args.resolved(),
        environment=describe_environment(args.training),
        data=data_record,
        next={"resume": args.resume_command},
    )
    records = []
    for number, (train_rows, validation_rows) in enumerate(folds, start=1):
        folder = output_dir / f"fold-{number}"
        record = RunRecord.read(folder)
        if record is None or record.get("status") != "finished":
            console.rule(f"Fold {number} of {len(folds)}")
            parts = {"train": whole.select(train_rows), "validation": whole.select(validation_rows)}
            parts |= {name: images[name] for name in ("test", "unlabeled") if name in images}
            one = dataclasses.replace(args, training=dataclasses.replace(args.training, output_dir=str(folder)))
            split = datasets.DatasetDict(parts)
            record = train(
                one,
                split,
                data_record | {"fingerprint": fingerprint(split)},
                None if record is None else checkpoint_to_resume(folder),
                console,
            )
        records.append(record)
    summary = {
        part: {name: mean_and_std([record["results"][part][name] for record in records]) for name in metrics}
        for part, metrics in records[0]["results"].items()
        if part != "train"
    }
    root.update(status="finished", folds=[f"fold-{number}" for number in range(1, num_folds + 1)], results=summary)
    return root.content


def dry_run(args: Arguments) -> dict[str, Any]:
    """Trains one step on made-up images, in the published layout of the data set if it has one. Keeps nothing."""
    plan_neighborhoods(args.training, args.fine_tuning)
    # It would warn that the made-up data set is smaller than the published one.
    logging.getLogger(layouts.__name__).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="rbi-dry-run-") as name:
        layout = args.data.dataset_format if args.data.dataset_format in layouts.LAYOUTS else "tiny_imagenet"
        made = make_published(str(layout), Path(name) / "data")
        data = DataArguments(
            dataset_format=layout,
            dataset_dir=str(made),
            train_val_split=args.data.train_val_split,
            crop_to_boxes=args.data.crop_to_boxes and layout == args.data.dataset_format,
        )
        by_metric = args.training.lr_scheduler_type in SCHEDULES_BY_METRIC
        training = dataclasses.replace(
            args.training,
            output_dir=str(Path(name) / "output"),
            max_steps=1,
            lr_scheduler_type="constant" if by_metric else args.training.lr_scheduler_type,
            eval_strategy="no",
            eval_on_start=False,
            save_strategy="no",
            load_best_model_at_end=False,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            dataloader_num_workers=0,
            dataloader_persistent_workers=False,
            report_to="none",
            push_to_hub=False,
        )
        fine_tuning = dataclasses.replace(
            args.fine_tuning,
            relation_batch_size=None,
            images_per_class=min(args.fine_tuning.images_per_class, 2),
            early_stopping_patience=None,
            unlabeled_per_batch=2,
        )
        if args.fine_tuning.unlabeled_dir is not None:
            fine_tuning.unlabeled_dir = str(make_published("tiny_imagenet", Path(name) / "unlabeled"))
        for option in ("references_per_class", "num_references"):
            if getattr(fine_tuning, option) is not None:
                setattr(fine_tuning, option, 1)
        small = dataclasses.replace(args, data=data, training=training, fine_tuning=fine_tuning)
        images, data_record = load_data(small)
        return train(small, images, data_record, console=make_console(quiet=True))


def _sizes(images: datasets.DatasetDict) -> str:
    return ", ".join(f"{len(split)} {name}" for name, split in images.items()) + " images"


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    """Removes the prefix that `Trainer` gives the names of metrics."""
    prefixes = ("test_single_", "test_reference_", "test_shuffled_", "validation_reference_", "validation_", "train_")
    plain = {}
    for name, value in metrics.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        plain[name.removeprefix(prefix)] = value
    return plain
