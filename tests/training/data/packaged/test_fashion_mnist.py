"""Fashion-MNIST as Debian has it."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest

from training.data.decode import decode_image
from training.data.packaged.fashion_mnist import _parse_idx, load_fashion_mnist_splits
from training.data.packaged.packages import DebianFiles


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """60 training and 20 test images of noise in the published files, in place of the real package."""
    rng = np.random.default_rng(0)
    arrays = {}
    with tarfile.open(tmp_path / "files.tar", "w") as archive:
        for prefix, number in (("train", 60), ("t10k", 20)):
            images = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
            labels = (np.arange(number) % 10).astype(np.uint8)
            arrays[prefix] = images, labels
            for name, array in ((f"{prefix}-images-idx3", images), (f"{prefix}-labels-idx1", labels)):
                data = gzip.compress(_idx(array))
                member = tarfile.TarInfo(f"{name}-ubyte.gz")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(DebianFiles, "fetch", lambda self: tmp_path / "files.tar")
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))
    return arrays


def test_images_and_labels_are_those_of_the_files(small_files):
    splits = load_fashion_mnist_splits("full", 0)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = small_files[prefix]
        decoded = np.stack([decode_image(image) for image in splits[part]["image"]])
        assert (decoded == images[..., None]).all()
        assert splits[part]["label"][:] == labels.tolist()


def test_few_shots_are_of_the_official_training_images(small_files):
    full = load_fashion_mnist_splits("full", 0)
    with pytest.raises(ValueError, match="6 images: too few for 20 to train"):
        load_fashion_mnist_splits("20-per-class", 0)
    with pytest.raises(ValueError, match="6 images: too few for 5 to train, 5 to validate"):
        load_fashion_mnist_splits("5-per-class", 0)
    assert set(full) == {"train", "test"}


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01" + bytes(8), b"PNG"])
def test_refuses_what_is_no_idx_file_of_bytes(content):
    with pytest.raises(ValueError, match="not an IDX file"):
        _parse_idx(content)


@pytest.mark.slow
def test_the_published_set():
    splits = load_fashion_mnist_splits("full", 0)
    assert np.bincount(splits["train"]["label"][:]).tolist() == [6000] * 10
    assert np.bincount(splits["test"]["label"][:]).tolist() == [1000] * 10
    few = load_fashion_mnist_splits("20-per-class", 3)
    assert np.bincount(few["train"]["label"][:]).tolist() == [20] * 10
    assert np.bincount(few["validation"]["label"][:]).tolist() == [20] * 10
    assert few["test"]["image"][:] == splits["test"]["image"][:]
    assert {image["path"] for image in few["train"]["image"]} <= {image["path"] for image in splits["train"]["image"]}
