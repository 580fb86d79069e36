"""Archives are unpacked whole and inside their folder, or not at all."""

import errno
import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from training.data import archives
from training.data.archives import unpack
from training.files import cache_dir


KINDS = ["a.tar", "a.tar.gz", "a.tgz", "a.zip", "A.ZIP"]
# Some of it compresses to nothing and some not at all.
CONTENT = {"x/one.txt": b"1" * 5000, "x/y/two.bin": os.urandom(20000), "three.txt": b""}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


def _pack(path: Path, content: dict[str, bytes]) -> Path:
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _left_behind(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.parent != tmp_path and path.name != "unpacked"]


@pytest.mark.parametrize("kind", KINDS)
def test_contents(kind, tmp_path):
    folder = unpack(_pack(tmp_path / kind, CONTENT))
    assert _files(folder) == CONTENT
    assert folder.parent == cache_dir() / "unpacked"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("kind", KINDS)
def test_once(kind, tmp_path, monkeypatch):
    path = _pack(tmp_path / kind, CONTENT)
    folder = unpack(path)
    monkeypatch.setattr(archives, "_extract", lambda *args: pytest.fail("unpacked again"))
    assert unpack(path) == folder


def test_an_archive_that_changed_is_unpacked_again(tmp_path):
    first = unpack(_pack(tmp_path / "a.zip", CONTENT))
    second = unpack(_pack(tmp_path / "a.zip", CONTENT | {"new.txt": b"new"}))
    assert first != second
    assert "new.txt" in _files(second)


def test_a_folder_is_returned(tmp_path):
    assert unpack(tmp_path) == tmp_path
    assert not cache_dir().exists()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.zip does not exist"):
        unpack(tmp_path / "b.zip")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match=r"a\.rar is neither a folder nor an archive \(\.tar"):
        unpack(tmp_path / "a.rar")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_anywhere(kind, tmp_path):
    path = _pack(tmp_path / kind, CONTENT)
    data = path.read_bytes()
    end = len(data)
    if kind == "a.tar":
        # It ends in zeros, of which one block is enough.
        with tarfile.open(path) as archive:
            archive.getmembers()
            end = archive.offset + 512
    for cut in sorted({0, 1, 511, 512, 1024, 7000, end // 2, end - 512, end - 30, end - 1}):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"(?i)a\.[a-z.]+ is broken or cut off \(.+\): download it again"):
            unpack(path)
        assert not _left_behind(tmp_path)


def test_a_tar_that_was_cut_off_before_it_was_compressed(tmp_path):
    data = _pack(tmp_path / "b.tar", CONTENT).read_bytes()
    (tmp_path / "a.tgz").write_bytes(gzip.compress(data[:512]))
    with pytest.raises(ValueError, match=r"a\.tgz is broken or cut off"):
        unpack(tmp_path / "a.tgz")
    assert not _left_behind(tmp_path)


def test_a_tar_with_a_garbled_header_between_its_members(tmp_path):
    path = _pack(tmp_path / "a.tar", CONTENT)
    data = bytearray(path.read_bytes())
    data[data.index(b"x/y/two.bin")] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is broken or cut off"):
        unpack(path)
    assert not _left_behind(tmp_path)


@pytest.mark.parametrize("kind", ["a.tar.gz", "a.zip"])
def test_altered_contents(kind, tmp_path):
    path = _pack(tmp_path / kind, CONTENT)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is broken or cut off"):
        unpack(path)
    assert not _left_behind(tmp_path)


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    "name", ["../out.txt", "x/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "x/.."]
)
def test_members_that_point_out(kind, name, tmp_path):
    path = _pack(tmp_path / kind, CONTENT | {name: b"out"})
    with pytest.raises(ValueError, match="points out of its folder"):
        unpack(path)
    assert not _left_behind(tmp_path)
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE],
    ids=["link", "hard", "fifo", "device"],
)
def test_members_of_a_tar_that_are_no_files(kind, tmp_path):
    member = tarfile.TarInfo("odd")
    member.type, member.linkname = kind, "x/one.txt"
    path = _pack(tmp_path / "a.tar", CONTENT)
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match="'odd', which is neither a file nor a folder"):
        unpack(path)
    assert not _left_behind(tmp_path)


def test_a_link_in_a_zip(tmp_path):
    path = _pack(tmp_path / "a.zip", CONTENT)
    member = zipfile.ZipInfo("odd")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match="'odd', which is neither a file nor a folder"):
        unpack(path)
    assert not _left_behind(tmp_path)


def test_an_encrypted_zip(tmp_path):
    path = _pack(tmp_path / "a.zip", {"one.txt": b"1"})
    data = bytearray(path.read_bytes())
    # The first bit of the flags, in the member's own header and in the directory.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip is encrypted: unpack it yourself"):
        unpack(path)
    assert not _left_behind(tmp_path)


def test_a_full_disk(tmp_path, monkeypatch):
    def extract(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    path = _pack(tmp_path / "a.tar", CONTENT)
    with pytest.raises(OSError, match=r"no space left in .*cache to unpack .*a\.tar.*RBI_CACHE") as error:
        unpack(path)
    assert error.value.errno == errno.ENOSPC
    assert not _left_behind(tmp_path)


def test_a_zip_larger_than_the_disk_is_not_begun(tmp_path, monkeypatch):
    path = _pack(tmp_path / "a.zip", CONTENT)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: usage._replace(free=24999))
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *args: pytest.fail("begun"))
    with pytest.raises(OSError, match="no space left"):
        unpack(path)
    monkeypatch.undo()


def test_two_processes_at_once(tmp_path, monkeypatch):
    path = _pack(tmp_path / "a.tar", CONTENT)
    extract, inner = archives._extract, []

    def slow(path, folder):
        extract(path, folder)
        if not inner:
            inner.append(None)
            inner[0] = unpack(path)

    monkeypatch.setattr(archives, "_extract", slow)
    assert unpack(path) == inner[0]
    assert _files(inner[0]) == CONTENT
    assert list((cache_dir() / "unpacked").iterdir()) == [inner[0]]
