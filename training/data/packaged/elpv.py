# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ELPV: 2,624 electroluminescence photographs of solar cells, 300 x 300 gray, in 4 levels of defects.

Credit: Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021 (CC-BY-NC-SA-4.0: not for commercial use). The classes
have unequal sizes, so report the macro F1 together with the accuracy.
"""

import datasets
import numpy as np

from .packages import Wheel, image_dataset


ELPV = Wheel(
    package="elpv-dataset",
    version="1.0.0.post1",
    file_name="elpv_dataset-1.0.0.post1-py3-none-any.whl",
    sha256="85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
)
# Types of cells in each configuration.
ELPV_CONFIGS = {"all": ("mono", "poly"), "mono": ("mono",), "poly": ("poly",)}
# For the published probabilities that the cell is defective: 0, 1/3, 2/3 and 1.
ELPV_LEVELS = ["functional", "possibly defective", "probably defective", "defective"]
# Numbers of consecutive cells in the list that belong to one module. The publisher does not say which module a cell
# belongs to, but the list goes module by module: brightness, the shape of the wires and the shade at the edges change
# at these places, which gives the published number of 44 modules. The 110 cells are two modules without clear border.
_MODULE_SIZES = [60] * 20 + [54] + [60] * 8 + [110] + [60] * 5 + [72] + [60] * 3 + [48] + [60] * 3
_NUM_DRAWS = 1000


def load_elpv_splits(config_name: str, seed: int) -> datasets.DatasetDict:
    r"""
    Splits the cells into about 60 % for training, 20 % for validation and 20 % for the test. All cells of a module are
    in the same split, because they look alike. Out of many random draws, it takes the one whose splits are most alike
    in the fractions of levels and types.

    Args:
        config_name (`str`):
            One of `ELPV_CONFIGS`.
        seed (`int`):
            Random seed of the draw.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    cells = _load_cells()
    kinds, modules, labels = (np.array(cells[name][:]) for name in ("type", "module", "label"))
    rows = np.flatnonzero(np.isin(kinds, ELPV_CONFIGS[config_name]))
    strata = labels * 2 + (kinds == "poly")
    counts = np.zeros((len(_MODULE_SIZES), 2 * len(ELPV_LEVELS)))
    np.add.at(counts, (modules[rows], strata[rows]), 1)
    generator = np.random.default_rng(seed)
    draws = [_deal(generator.permutation(np.unique(modules[rows]))) for _ in range(_NUM_DRAWS)]
    best = min(draws, key=lambda parts: _unlikeness([counts[own].sum(0) for own in parts.values()]))
    return datasets.DatasetDict({part: cells.select(rows[np.isin(modules[rows], own)]) for part, own in best.items()})


def _deal(modules: np.ndarray) -> dict[str, np.ndarray]:
    """The first fifth of the modules is for the test, the second for validation, the rest for training."""
    fifth = round(len(modules) / 5)
    test, validation, train = np.split(modules, [fifth, 2 * fifth])
    return {"train": train, "validation": validation, "test": test}


def _unlikeness(counts: list[np.ndarray]) -> float:
    """Largest difference between the fraction of a kind of cells in a split and in the whole data set."""
    overall = sum(counts) / np.sum(counts)
    return max(np.abs(own / own.sum() - overall).max() for own in counts)


def _load_cells() -> datasets.Dataset:
    """All cells, with the columns `type` and `module`, the index of the group of cells."""
    folder = "elpv_dataset/data"
    # Path, probability, type.
    table = [line.split() for line in ELPV.read([f"{folder}/labels.csv"])[0].decode().splitlines()]
    images = ELPV.read([f"{folder}/{path}" for path, _, _ in table])
    return image_dataset(
        zip((path.rsplit("/", 1)[-1] for path, _, _ in table), images, strict=True),
        [round(3 * float(probability)) for _, probability, _ in table],
        ELPV_LEVELS,
        type=[kind for _, _, kind in table],
        module=np.repeat(np.arange(len(_MODULE_SIZES)), _MODULE_SIZES).tolist(),
    )
