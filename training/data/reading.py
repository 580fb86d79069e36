# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Labeled images from wherever they are, in one form.

The form is a `datasets.DatasetDict` with the splits `train` and, where there are any, `validation` and `test`. Each
has the columns `image` (`datasets.Image(decode=False)`), `label` (`datasets.ClassLabel`, the same names in all splits)
and, where boxes are published and asked for, `box` (left, top, right, bottom in pixels of the stored image).
"""

import csv
import difflib
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageFile

from modeling_rbi import NO_LABEL, UserError
from modeling_rbi.errors_rbi import listed

from .decode import DEFAULT_MAX_PIXELS
from .layouts import LAYOUTS
from .packaged import catalog as packaged
from .splits import draw_per_class, draw_subset, stratified_split


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
IMAGE = datasets.Image(decode=False)
BOX = datasets.Sequence(datasets.Value("float32"), length=4)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_HIDDEN_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin"}
_BATCH_SIZE = 1000
# Named in errors at most.

# What names a source, and the options that go with it alone.
_SOURCES = {
    "dataset_name": ("dataset_revision",),
    "dataset_format": ("dataset_dir",),
    "train_dir": ("validation_dir", "test_dir"),
    "train_file": ("validation_file", "test_file"),
}


class BadDataError(UserError):
    """Data that can't be trained on as it is; the message names what is wrong with it and the mend."""


