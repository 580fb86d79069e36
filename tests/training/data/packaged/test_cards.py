"""Playing cards: designs are held out whole."""

import gzip
import io
import itertools
import tarfile

import numpy as np
import pytest

from training.data.decode import decode_image
from training.data.packaged import cards
from training.data.packaged.cards import CARD_FAMILIES, draw_cards, load_cards_splits
from training.data.packaged.packages import DebianFiles


@pytest.fixture
def small_decks(monkeypatch, tmp_path):
    """Decks of plain colors, one for each card, in place of the real package: red is the column, green the row."""
    cells = "".join(
        f'<rect x="{10 * column}" y="{15 * row}" width="10" height="15" fill="rgb({20 * column},{60 * row},0)"/>'
        for row in range(5)
        for column in range(13)
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="130" height="75">{cells}</svg>'
    sheet = gzip.compress(svg.encode())
    families = [[f"deck{family}"] for family in range(6)] + [["twin_a", "twin_b"]]
    with tarfile.open(tmp_path / "cards.tar", "w") as archive:
        for deck in itertools.chain(*families):
            member = tarfile.TarInfo(f"{deck}.svgz")
            member.size = len(sheet)
            archive.addfile(member, io.BytesIO(sheet))
    monkeypatch.setattr(DebianFiles, "fetch", lambda self: tmp_path / "cards.tar")
    monkeypatch.setattr(cards, "CARD_FAMILIES", families)
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_cuts_the_sheet_into_its_cards(small_decks):
    drawn = draw_cards()
    assert len(drawn) == 8 * 52
    for row in drawn.select(range(52)):
        rank, _, suit = drawn.features["label"].int2str(row["label"]).split()
        column = ["ace", *map(str, range(2, 11)), "jack", "queen", "king"].index(rank)
        color = (20 * column, 60 * ["clubs", "diamonds", "hearts", "spades"].index(suit), 0)
        image = decode_image(row["image"])
        assert image.size == (128, 192)
        assert image.getextrema() == tuple((channel, channel) for channel in color)


@pytest.mark.slow
def test_holds_out_whole_families(small_decks):
    for seed in range(4):
        splits = load_cards_splits("families", seed)
        families = {part: set(split["family"]) for part, split in splits.items()}
        assert {part: len(own) for part, own in families.items()} == {"train": 2, "validation": 2, "test": 3}
        assert len(set.union(*families.values())) == 7


@pytest.mark.slow
def test_the_published_decks():
    splits = load_cards_splits("families", 0)
    assert sum(len(split) for split in splits.values()) == 29 * 52
    for split in splits.values():
        assert set(np.bincount(split["label"][:], minlength=52)) == {len(set(split["deck"]))}


@pytest.mark.slow
def test_decks_of_different_families_do_not_share_images():
    rows = [row for split in load_cards_splits("families", 0).values() for row in split]
    decks: dict[int, dict[str, np.ndarray]] = {}
    for row in sorted(rows, key=lambda row: row["label"]):
        # Ink, so that the same deck in other colors is the same.
        ink = 255 - np.asarray(decode_image(row["image"]).resize((64, 96))).min(-1).astype(float)[6:-6, 6:-6].ravel()
        decks.setdefault(row["family"], {}).setdefault(row["deck"], []).append((ink - ink.mean()) / ink.std())
    stacked = {family: [np.stack(ink) for ink in own.values()] for family, own in decks.items()}
    is_court = np.arange(52) % 13 >= 10

    def likeness(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        """Median correlation of the court cards and of the others."""
        correlations = (one * other).mean(1)
        return float(np.median(correlations[is_court])), float(np.median(correlations[~is_court]))

    for one, other in itertools.combinations(stacked, 2):
        for a, b in itertools.product(stacked[one], stacked[other]):
            courts, others = likeness(a, b)
            assert courts < 0.7
            assert others < 0.9
    # The measure does see decks of a line: the same number cards, or the same courts.
    assert CARD_FAMILIES[0][:2] == ["anglo", "anglo_bitmap"]
    assert min(likeness(*stacked[0][:2])) > 0.9
