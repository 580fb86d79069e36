"""The registry of the data sets that install by package name; the sets themselves are tested beside it."""

import itertools
import sys

import datasets
import pytest

from training.data.decode import decode_image
from training.data.packaged import catalog as packaged
from training.data.packaged.catalog import PACKAGED, load


def test_every_data_set_is_described_and_has_its_default():
    assert set(PACKAGED) == {"orl_faces", "emoji", "elpv", "cards", "fashion_mnist"}
    for dataset in PACKAGED.values():
        assert dataset.default_config_name in dataset.config_names
        assert dataset.description
        assert dataset.credit


@pytest.mark.parametrize(("name", "nearest"), [("emojis", "emoji"), ("fashion-mnist", "fashion_mnist"), ("", "emoji")])
def test_unknown_data_set(name, nearest):
    with pytest.raises(ValueError, match=f"no packaged data set '{name}'.*nearest is '[a-z_]+'") as error:
        load(name, None, 0)
    assert name == "" or f"nearest is '{nearest}'" in str(error.value)


@pytest.mark.parametrize(
    ("name", "config_name", "nearest"), [("emoji", "twiter-fine", "twitter-fine"), ("elpv", "monos", "mono")]
)
def test_unknown_config(name, config_name, nearest):
    with pytest.raises(ValueError, match=f"no configuration of {name} '{config_name}'.*nearest is '{nearest}'"):
        load(name, config_name, 0)


def test_passes_the_default_config_and_the_seed(monkeypatch):
    calls = []
    dataset = packaged.PackagedDataset(
        "d", "c", ["a", "b"], "b", lambda *args: calls.append(args) or datasets.DatasetDict()
    )
    monkeypatch.setitem(PACKAGED, "own", dataset)
    load("own", None, 3)
    load("own", "a", 4)
    assert calls == [("b", 3), ("a", 4)]


@pytest.mark.slow
@pytest.mark.usefixtures("cells_read_once")
@pytest.mark.parametrize(
    ("name", "config_name"),
    [
        *(("orl_faces", config_name) for config_name in PACKAGED["orl_faces"].config_names),
        ("elpv", "all"),
        ("emoji", "google-fine"),
        ("emoji", "emojione-all"),
        ("cards", "families"),
        ("fashion_mnist", "20-per-class"),
        ("fashion_mnist", "full"),
    ],
)
def test_is_a_data_set_in_canonical_form(name, config_name):
    splits = load(name, config_name, 1)
    assert {"train", "test"} <= set(splits)
    images = {}
    for part, split in splits.items():
        assert split.features["image"] == datasets.Image(decode=False)
        assert split.features["label"] == splits["train"].features["label"]
        assert set(split["label"]) == set(range(split.features["label"].num_classes))
        column = split["image"][:]
        assert len({image["path"] for image in column}) == len(column)
        for image in column[:: max(1, len(column) // 200)]:
            decode_image(image)
        images[part] = {image["bytes"] for image in column}
    for one, other in itertools.combinations(images, 2):
        assert images[one].isdisjoint(images[other])
    again = load(name, config_name, 1)
    for part in splits:
        assert splits[part].with_format("arrow")[:].equals(again[part].with_format("arrow")[:])


@pytest.mark.slow
@pytest.mark.usefixtures("cells_read_once")
@pytest.mark.parametrize(
    ("name", "config_name"),
    [("orl_faces", "2-shot"), ("elpv", "poly"), ("cards", "families"), ("fashion_mnist", "5-per-class")],
)
def test_another_seed_is_another_draw(name, config_name):
    draws = [{image["path"] for image in load(name, config_name, seed)["train"]["image"]} for seed in (0, 1)]
    assert draws[0] != draws[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_works_offline_once_it_was_loaded(name, monkeypatch, tmp_path):
    first = load(name, None, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert load(name, None, 0)["train"]["label"][:] == first["train"]["label"][:]