@dataclass
class DataArguments:
    r"""
    Where the images are, and which of them to take.

    Raises:
        UserError: if not exactly one source is named, an option belongs to another source, or a number is out of
            range.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the Hub, or a folder that holds a copy of one (Parquet, Arrow or save_to_disk)."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, where it has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."}
    )
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "A published data set in the layout it is published in, with --dataset_dir "
            f"({', '.join(LAYOUTS)}), or one that installs by package name ({', '.join(packaged.PACKAGED)})."
        },
    )
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Archive or folder of the published data set named with --dataset_format."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with a folder of images for each class, or one with such folders in train/, validation/ "
            "and test/."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    test_dir: str | None = field(default=None, metadata={"help": "The same for test."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "CSV, TSV or JSON Lines file with a column of paths, relative to the file, and one of labels."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for test."})
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "Share of each class of the training images that is held out for validation where the data has "
            "no validation split of its own; 0: none."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images or their paths."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images at most, drawn at random from all classes."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for validation."})
    max_test_samples: int | None = field(default=None, metadata={"help": "The same for test."})
    train_samples_per_class: int | None = field(
        default=None, metadata={"help": "Train on this many images of each class, drawn at random."}
    )
    crop_to_boxes: bool = field(default=False, metadata={"help": "Cut the images to their published boxes."})
    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS, metadata={"help": "Largest number of pixels of an image that is decoded."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave images that the check finds unfit out, and record them."}
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Go on where classes have no images for validation."}
    )

    def __post_init__(self):
        named = [source for source in _SOURCES if getattr(self, source) is not None]
        if len(named) != 1:
            raise UserError(
                "Name the data in exactly one way: --dataset_name (the Hub, or a local copy), --dataset_format (a "
                "published layout with --dataset_dir, or a packaged data set), --train_dir (folders of images) or "
                f"--train_file (CSV or JSON Lines); got {' and '.join(f'--{source}' for source in named) or 'none'}."
            )
        for source, options in _SOURCES.items():
            for option in options:
                if source != named[0] and getattr(self, option) is not None:
                    raise UserError(f"--{option} goes with --{source}, not with --{named[0]}.")
        if self.dataset_config_name is not None and not named[0].startswith("dataset"):
            raise UserError(f"--dataset_config_name goes with --dataset_name, not with --{named[0]}.")
        if not 0 <= self.train_val_split < 1:
            raise UserError(f"--train_val_split must be at least 0 and less than 1, got {self.train_val_split}.")
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_test_samples",
            "train_samples_per_class",
            "max_pixels",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        if self.max_train_samples is not None and self.train_samples_per_class is not None:
            raise UserError("Give --max_train_samples or --train_samples_per_class, not both.")
        if self.dataset_name is not None and Path(self.dataset_name).exists():
            # A record must not take a folder for a name on the Hub.
            self.dataset_name = str(Path(self.dataset_name).resolve())


@dataclass(frozen=True)
class FolderContent:
    """
    What is in a folder with a folder for each class: absolute paths, in natural order. The class of an image is the
    folder right below `folder`, however deep it lies in there.
    """

    folder: str
    images: dict[str, list[str]]
    hidden: list[str]
    strays: list[str]
    empty_classes: list[str]


def load_images(args: DataArguments, seed: int) -> datasets.DatasetDict:
    r"""
    Reads the images that the arguments name; see the module's description for the form. No image is opened.

    Where the data has no validation split of its own, one is held out from `train`, never from `test`. A split without
    labels is left out with a warning. The column `box` is there only with `crop_to_boxes`.

    Args:
        args (`DataArguments`):
            Where the images are, and which of them to take.
        seed (`int`):
            Of all that is drawn: the images held out for validation and those of a smaller set.

    Raises:
        BadDataError: if the data can't be trained on: no images, one class, labels that `train` lacks, classes
            without images for validation, missing files.
        UserError, OSError: if the arguments don't fit the data: no such data, folder, file or column.
    """
    splits = _read(args, seed)
    if "train" not in splits:
        raise BadDataError(f"The data has no training split, only {listed(splits)}.")
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
                "No class has two training images, one to train on and one for validation: name data for "
                "validation, or set --train_val_split 0."
            )
        images["validation"] = images["train"].select(held_out)
        images["train"] = images["train"].select(train)
    _check_validation(images, args)
    return datasets.DatasetDict({name: _fewer(name, images[name], args, seed) for name in SPLITS if name in images})


def fingerprint(dataset: datasets.DatasetDict) -> dict[str, Any]:
    r"""
    What a run trained on, for its record: the number of images and classes of each split, the images of the
    smallest and of the largest class that has any, and one SHA-256 over all images.

    The hash is over split, label, box, and name and size of the file, or hash of the bytes where the data set holds
    them. Files are not read: one that was altered but kept its size goes unnoticed. Names are relative to the folder
    that the files of a split share, so the place of the data does not matter, nor does the order of the images.
    """
    rows, summary = [], {}
    for name, split in dataset.items():
        labels = labels_of(split)
        names = getattr(split.features["label"], "names", [])  # unlabeled images have none
        counts = labels[labels != NO_LABEL].bincount(minlength=len(names))
        counts = counts[counts > 0]
        summary[name] = {
            "images": len(labels),
            "classes": len(counts),
            "min_per_class": int(counts.min()) if len(counts) else 0,
            "max_per_class": int(counts.max()) if len(counts) else 0,
        }
        keys = [(_image_key(row["image"]), row["label"], row.get("box")) for row in iter_rows(split)]
        folders = {os.path.dirname(path) for (path, _), _, _ in keys if path is not None}
        root = os.path.commonpath(folders) if folders else ""
        for (path, content), label, box in keys:
            place = Path(os.path.relpath(path, root)).as_posix() if path is not None else None
            label_name = None if label == NO_LABEL else names[label]
            rows.append(json.dumps([name, label_name, box, place, content]))
    digest = hashlib.sha256("\n".join(sorted(rows)).encode())
    return {"sha256": digest.hexdigest(), "splits": summary}


def labels_of(split: datasets.Dataset) -> torch.Tensor:
    """Class of each image, `(n,)`."""
    return torch.tensor(_column(split, "label"), dtype=torch.long)


def iter_rows(split: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """All rows with no image decoded, some at a time in memory."""
    for table in split.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        yield from table.to_pylist()


def image_folders(args: DataArguments) -> dict[str, Path]:
    r"""
    The folder of each split where the data are folders of images, else none.

    Raises:
        UserError: if a folder is not there, or a split is named twice.
    """
    if args.train_dir is None:
        return {}
    given = {"train": args.train_dir, "validation": args.validation_dir, "test": args.test_dir}
    folders = {name: Path(folder) for name, folder in given.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"--{name}_dir {folder} is not a folder.")
    for name, folder in _split_folders(folders["train"]).items():
        if name != "train" and name in folders:
            raise UserError(
                f"--{name}_dir {folders[name]} and {folder} are both for {name}: give --train_dir "
                f"{folders['train'] / 'train'}, or leave --{name}_dir out."
            )
        folders[name] = folder
    return folders


def walk_folder(folder: Path) -> FolderContent:
    r"""
    Sorts what is in a folder with a folder for each class into images, by the endings that Pillow reads, and the
    rest.

    Hidden are names with a leading dot, and what Windows and macOS leave behind (`Thumbs.db`, `__MACOSX`); a hidden
    folder is not looked into. Links are followed, but not to a folder that they lie in.

    Raises:
        BadDataError: if a name is not UTF-8.
    """
    root = os.path.abspath(folder)
    images: dict[str, list[str]] = {}
    content = FolderContent(root, images, [], [], [])
    # Of each folder, itself and those that it lies in.
    above: dict[str, set[str]] = {}
    for parent, folders, files in os.walk(root, followlinks=True):
        real, outer = os.path.realpath(parent), above.get(os.path.dirname(parent), set())
        if real in outer:
            folders.clear()
            continue
        above[parent] = outer | {real}
        for names in (folders, files):
            content.hidden.extend(os.path.join(parent, name) for name in sorted(names) if _is_hidden(name))
            names[:] = sorted((name for name in names if not _is_hidden(name)), key=natural_key)
        if parent == root:
            images.update({name: [] for name in folders})
        for name in files:
            path = os.path.join(parent, name)
            if parent == root or not _is_image(path):
                content.strays.append(path)
            else:
                images[os.path.relpath(parent, root).split(os.sep)[0]].append(path)
    _refuse_other_encodings([*images, *(path for paths in images.values() for path in paths)], root)
    for name in [name for name, paths in images.items() if not paths]:
        content.empty_classes.append(os.path.join(root, name))
        del images[name]
    return content


def _refuse_other_encodings(paths: Iterable[str], folder: str):
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise BadDataError(f"A name in {folder} is not UTF-8, rename it: {path!a}.") from error


def read_unlabeled(folder: str | Path) -> datasets.Dataset:
    r"""
    All images in a folder and those in it, in the canonical form, each with the label -100.

    Raises:
        UserError: if it is no folder.
        BadDataError: if it holds no images, or a name is not UTF-8.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder.")
    content = walk_folder(Path(folder))
    loose = [path for path in content.strays if os.path.dirname(path) == content.folder and _is_image(path)]
    _refuse_other_encodings(loose, content.folder)
    paths = [*sorted(loose, key=natural_key), *(path for paths in content.images.values() for path in paths)]
    if not paths:
        raise BadDataError(f"{folder} holds no images.")
    return datasets.Dataset.from_dict(
        {"image": paths, "label": [NO_LABEL] * len(paths)},
        features=datasets.Features({"image": IMAGE, "label": datasets.Value("int64")}),
    )


