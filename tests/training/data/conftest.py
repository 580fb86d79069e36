"""Small folders of images and a data set of bytes, and how they are read."""

import os
import random

import datasets
import pytest
from PIL import Image

from training.data.arguments import DataArguments
from training.data.form import IMAGE
from training.data.reading import load_images


@pytest.fixture
def make_image():
    """Writes an image of noise that its path decides."""

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.Random(str(path)).randbytes(8 * 8 * 3)
        Image.frombytes("RGB", (8, 8), pixels).save(path)

    return make


@pytest.fixture
def make_folder(make_image):
    """Fills a folder with folders of classes, with as many images each."""

    def make(root, counts):
        for name, count in counts.items():
            for number in range(count):
                make_image(root / name / f"{number}.png")
        return root

    return make


@pytest.fixture
def load():
    """Reads the images that arguments name, by a seed."""
    return lambda seed=0, **kwargs: load_images(DataArguments(**kwargs), seed)


@pytest.fixture
def rows_of():
    """Gives the file name and the label name of each image of a split."""

    def rows_of(split):
        names = split.features["label"].names
        return [(os.path.basename(row["image"]["path"]), names[row["label"]]) for row in split]

    return rows_of


@pytest.fixture
def check_form():
    """Checks that a data set has the one form."""

    def check(dataset):
        assert list(dataset) == [name for name in ("train", "validation", "test") if name in dataset]
        names = dataset["train"].features["label"].names
        for split in dataset.values():
            assert split.features["image"] == IMAGE
            assert split.features["label"] == datasets.ClassLabel(names=names)
            for row in split:
                assert set(row["image"]) == {"path", "bytes"}
                assert row["image"]["bytes"] is not None or os.path.isabs(row["image"]["path"])

    return check


@pytest.fixture
def folder(tmp_path, make_folder):
    """A folder of three classes."""
    return make_folder(tmp_path / "train", {"cat10": 10, "cat2": 4, "dog": 6})


@pytest.fixture
def faces():
    """Images as bytes: 3 classes of 4, as on the Hub."""
    data = [random.Random(number).randbytes(192) for number in range(12)]
    images = [Image.frombytes("RGB", (8, 8), pixels) for pixels in data]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [number % 3 for number in range(12)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["c", "a", "b"])}),
    )
