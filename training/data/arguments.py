# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Arguments that name the data."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed

from .decode import DEFAULT_MAX_PIXELS
from .layouts import LAYOUTS
from .packaged.catalog import PACKAGED


# The arguments that name a source, each with the options that only this source has.
_SOURCES = {
    "dataset_name": ("dataset_revision",),
    "dataset_format": ("dataset_dir",),
    "train_dir": ("validation_dir", "test_dir"),
    "train_file": ("validation_file", "test_file"),
}


@dataclass
class DataArguments:
    r"""
    Where the images are, and which of them to use.

    Raises:
        UserError: if not exactly one source is named, an option belongs to another source, or a number is out of
            range.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, or a folder with a copy of one (Parquet, Arrow, or from save_to_disk)."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."}
    )
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": f"A published data set in its original layout, located by --dataset_dir ({', '.join(LAYOUTS)}), "
            f"or a data set that installs by package name ({', '.join(PACKAGED)})."
        },
    )
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Archive or folder of the data set that --dataset_format names."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with one folder of images for each class, or with such folders in train/, validation/ "
            "and test/."
        },
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of validation images for each class."}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of test images for each class."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "CSV, TSV or JSON Lines file with a column of labels and one of paths relative to the file."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of the validation images."})
    test_file: str | None = field(default=None, metadata={"help": "Such a file of the test images."})
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "Fraction of the training images of each class to hold out for validation if the data have no "
            "validation split; 0: none."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images or their paths."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use at most this many training images, drawn at random so that all classes are covered."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many validation images, drawn in the same way."}
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many test images, drawn in the same way."}
    )
    train_samples_per_class: int | None = field(
        default=None, metadata={"help": "Use this many training images of each class, drawn at random."}
    )
    crop_to_boxes: bool = field(default=False, metadata={"help": "Crop the images to their published boxes."})
    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS, metadata={"help": "Largest number of pixels of an image; others are not decoded."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave out, and record, images that the check of the data rejects."}
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Continue even if some classes have no validation images."}
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
            # A record must not mistake a folder for a name on the Hub.
            self.dataset_name = str(Path(self.dataset_name).resolve())


def check_column(name: str, option: str, columns: Iterable[str], where: str, first: Iterable[str] = ()):
    r"""
    Checks that a column exists.

    Args:
        name (`str`):
            The column.
        option (`str`):
            The argument that names it.
        columns (iterable of `str`):
            The existing columns.
        where (`str`):
            What has these columns, for the error message.
        first (iterable of `str`, *optional*):
            Columns to suggest before the others.

    Raises:
        UserError: if it does not exist; suggests the columns with the nearest names.
    """
    if name not in (columns := list(columns)):
        ordered = [*first, *(column for column in nearest_first(name, columns) if column not in set(first))]
        raise UserError(f'{where} has no column "{name}": set --{option} to {listed(ordered)}.')


def nearest_first(name: str, names: Iterable[str]) -> list[str]:
    """`names`, the most similar to `name` first."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), str(other).lower()).ratio())