def ignored_files(args: DataArguments) -> dict[str, list[str]]:
    """What is in the folders of images but no image of a class: `"hidden"`, and `"stray"`."""
    found: dict[str, list[str]] = {"hidden": [], "stray": []}
    folders = image_folders(args)
    if args.train_dir is not None and folders["train"] != Path(args.train_dir):
        for path in sorted(set(Path(args.train_dir).absolute().iterdir())):
            if path not in {folder.absolute() for folder in folders.values()}:
                found["hidden" if _is_hidden(path.name) else "stray"].append(str(path))
    for folder in folders.values():
        content = walk_folder(folder)
        found["hidden"] += content.hidden
        found["stray"] += [*content.strays, *content.empty_classes]
    return found


def natural_key(name: str) -> tuple:
    """Sorts numbers in names by value: `class2` before `class10`."""
    parts = re.split(r"(\d+)", name)
    return [(part.lower(), 0) if index % 2 == 0 else ("", int(part)) for index, part in enumerate(parts)], name


def _read(args: DataArguments, seed: int) -> dict[str, datasets.Dataset]:
    """Splits with the columns `image`, `label` as it is in the data, and `box` where there is one."""
    if args.dataset_name is not None:
        return _read_dataset(args)
    if args.train_dir is not None:
        return _read_folders(args)
    if args.train_file is not None:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        return {name: _read_file(Path(path), args) for name, path in files.items() if path is not None}
    return dict(_read_format(args, seed))


def _read_format(args: DataArguments, seed: int) -> datasets.DatasetDict:
    name = args.dataset_format
    if name in LAYOUTS:
        if args.dataset_dir is None:
            raise UserError(f"--dataset_format {name} needs --dataset_dir, the archive or folder of the data set.")
        if args.dataset_config_name is not None:
            raise UserError(f"--dataset_format {name} has no configurations: leave --dataset_config_name out.")
        return LAYOUTS[name](Path(args.dataset_dir))
    if name in packaged.PACKAGED:
        if args.dataset_dir is not None:
            raise UserError(f"--dataset_format {name} installs by package name: leave --dataset_dir out.")
        return packaged.load(name, args.dataset_config_name, seed)
    known = [*LAYOUTS, *packaged.PACKAGED]
    raise UserError(f"There is no --dataset_format {name}: choose {listed(_nearest_first(str(name), known))}.")


