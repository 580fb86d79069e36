# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Reads labeled images from folders, files, the Hub and published data sets into one form; see `form.py`."""

import logging
from collections import Counter
from pathlib import Path

import datasets

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed, normalized

from .arguments import DataArguments, check_column, nearest_first
from .folders import SPLIT_NAMES, natural_key, read_folders
from .form import (
    BOX,
    IMAGE,
    SPLITS,
    BadDataError,
    classes_missing_from,
    column_values,
    label_name,
    labels_of,
)
from .layouts import LAYOUTS
from .packaged import catalog
from .splits import draw_per_class, draw_subset, stratified_split
from .tables import read_table


logger = logging.getLogger(__name__)


def load_images(args: DataArguments, seed: int) -> datasets.DatasetDict:
    r"""
    Reads the images that the arguments name; `form.py` describes the result. No image is opened.

    If the data have no validation split, one is held out from `train`, never from `test`. A split without labels is
    left out with a warning. The column `box` exists only with `crop_to_boxes`.

    Args:
        args (`DataArguments`):
            Where the images are, and which of them to use.
        seed (`int`):
            Random seed of all draws: of the images held out for validation, and of the images of a smaller set.

    Raises:
        BadDataError: if the data cannot be trained on: no images, only one class, labels that `train` lacks, classes
            without validation images, missing files.
        UserError, OSError: if the arguments do not fit the data: no such data, folder, file or column.
    """
    splits = _read(args, seed)
    if "train" not in splits:
        raise BadDataError(f"The data have no training split, only {listed(splits)}.")
    splits = {name: splits[name] for name in SPLITS if name in splits}
    images = _with_labels(splits)
    if args.crop_to_boxes:
        without = [name for name, split in images.items() if "box" not in split.column_names]
        if without:
            raise UserError(f"--crop_to_boxes needs a box for each image: {listed(without)} has none.")
    else:
        images = {
            name: split.remove_columns("box") if "box" in split.column_names else split
            for name, split in images.items()
        }
    _check_classes(images)
    if "validation" not in images and args.train_val_split:
        train, held_out = stratified_split(labels_of(images["train"]), args.train_val_split, seed)
        if not len(held_out):
            raise BadDataError(
                "No class has two training images, one to train on and one for validation: name validation data, "
                "or set --train_val_split 0."
            )
        images["validation"] = images["train"].select(held_out)
        images["train"] = images["train"].select(train)
    _check_validation(images, args)
    return datasets.DatasetDict({name: _fewer(name, images[name], args, seed) for name in SPLITS if name in images})


def _read(args: DataArguments, seed: int) -> dict[str, datasets.Dataset]:
    """The splits with the columns `image`, `label` as in the data, and `box` if there is one."""
    if args.dataset_name is not None:
        return _read_dataset(args)
    if args.train_dir is not None:
        return read_folders(args)
    if args.train_file is not None:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        return {name: read_table(Path(path), args) for name, path in files.items() if path is not None}
    return dict(_read_format(args, seed))


def _read_format(args: DataArguments, seed: int) -> datasets.DatasetDict:
    name = args.dataset_format
    if name in LAYOUTS:
        if args.dataset_dir is None:
            raise UserError(f"--dataset_format {name} needs --dataset_dir, the archive or folder of the data set.")
        if args.dataset_config_name is not None:
            raise UserError(f"--dataset_format {name} has no configurations: leave --dataset_config_name out.")
        return LAYOUTS[name](Path(args.dataset_dir))
    if name in catalog.PACKAGED:
        if args.dataset_dir is not None:
            raise UserError(f"--dataset_format {name} installs by package name: leave --dataset_dir out.")
        return catalog.load(name, args.dataset_config_name, seed)
    known = [*LAYOUTS, *catalog.PACKAGED]
    raise UserError(f"There is no --dataset_format {name}: choose {listed(nearest_first(str(name), known))}.")


def _read_dataset(args: DataArguments) -> dict[str, datasets.Dataset]:
    name = str(args.dataset_name)
    saved = Path(name).is_dir() and any(
        (Path(name) / file).exists() for file in ("dataset_dict.json", "dataset_info.json", "state.json")
    )
    if saved and (args.dataset_config_name is not None or args.dataset_revision is not None):
        raise UserError(f"{name} was saved with save_to_disk: leave --dataset_config_name and --dataset_revision out.")
    try:
        if saved:
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, args.dataset_config_name, revision=args.dataset_revision)
    except IndexError as error:
        # datasets 5.2 raises this for a split without rows.
        raise BadDataError(f"{name} cannot be read; probably one of its splits has no images.") from error
    except (ValueError, RuntimeError) as error:
        if "label names are duplicated" in str(error):
            raise BadDataError(
                f"{name} has several classes of one name, which `datasets` does not load: rename them in the "
                "`ClassLabel` of its features (in README.md, dataset_info.json or the metadata of its files), or list "
                "the images in a file for --train_file."
            ) from error
        # Such as an unknown configuration, or a data set that is a script.
        raise UserError(f"The data set {name} cannot be loaded: {error}") from error
    given = dict(data) if isinstance(data, dict) else {"train": data}
    splits = {}
    for split, names in SPLIT_NAMES.items():
        found = [given_name for given_name in given if given_name.lower() in names]
        if len(found) > 1:
            raise BadDataError(f"{name} has more than one split for {split}: {listed(found)}.")
        if found:
            splits[split] = given.pop(found[0])
    if not splits and len(given) == 1:
        splits["train"] = given.popitem()[1]
    if given:
        logger.warning("Splits of %s that are neither train, validation nor test are left out: %s", name, list(given))
    return {split: _select_columns(data, args, f"{name}, {split},") for split, data in splits.items()}


