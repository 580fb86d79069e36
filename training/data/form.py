# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The form that all labeled images are read into, wherever they come from.

It is a `datasets.DatasetDict` with the splits `train` and, if there are any, `validation` and `test`. Each has the
columns `image` (`datasets.Image(decode=False)`), `label` (`datasets.ClassLabel`, the same names in all splits) and, if
boxes are published and requested, `box` (left, top, right, bottom in pixels of the stored image).
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from modeling_rbi import NO_LABEL, UserError


SPLITS = ("train", "validation", "test")
IMAGE = datasets.Image(decode=False)
BOX = datasets.Sequence(datasets.Value("float32"), length=4)
_BATCH_SIZE = 1000


class BadDataError(UserError):
    """Data that cannot be trained on; the message says what is wrong with them and how to fix it."""


def path_dataset(paths: Sequence[str], labels: Sequence[Any], label_type: str) -> datasets.Dataset:
    """A data set of image files with labels of a type of Arrow, such as `"string"`."""
    features = datasets.Features({"image": IMAGE, "label": datasets.Value(label_type)})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def column_values(data: datasets.Dataset, name: str) -> list:
    """All values of a column; images are not decoded."""
    return data.select_columns([name]).with_format("arrow")[:][name].to_pylist()


def labels_of(split: datasets.Dataset) -> torch.Tensor:
    """The class of each image, `(num_images,)`; -100 for unlabeled images."""
    return torch.tensor(column_values(split, "label"), dtype=torch.long)


def iter_rows(split: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """All rows, without decoding images and with only a part of them in memory at a time."""
    for table in split.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        yield from table.to_pylist()


def label_name(value: Any, where: str) -> str:
    r"""
    A label as the name of a class.

    Raises:
        BadDataError: if it is neither text nor a whole number; names `where` it is.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise BadDataError(
            f"The label in {where} is {value!r}: it must be text or a whole number, one for each image."
        )
    return str(value)


def class_name(label: str) -> str:
    """A label as the name of a class: in composed form (NFC) and without white space around it."""
    return unicodedata.normalize("NFC", label).strip()


def classes_missing_from(split: datasets.Dataset, train: datasets.Dataset) -> list[str]:
    """Names of the classes that have images in `train` but not in `split`."""
    missing = sorted(set(labels_of(train).tolist()) - set(labels_of(split).tolist()))
    return [train.features["label"].names[number] for number in missing]


def fingerprint(dataset: datasets.DatasetDict) -> dict[str, Any]:
    r"""
    Identifies the data of a run, for its record: the number of images and classes of each split, the number of images
    of its smallest and largest class, and one SHA-256 over all images.

    The hash covers the split, label and box of each image, and the name and size of its file, or the hash of its bytes
    if the data set holds them. Files are not read, so a change that keeps the size of a file goes unnoticed. Names are
    relative to the folder that all files of a split share. The hash therefore does not depend on the place of the data
    or the order of the images.
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
            name_of_label = None if label == NO_LABEL else names[label]
            rows.append(json.dumps([name, name_of_label, box, place, content]))
    digest = hashlib.sha256("\n".join(sorted(rows)).encode())
    return {"sha256": digest.hexdigest(), "splits": summary}


def _image_key(image: dict[str, Any]) -> tuple[str | None, str | int]:
    """Path and size of a file (-1 if it is missing), or no path and the hash of the bytes."""
    if image["bytes"] is not None:
        return None, hashlib.sha256(image["bytes"]).hexdigest()
    try:
        return image["path"], os.stat(image["path"]).st_size
    except OSError:
        return image["path"], -1