def _read_dataset(args: DataArguments) -> dict[str, datasets.Dataset]:
    name = str(args.dataset_name)
    saved = Path(name).is_dir() and any(
        (Path(name) / file).exists() for file in ("dataset_dict.json", "dataset_info.json", "state.json")
    )
    if saved:
        if args.dataset_config_name is not None or args.dataset_revision is not None:
            raise UserError(
                f"{name} was saved with save_to_disk: leave --dataset_config_name and --dataset_revision out."
            )
        try:
            data = datasets.load_from_disk(name)
        except IndexError as error:
            # What datasets 5.2 raises for a split without rows.
            raise BadDataError(f"{name} can't be read; probably one of its splits has no images.") from error
    else:
        data = datasets.load_dataset(name, args.dataset_config_name, revision=args.dataset_revision)
    given = dict(data) if isinstance(data, dict) else {"train": data}
    splits = {}
    for split, names in _SPLIT_NAMES.items():
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
    _check_column(args.image_column_name, "image_column_name", columns, where, first=are_images)
    _check_column(args.label_column_name, "label_column_name", columns, where)
    if args.image_column_name == args.label_column_name:
        raise UserError(f'"{args.image_column_name}" can\'t be both --image_column_name and --label_column_name.')
    feature = data.features[args.image_column_name]
    if not isinstance(feature, datasets.Image) and feature != datasets.Value("binary"):
        hint = f" Images are in {listed(are_images)}: see --image_column_name." if are_images else ""
        raise UserError(f'The column "{args.image_column_name}" of {where} holds no images, but {feature}.{hint}')
    with_box = "box" in columns and data.features["box"] == BOX
    chosen = {args.image_column_name: "image", args.label_column_name: "label"} | ({"box": "box"} if with_box else {})
    data = data.select_columns(list(chosen)).rename_columns(chosen)
    return data.cast_column("image", IMAGE)


def _read_folders(args: DataArguments) -> dict[str, datasets.Dataset]:
    # A walk of our own and not the builder `imagefolder` of datasets: that one copies nothing either, but takes the
    # folder right above an image for its class, drops the labels where depths differ, and caches its listing.
    splits = {}
    for name, folder in image_folders(args).items():
        content = walk_folder(folder)
        loose = [path for path in content.strays if os.path.dirname(path) == content.folder and _is_image(path)]
        if not content.images:
            if name == "test" and loose and args.test_dir is None:
                logger.warning("%s has no folders of classes, so its images have no labels: left out", folder)
                continue
            found = f"{len(loose)} images beside, but none in folders of classes" if loose else "no images"
            raise BadDataError(f"{folder} has {found}. It takes a folder for each class.")
        splits[name] = datasets.Dataset.from_dict(
            {
                "image": [path for paths in content.images.values() for path in paths],
                "label": [label for label, paths in content.images.items() for _ in paths],
            },
            features=datasets.Features({"image": IMAGE, "label": datasets.Value("string")}),
        )
    return splits


