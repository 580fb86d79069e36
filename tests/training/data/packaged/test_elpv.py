"""The solar cells: a module is never in two parts."""

import itertools

import numpy as np
import pytest
from PIL import Image

from training.data.decode import decode_image
from training.data.packaged.elpv import ELPV, ELPV_CONFIGS, load_elpv_splits


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cells_read_once")]


@pytest.mark.parametrize(("seed", "config_name"), list(enumerate(ELPV_CONFIGS)))
def test_parts_are_other_modules_of_like_composition(config_name, seed):
    splits = load_elpv_splits(config_name, seed)
    kinds = ELPV_CONFIGS[config_name]
    assert sum(len(split) for split in splits.values()) == {"all": 2624, "mono": 1074, "poly": 1550}[config_name]
    for one, other in itertools.combinations(splits.values(), 2):
        assert set(one["module"]).isdisjoint(other["module"])
    overall = np.mean([np.eye(4)[label] for split in splits.values() for label in split["label"]], axis=0)
    for part, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        split = splits[part]
        assert set(split["type"]) == set(kinds)
        assert len(split) / sum(map(len, splits.values())) == pytest.approx(share, abs=0.06)
        shares = np.bincount(split["label"][:], minlength=4) / len(split)
        assert shares == pytest.approx(overall, abs=0.1)
        assert (shares > 0).all()


def test_levels_and_types_are_those_published():
    splits = load_elpv_splits("all", 0)
    rows = {row["image"]["path"]: (row["label"], row["type"]) for split in splits.values() for row in split}
    table = [line.split() for line in ELPV.read(["elpv_dataset/data/labels.csv"])[0].decode().splitlines()]
    assert rows == {
        path.removeprefix("images/"): (["0.0", "0.3333333333333333", "0.6666666666666666", "1.0"].index(level), kind)
        for path, level, kind in table
    }


def test_runs_of_cells_that_are_taken_for_modules_look_alike():
    splits = load_elpv_splits("all", 0)
    cells = sorted((row for split in splits.values() for row in split), key=lambda row: row["image"]["path"])
    modules = np.array([row["module"] for row in cells])
    kinds = np.array([row["type"] for row in cells])
    assert all(len(set(kinds[modules == module])) == 1 for module in set(modules))
    assert (np.diff(modules) >= 0).all()
    # Every third cell, some 20 of each module.
    small = [decode_image(row["image"]).convert("L").resize((12, 12), Image.Resampling.BOX) for row in cells[::3]]
    features = np.stack([np.asarray(image, dtype=float).ravel() for image in small])

    def explained(groups: np.ndarray) -> float:
        """Share of the variance among cells that is between groups."""
        means = np.stack([features[groups == group].mean(0) for group in np.unique(groups)])
        inverse = np.unique(groups, return_inverse=True)[1]
        return means[inverse].var(0).sum() / features.var(0).sum()

    ours = explained(modules[::3])
    for shift in (10, 20, 30, 40, 50):
        assert ours > explained(np.roll(modules, shift)[::3])
