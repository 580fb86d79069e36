# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The cache, output folders, and files and folders that are written completely or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed


def cache_dir() -> Path:
    """Folder for downloads and everything made from them: `$RBI_CACHE`, by default `~/.cache/modeling-rbi`."""
    return Path(os.environ.get("RBI_CACHE") or Path.home() / ".cache" / "modeling-rbi")


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    r"""
    Path of a file or folder in the cache, which is made if it does not exist. An interrupted `make` leaves nothing
    behind.

    Args:
        name (`str`):
            Path relative to the cache.
        make (`Callable[[Path], object]`):
            Makes the file or folder at the path that it is given, which has the same name in a temporary folder. The
            result is then moved into place.
    """
    path = cache_dir() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            make(draft)
            try:
                os.replace(draft, path)
            except OSError:
                # A folder cannot replace one that another process has just made, which is just as good.
                if not path.is_dir():
                    raise
    return path


_DRAFT = ".draft.tmp"


def read_json(path: Path, what: str) -> dict[str, Any] | None:
    r"""
    Content of a JSON file of this project; `None` if the file does not exist.

    Args:
        path (`Path`):
            The file.
        what (`str`):
            What the file should be, for the error message, such as "record of a run".

    Raises:
        UserError: if the file is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a valid {what} ({error}): move it away.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a valid {what}: move it away.")
    return content


def write_json(path: Path, content: Any):
    """Writes a JSON file completely or not at all. Numbers that are not finite become `null`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(strict(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def strict(content: Any) -> Any:
    """The content with `None` for each number that is not finite: JSON has none of these."""
    if isinstance(content, dict):
        return {name: strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, without drafts that a killed [`filled_whole`] left. Empty if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not _is_draft(path))


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(_DRAFT) and path.is_dir()


def check_output_dir(
    folder: Path,
    what: str | None = None,
    names: Collection[str] | None = None,
    is_former: Callable[[Path], bool] = lambda folder: True,
):
    r"""
    Refuses an output folder if the command would overwrite its files or mix them with others.

    Args:
        folder (`Path`):
            The value of `--output_dir`.
        what (`str`, *optional*):
            What the command writes, such as "an assessment", if it may replace an earlier result. `None`: the folder
            must be empty or missing.
        names (`Collection[str]`, *optional*):
            The files and folders that the command writes; others are refused. `None`: `is_former` decides about any.
        is_former (`Callable[[Path], bool]`, *optional*):
            Whether a folder that is not empty holds an earlier result of the command.

    Raises:
        UserError: if `folder` is a file, or holds anything but an earlier result.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder.")
    found = names_in(folder)
    if found and what is None:
        raise UserError(f"--output_dir {folder} is not empty: name a new folder.")
    others = [name for name in found if names is not None and name not in names]
    if found and (others or not is_former(folder)):
        raise UserError(
            f"--output_dir {folder} holds other files than {what} ({listed(others or found)}): name another folder."
        )


@contextmanager
def filled_whole(folder: Path, last: str) -> Iterator[Path]:
    r"""
    Yields a temporary folder to write to. When all is written, its files move to `folder`, `last` after the others: a
    folder without that file does not count as complete.

    Args:
        folder (`Path`):
            Where the files go. They replace files of the same names.
        last (`str`):
            Name of the file that makes the folder complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=_DRAFT, ignore_cleanup_errors=True) as name:
        draft = Path(name)
        yield draft
        # The folder is not complete while some files are old and others new.
        (folder / last).unlink(missing_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: (path.name == last, path.name)):
            os.replace(path, folder / path.name)
