# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed


def cache_dir() -> Path:
    """Folder that downloads are kept in."""
    return Path(os.environ.get("RBI_CACHE") or Path.home() / ".cache" / "modeling-rbi")


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    r"""
    Path of a file or a folder of the cache. Where there is none, `make` is called with another path of the same name
    to make it at, and it is put in its place whole: an interrupted `make` leaves nothing behind.
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
                # A folder doesn't replace one that another process has put there meanwhile, which is as good.
                if not path.is_dir():
                    raise
    return path


_DRAFT = ".draft.tmp"


def read_json(path: Path, what: str) -> dict[str, Any] | None:
    r"""
    What a file of this project holds, if there is one.

    Args:
        path (`Path`):
            The file.
        what (`str`):
            What it ought to be, in words.

    Raises:
        UserError: if it is that not.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no {what} ({error}): move it away.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no {what}: move it away.")
    return content


def write_json(path: Path, content: Any):
    """Writes a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, if it is there, without drafts that [`filled_whole`] left when it was killed."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not _is_draft(path))


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(_DRAFT) and path.is_dir()


def check_output_dir(
    folder: Path,
    what: str | None = None,
    names: Collection[str] = (),
    is_former: Callable[[Path], bool] = lambda folder: True,
):
    r"""
    Refuses an output folder in which files would be overwritten or mixed with others.

    Args:
        folder (`Path`):
            The value of `--output_dir`.
        what (`str`, *optional*):
            What the command writes, such as "an assessment", if a former one may be replaced. `None`: the folder must
            be empty or missing.
        names (`Collection[str]`, *optional*):
            The files and folders that the command writes.
        is_former (`Callable[[Path], bool]`, *optional*):
            Whether the folder holds a former result of the command.

    Raises:
        UserError: if it is a file, or holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder.")
    found = names_in(folder)
    if found and what is None:
        raise UserError(f"--output_dir {folder} is not empty: name a new folder.")
    others = [name for name in found if name not in names]
    if found and (others or not is_former(folder)):
        raise UserError(
            f"--output_dir {folder} holds other files than {what} ({listed(others or found)}): name another folder."
        )


@contextmanager
def filled_whole(folder: Path, last: str) -> Iterator[Path]:
    r"""
    A folder to write to, whose files move to `folder` when all are written, `last` after the others: without it the
    folder is not taken for whole.

    Args:
        folder (`Path`):
            Where the files go, in place of those of the same names.
        last (`str`):
            Name of the file that makes it whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=_DRAFT, ignore_cleanup_errors=True) as name:
        draft = Path(name)
        yield draft
        # While some files are old and some are new, the folder is not whole.
        (folder / last).unlink(missing_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: (path.name == last, path.name)):
            os.replace(path, folder / path.name)
