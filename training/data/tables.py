# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images listed in CSV, TSV and JSON Lines files."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed

from .arguments import DataArguments, check_column
from .form import BadDataError, label_name, path_dataset


def read_table(path: Path, args: DataArguments) -> datasets.Dataset:
    r"""
    Reads the images that a file lists; relative paths start from its folder. Labels stay as they are written: 007 is
    not 7.

    Args:
        path (`Path`):
            A `.csv`, `.tsv`, `.jsonl` or `.ndjson` file.
        args (`DataArguments`):
            Names the columns of the images and the labels.

    Raises:
        BadDataError: if the file has no rows, is not in its format, or a row lacks an image, its file or a label.
        UserError: if the file does not exist, or its ending or columns are others.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} must be a {listed(readers)} file.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise BadDataError(f"{path} has no rows.")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    check_column(args.image_column_name, "image_column_name", columns, str(path))
    check_column(args.label_column_name, "label_column_name", columns, str(path))
    images, labels, missing = [], [], []
    for line, row in rows:
        image, label = row.get(args.image_column_name), row.get(args.label_column_name)
        if not isinstance(image, str) or not image:
            raise BadDataError(f'Line {line} of {path} has no path in "{args.image_column_name}".')
        if label is None or label == "":
            raise BadDataError(f'Line {line} of {path} has no label in "{args.label_column_name}".')
        images.append(os.path.abspath(path.parent / image))
        labels.append(label_name(label, f"line {line} of {path}"))
        if not os.path.isfile(images[-1]):
            missing.append(images[-1])
    if missing:
        raise BadDataError(
            f"{len(missing)} of the {len(rows)} images that {path} lists do not exist: {listed(missing)}. Relative "
            "paths start from the folder of that file."
        )
    return path_dataset(images, labels, "string")


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # `datasets` and pandas would read the label 007 as the number 7.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise BadDataError(f"Line {reader.line_num} of {path} has more cells than there are columns.")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadDataError(f"{path} cannot be read after line {reader.line_num}: {error}.") from error


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
