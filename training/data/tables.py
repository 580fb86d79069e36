# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images listed in CSV, TSV and JSON Lines files."""

import contextlib
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


# Delimiters of CSV files, and how messages call them.
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_HEAD_SIZE = 10_000


def read_table(path: Path, args: DataArguments) -> datasets.Dataset:
    r"""
    Reads the images that a file lists; relative paths start from its folder. Labels stay as they are written: 007 is
    not 7. CSV and TSV files may separate their columns by commas, semicolons, tabs or vertical bars.

    Args:
        path (`Path`):
            A `.csv`, `.tsv`, `.jsonl` or `.ndjson` file.
        args (`DataArguments`):
            Names the columns of the images and the labels.

    Raises:
        BadDataError: if the file has no rows, is not in its format, or a row lacks an image, its file or a label.
        UserError: if the file does not exist, or its ending or columns are others.
    """
    delimiters = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
    if path.suffix.lower() not in delimiters:
        raise UserError(f"{path} must be a {listed(delimiters)} file.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    where, delimiter = str(path), delimiters[path.suffix.lower()]
    if delimiter is not None:
        delimiter = _find_delimiter(path, delimiter, {args.image_column_name, args.label_column_name})
        where = f"{path}, read as columns separated by {_DELIMITERS[delimiter]},"
    rows = list(_read_json_lines(path) if delimiter is None else _read_csv(path, delimiter))
    if not rows:
        raise BadDataError(f"{path} has no rows.")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    check_column(args.image_column_name, "image_column_name", columns, where)
    check_column(args.label_column_name, "label_column_name", columns, where)
    images, labels, missing = [], [], []
    for line, row in rows:
        image, label = row.get(args.image_column_name), row.get(args.label_column_name)
        if not isinstance(image, str) or not image:
            raise BadDataError(f'Line {line} of {path} has no path in "{args.image_column_name}".')
        if label is None or (isinstance(label, str) and not label.strip()):
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


def _find_delimiter(path: Path, usual: str, wanted: set[str]) -> str:
    """The delimiter that gives the wanted columns; or, if none does, the most likely one, for the error message."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        head = file.read(_HEAD_SIZE)
    for delimiter in (usual, *_DELIMITERS):
        with contextlib.suppress(csv.Error):
            if wanted <= set(next(csv.reader(head.splitlines(keepends=True), delimiter=delimiter), [])):
                return delimiter
    with contextlib.suppress(csv.Error):
        return csv.Sniffer().sniff(head, "".join(_DELIMITERS)).delimiter
    return usual


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # `datasets` and pandas would read the label 007 as the number 7.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise BadDataError(
                        f"Line {reader.line_num} of {path} has more cells than there are columns, separated by "
                        f"{_DELIMITERS[delimiter]}: quote the cells that contain such characters."
                    )
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
