# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: 60,000 + 10,000 photographs of clothes, 28 x 28 gray, 10 classes.

Credit: Zalando SE (MIT), from Debian's package dataset-fashion-mnist.
"""

import gzip
import io

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_rbi import UserError

from ..splits import draw_few_shots
from .packages import DebianFiles, image_dataset, images_made_once, recipe_name


FASHION_MNIST = DebianFiles(
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    file_name="dataset-fashion-mnist.tar",
    sha256="eadd5878c9f71d37a49154e2eb89c67215bd8e21b792b51e6bfe716a914967e2",
    folder="usr/share/datasets/fashion-mnist",
)
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
# Number of training images of each class in each configuration; `None`: all.
FASHION_MNIST_SHOTS = {"full": None, "5-per-class": 5, "20-per-class": 20}
_PREFIXES = {"train": "train", "test": "t10k"}


def load_fashion_mnist_splits(config_name: str, seed: int) -> datasets.DatasetDict:
    r"""
    Loads the official test images, and either all official training images, without a validation split, or a few of
    each class, drawn at random, with as many others for validation.

    Args:
        config_name (`str`):
            One of `FASHION_MNIST_SHOTS`.
        seed (`int`):
            Random seed of the draw. It has no effect on `"full"`.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    images = images_made_once(recipe_name("fashion-mnist", FASHION_MNIST), convert_fashion_mnist)
    # The training images come first.
    num_train = images["part"][:].count("train")
    train, test = images.select(range(num_train)), images.select(range(num_train, len(images)))
    shots = FASHION_MNIST_SHOTS[config_name]
    if shots is None:
        return datasets.DatasetDict({"train": train, "test": test})
    split = draw_few_shots(torch.tensor(train["label"][:]), shots, shots, seed)
    return datasets.DatasetDict(
        {
            "train": train.select(split.train.tolist()),
            "validation": train.select(split.validation.tolist()),
            "test": test,
        }
    )


def convert_fashion_mnist() -> datasets.Dataset:
    r"""
    Converts all images to PNG, with the column `part` (`train` or `test`).

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    images, labels, parts = [], [], []
    for part, prefix in _PREFIXES.items():
        files = FASHION_MNIST.read([f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"])
        arrays, own_labels = (_parse_idx(gzip.decompress(file)) for file in files)
        for number, array in enumerate(arrays):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            images.append((f"{part}_{number:05d}.png", buffer.getvalue()))
        labels += own_labels.tolist()
        parts += [part] * len(own_labels)
    return image_dataset(images, labels, FASHION_MNIST_CLASSES, part=parts)


def _parse_idx(content: bytes) -> np.ndarray:
    """Array of bytes in the IDX format: two zeros, the type 8, the number of axes, their lengths and the values."""
    if content[:3] != b"\0\0\x08":
        raise UserError(f"The file is not an IDX file of unsigned bytes: it begins with {content[:3]!r}.")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
