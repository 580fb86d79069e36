"""Emoji in five drawing styles."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from training.data.decode import decode_image
from training.data.packaged import emoji
from training.data.packaged.emoji import EMOJI_STYLES, FINE_CATEGORIES, draw_emoji, load_emoji_splits


SQUARE = '<path fill="#{color}" d="M0 0h{half}v{size}H0z"/>'


def _icons(color: str, size: int, names: dict[str, dict]) -> dict:
    """A set whose icons are half a square on the left."""
    body = SQUARE.format(color=color, half=size // 2, size=size)
    return {
        "width": size,
        "height": size,
        "icons": {name: {"body": body} for name, alias in names.items() if not alias},
        "aliases": {name: alias for name, alias in names.items() if alias},
    }


@pytest.fixture
def small_styles(monkeypatch, tmp_path):
    """Five styles of four emoji, of which three are common to all; in place of the real packages."""
    categories = {"Smileys & Emotion": ["grin"], "Objects": ["axe", "pin"], "Animals & Nature": ["cat"]}
    tables = {
        "google": {"1": "grin", "2": "axe", "3": "pin", "4": "cat"},
        "twitter": {"1": "smile", "2": "axe", "3": "pin", "4": "cat"},
        "openmoji": {"4": "cat", "1": "grin", "2": "axe"},
        "fluent": {"1": "grin", "2": "axe", "3": "pin", "4": "cat"},
        "emojione": {},
    }
    mirrored = {"fluent": {"axe": {"parent": "cat", "hFlip": True}}, "emojione": {"axe": {"parent": "old-axe"}}}
    for number, (style, table) in enumerate(tables.items()):
        names = {name: {} for name in table.values() or ["grin", "old-axe", "cat"]} | mirrored.get(style, {})
        content = {"icons": _icons(f"{number:x}" * 6, 20 + 10 * number, names), "chars": table}
        content["metadata"] = {"categories": categories}
        path = tmp_path / f"{style}.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for name, value in content.items():
                data = json.dumps(value).encode()
                member = tarfile.TarInfo(f"package/{name}.json")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        monkeypatch.setattr(type(EMOJI_STYLES[style]), "fetch", lambda self: tmp_path / f"{self.package}.tgz")
    small = {style: type(package)(style, "1", "x", "0" * 64) for style, package in EMOJI_STYLES.items()}
    monkeypatch.setattr(emoji, "EMOJI_STYLES", small)
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


def test_takes_what_all_styles_have_by_code_points(small_styles):
    drawn = draw_emoji(None)
    assert drawn.features["label"].names == ["cat", "axe", "grin"]
    assert drawn["style"][:] == [style for style in EMOJI_STYLES for _ in range(3)]
    assert draw_emoji(FINE_CATEGORIES).features["label"].names == ["cat", "grin"]


def test_draws_each_style_in_its_own_size_and_mirrors_where_the_set_says_so(small_styles):
    for row in draw_emoji(None):
        image = decode_image(row["image"])
        left, right = image.getpixel((10, 64)), image.getpixel((117, 64))
        is_mirrored = row["style"] == "fluent" and row["label"] == 1
        color = (17 * list(EMOJI_STYLES).index(row["style"]),) * 3
        assert image.size == (128, 128)
        assert (left, right) == (((255,) * 3, color) if is_mirrored else (color, (255,) * 3))


@pytest.mark.parametrize(
    ("config_name", "test", "validation"),
    [("google-all", "google", "twitter"), ("emojione-fine", "emojione", "google")],
)
def test_holds_out_whole_styles(small_styles, config_name, test, validation):
    splits = load_emoji_splits(config_name, 0)
    assert set(splits["test"]["style"]) == {test}
    assert set(splits["validation"]["style"]) == {validation}
    assert set(splits["train"]["style"]) == set(EMOJI_STYLES) - {test, validation}


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "number"), [("fine", 254), ("all", 897)])
def test_the_published_sets(classes, number):
    splits = load_emoji_splits(f"twitter-{classes}", 0)
    assert {part: len(split) for part, split in splits.items()} == {
        "train": 3 * number,
        "validation": number,
        "test": number,
    }
    names = splits["train"].features["label"].names
    assert len(set(names)) == number
    assert {"cat face", "dolphin", "grinning face", "see no evil monkey"} <= set(names)


@pytest.mark.slow
def test_drawings_of_a_name_are_alike_in_all_styles():
    splits = load_emoji_splits("twitter-fine", 0)
    images: dict[str, list] = {}
    for split in splits.values():
        for row in split:
            small = decode_image(row["image"]).resize((8, 8), Image.Resampling.BOX)
            images.setdefault(row["style"], []).append(torch.tensor(list(small.get_flattened_data())).flatten())
    features = {style: torch.stack(rows).double() for style, rows in images.items()}
    features = {style: torch.nn.functional.normalize(rows - rows.mean(0), dim=-1) for style, rows in features.items()}
    # Of a style whose names went with other drawings, 1 in 254 would be found.
    for style, rows in features.items():
        found = (rows @ features["google" if style != "google" else "twitter"].T).argmax(1)
        assert (found == torch.arange(254)).double().mean() > 0.1
