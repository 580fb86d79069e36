# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Archives of images, unpacked once into the cache, and never outside their folder."""

import errno
import hashlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from modeling_rbi import UserError

from ..files import cache_dir, made_once


ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_archive(path: Path) -> bool:
    """Whether the file name ends like that of an archive that [`unpack`] reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(path: Path) -> Path:
    r"""
    Folder with the contents of an archive, unpacked into `unpacked/` of the cache if it is not there yet.

    The name, size and modification time of an archive identify it. It is unpacked completely or not at all, even if
    several processes unpack it at the same time.

    Args:
        path (`Path`):
            A `.tar`, `.tar.gz`, `.tgz` or `.zip` file, or a folder, which is returned unchanged.

    Raises:
        FileNotFoundError: if `path` does not exist.
        UserError: if it is not such an archive, is broken, cut off or encrypted, or if a member is a link or a device
            or would be written outside the folder.
        OSError: with the code `ENOSPC`, if the disk of the cache is full.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not is_archive(path):
        raise UserError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).")
    state = path.stat()
    digest = hashlib.sha256(f"{path.name}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()

    def make(draft: Path):
        print(f"Unpacking {path} to {draft.parent.parent / draft.name}", flush=True)
        draft.mkdir()
        try:
            _extract(path, draft)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise _no_space(path) from error

    return made_once(f"unpacked/{path.name.split('.')[0]}-{digest[:16]}", make)


def _no_space(path: Path) -> OSError:
    return OSError(
        errno.ENOSPC, f"no space left in {cache_dir()} to unpack {path}: free some, or set RBI_CACHE to another disk"
    )


def _extract(path: Path, folder: Path):
    try:
        if path.name.lower().endswith(".zip"):
            _extract_zip(path, folder)
        else:
            _extract_tar(path, folder)
    except (tarfile.FilterError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise _broken(path, error) from error
    except OSError as error:
        # Errors of the gzip format are OSErrors without a code.
        if error.errno is not None:
            raise
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception | str) -> UserError:
    # In further lines, tarfile says what each of its readers found.
    reason = str(error).partition(":\n")[0]
    return UserError(f"{path} is broken or cut off ({reason}): download it again.")


def _check_member(path: Path, name: str, is_plain: bool):
    if not is_plain:
        raise UserError(f"{path} holds {name!r}, which is neither a file nor a folder: it was not unpacked.")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(f"{path} holds {name!r}, which points out of its folder: it was not unpacked.")


def _extract_tar(path: Path, folder: Path):
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            _check_member(path, member.name, member.isfile() or member.isdir())
            archive.extract(member, folder, filter="data")
        stream = archive.fileobj
        if stream is None:
            return
        # For tarfile, a file that is cut off or garbled between two members just ends there. A complete one ends in
        # blocks of zeros. Reading on to the end verifies the checksum of a gzip file.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise _broken(path, "its end is missing")
        while stream.read(tarfile.RECORDSIZE):
            pass


def _extract_zip(path: Path, folder: Path):
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > shutil.disk_usage(folder).free:
            raise _no_space(path)
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if member.flag_bits & 0x1:
                raise UserError(f"{path} is encrypted: unpack it yourself and name the folder.")
        try:
            archive.extractall(folder)
        except NotImplementedError as error:
            raise UserError(f"{path} cannot be unpacked here ({error}): unpack it yourself.") from error