def _split_folders(folder: Path) -> dict[str, Path]:
    """Folders of splits in a folder; none if its folders are classes, even if one of these is called train."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))
    found: dict[str, Path] = {}
    others = []
    for path in folders:
        split = next((split for split, names in _SPLIT_NAMES.items() if path.name.lower() in names), None)
        if split is None:
            others.append(path.name)
        elif split in found:
            raise UserError(f"{found[split]} and {path} are both for {split}: name one with --{split}_dir.")
        else:
            found[split] = path
    if not found:
        return {}
    if "train" not in found or not any(
        path.is_dir() and not _is_hidden(path.name) for path in found["train"].iterdir()
    ):
        if not others:
            raise BadDataError(
                f"{folder} has nothing but {listed(path.name for path in found.values())}, and no folders of classes "
                f"in {folder / 'train'}: it takes a folder for each class in each."
            )
        return {}
    with_images = [name for name in others if any(_is_image(str(path)) for path in (folder / name).iterdir())]
    if with_images:
        raise UserError(
            f"{folder} has a folder {found['train'].name} with folders in it, beside folders of images "
            f"({listed(with_images)}): name the folders of the splits, --train_dir {found['train']}, "
            "--validation_dir and --test_dir."
        )
    if others:
        logger.warning("Folders of %s that are neither train, validation nor test are left out: %s", folder, others)
    return found


def _read_file(path: Path, args: DataArguments) -> datasets.Dataset:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} must be a {listed(readers)} file.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise BadDataError(f"{path} has no rows.")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    _check_column(args.image_column_name, "image_column_name", columns, str(path))
    _check_column(args.label_column_name, "label_column_name", columns, str(path))
    images, labels, absent = [], [], []
    for line, row in rows:
        image, label = row.get(args.image_column_name), row.get(args.label_column_name)
        if not isinstance(image, str) or not image:
            raise BadDataError(f'Line {line} of {path} has no path in "{args.image_column_name}".')
        if label is None or label == "":
            raise BadDataError(f'Line {line} of {path} has no label in "{args.label_column_name}".')
        images.append(os.path.abspath(path.parent / image))
        labels.append(_label_name(label, f"line {line} of {path}"))
        if not os.path.isfile(images[-1]):
            absent.append(images[-1])
    if absent:
        raise BadDataError(
            f"{len(absent)} of the {len(rows)} images that {path} names are not there: {listed(absent)}. Paths are "
            "relative to that file's folder."
        )
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels},
        features=datasets.Features({"image": IMAGE, "label": datasets.Value("string")}),
    )


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not by `datasets` or pandas: they would read the label 007 as the number 7.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise BadDataError(f"Line {reader.line_num} of {path} has more cells than there are columns.")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadDataError(f"{path} can't be read after line {reader.line_num}: {error}.") from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise BadDataError(f"Line {number} of {path} is not a JSON object.")
                    yield number, row
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadDataError(f"Line {number or 1} of {path} is not JSON: {error}.") from error


def _with_labels(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """The same class numbers in all splits; those of the data where they have names, else in natural order."""
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
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(present, key=natural_key)
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
    """The label of each row as text; `None` if no row has one."""
    feature, values = data.features["label"], _column(data, "label")
    # Where classes are numbered, -1 stands for none.
    is_numbered = str(getattr(feature, "dtype", "")).startswith("int")
    is_named = isinstance(feature, datasets.ClassLabel)
    names = [
        None
        if value is None or value != value or (is_numbered and value == -1)
        else (feature.names[value] if is_named else _label_name(value, f"row {row} of {split}"))
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
    return [name for name in names if name is not None]


def _label_name(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise BadDataError(
            f"The label in {where} is {value!r}: it must be text or a whole number, one for each image."
        )
    return str(value)


def _check_classes(images: dict[str, datasets.Dataset]):
    for split, data in images.items():
        if not len(data):
            raise BadDataError(f"The {split} split has no images.")
    present = labels_of(images["train"]).unique()
    if len(present) < 2:
        name = images["train"].features["label"].names[present[0]]
        raise BadDataError(f'All training images are of one class, "{name}": there is nothing to tell apart.')


def _check_validation(images: dict[str, datasets.Dataset], args: DataArguments):
    if "validation" not in images or args.allow_missing_classes:
        return
    missing = classes_missing_from(images["validation"], images["train"])
    if missing:
        raise BadDataError(
            f"{len(missing)} classes have no images for validation: {listed(missing)}. Add some, or go on without "
            "(--allow_missing_classes), or without any validation (--train_val_split 0)."
        )


def classes_missing_from(split: datasets.Dataset, train: datasets.Dataset) -> list[str]:
    """Names of the classes that `train` has images of and `split` has not."""
    missing = sorted(set(labels_of(train).tolist()) - set(labels_of(split).tolist()))
    return [train.features["label"].names[number] for number in missing]


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
            f"--{option} {size} can't cover the {num_classes} classes of {split}: take at least {num_classes}, or set "
            "--allow_missing_classes."
        )
    return data.select(draw_subset(labels, size, seed))


def _column(data: datasets.Dataset, name: str) -> list:
    return data.select_columns([name]).with_format("arrow")[:][name].to_pylist()


def _image_key(image: dict[str, Any]) -> tuple[str | None, str | int]:
    """Path and size of a file (-1 if it is not there), or no path and the hash of the bytes."""
    if image["bytes"] is not None:
        return None, hashlib.sha256(image["bytes"]).hexdigest()
    try:
        return image["path"], os.stat(image["path"]).st_size
    except OSError:
        return image["path"], -1


def _check_column(name: str, option: str, columns: list[str], where: str, first: Iterable[str] = ()):
    if name not in columns:
        ordered = [*first, *(column for column in _nearest_first(name, columns) if column not in set(first))]
        raise UserError(f'{where} has no column "{name}": set --{option} to {listed(ordered)}.')


def _nearest_first(name: str, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), str(other).lower()).ratio())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN_NAMES


def _is_image(path: str) -> bool:
    # A pipe or a device would never end. A broken link is an image that is absent.
    regular = os.path.isfile(path) or not os.path.exists(path)
    return regular and os.path.splitext(path)[1].lower() in _image_endings()


@cache
def _image_endings() -> set[str]:
    """Those of files that Pillow reads, without EPS, which is not decoded, and formats that it only recognizes."""
    Image.init()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    return {
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in stubs and name != "EPS"
    }