def _select_columns(data: datasets.Dataset, args: DataArguments, where: str) -> datasets.Dataset:
    columns = data.column_names
    are_images = [name for name in columns if isinstance(data.features[name], datasets.Image)]
    check_column(args.image_column_name, "image_column_name", columns, where, first=are_images)
    check_column(args.label_column_name, "label_column_name", columns, where)
    if args.image_column_name == args.label_column_name:
        raise UserError(f'"{args.image_column_name}" cannot be both --image_column_name and --label_column_name.')
    feature = data.features[args.image_column_name]
    if not isinstance(feature, datasets.Image) and feature != datasets.Value("binary"):
        hint = f" Images are in {listed(are_images)}: see --image_column_name." if are_images else ""
        raise UserError(f'The column "{args.image_column_name}" of {where} holds no images, but {feature}.{hint}')
    with_box = "box" in columns and data.features["box"] == BOX
    chosen = {args.image_column_name: "image", args.label_column_name: "label"} | ({"box": "box"} if with_box else {})
    data = data.select_columns(list(chosen)).rename_columns(chosen)
    return data.cast_column("image", IMAGE)


def _with_labels(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Gives all splits the same classes: those named by the data, or the labels of `train` in natural order."""
    names_of_rows: dict[str, list[str]] = {}
    for split, data in splits.items():
        names = _label_names(split, data)
        if names is None and split == "train":
            raise BadDataError("The training images have no labels.")
        if names is None:
            logger.warning("The %s split has no labels: left out", split)
        else:
            names_of_rows[split] = names
    feature = splits["train"].features["label"]
    present = set(names_of_rows["train"])
    is_named = isinstance(feature, datasets.ClassLabel)
    classes = [normalized(name) for name in feature.names] if is_named else sorted(present, key=natural_key)
    numbers = {name: number for number, name in enumerate(classes)}
    labeled = {}
    for split, names in names_of_rows.items():
        unknown = sorted(set(names) - present, key=natural_key)
        if unknown:
            raise BadDataError(
                f"The {split} split has labels that train does not have: {listed(unknown)}. Name them as in train, "
                "or leave these images out."
            )
        if splits[split].features["label"] == datasets.ClassLabel(names=classes):
            labeled[split] = splits[split]
            continue
        labeled[split] = (
            splits[split]
            .remove_columns("label")
            .add_column("label", [numbers[name] for name in names], feature=datasets.ClassLabel(names=classes))
        )
    return labeled


def _label_names(split: str, data: datasets.Dataset) -> list[str] | None:
    """The name of the class of each row; `None` if no row has one."""
    feature, values = data.features["label"], column_values(data, "label")
    # In numbered classes, -1 means no label.
    is_numbered = str(getattr(feature, "dtype", "")).startswith("int")
    is_named = isinstance(feature, datasets.ClassLabel)
    names = [
        None
        if value is None or value != value or (is_numbered and value == -1)
        else (feature.names[value] if is_named else label_name(value, f"row {row} of {split}"))
        for row, value in enumerate(values)
    ]
    missing = names.count(None)
    if missing and missing == len(names):
        return None
    if missing:
        raise BadDataError(
            f"{missing} of the {len(names)} images of {split} have no label, the first in row {names.index(None)}: "
            "label them or leave them out."
        )
    labels = feature.names if is_named else dict.fromkeys(names)
    name_of = {label: normalized(label) for label in labels if label is not None}
    spelling: dict[str, str] = {}
    for label, name in name_of.items():
        if not name:
            raise BadDataError(f"A label of {split} is blank: {label!a}.")
        if (other := spelling.setdefault(name, label)) != label:
            raise BadDataError(
                f'The class "{name}" of {split} is spelled in two ways, {other!a} and {label!a}: use one of '
                "them for all of its images, or give the classes different names."
            )
    return [name_of[name] for name in names if name is not None]


def _check_classes(images: dict[str, datasets.Dataset]):
    for split, data in images.items():
        if not len(data):
            raise BadDataError(f"The {split} split has no images.")
    present = labels_of(images["train"]).unique()
    if len(present) < 2:
        name = images["train"].features["label"].names[present[0]]
        raise BadDataError(f'All training images are of one class, "{name}": there must be at least two.')


def _check_validation(images: dict[str, datasets.Dataset], args: DataArguments):
    if "validation" not in images or args.allow_missing_classes:
        return
    missing = classes_missing_from(images["validation"], images["train"])
    if missing:
        raise BadDataError(
            f"{len(missing)} classes have no images for validation: {listed(missing)}. Add some, or continue without "
            "them (--allow_missing_classes) or without any validation (--train_val_split 0)."
        )


def _fewer(split: str, data: datasets.Dataset, args: DataArguments, seed: int) -> datasets.Dataset:
    labels = labels_of(data)
    if split == "train" and args.train_samples_per_class is not None:
        names = data.features["label"].names
        for number, count in sorted(Counter(labels.tolist()).items()):
            if count < args.train_samples_per_class:
                raise BadDataError(
                    f'Class "{names[number]}" has {count} training images: too few for --train_samples_per_class '
                    f"{args.train_samples_per_class}."
                )
        return data.select(draw_per_class(labels, args.train_samples_per_class, seed))
    option = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_test_samples"}[split]
    size, num_classes = getattr(args, option), len(labels.unique())
    if size is None or size >= len(data):
        return data
    if size < num_classes and split != "test" and not args.allow_missing_classes:
        raise UserError(
            f"--{option} {size} cannot cover the {num_classes} classes of {split}: take at least {num_classes}, or "
            "set --allow_missing_classes."
        )
    return data.select(draw_subset(labels, size, seed))
