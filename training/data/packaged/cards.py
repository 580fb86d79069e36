# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Playing cards: drawings of 52 cards in 29 decks; the test uses designs that were not trained on.

Credit: GNOME AisleRiot and the decks' authors (GPL-3.0-or-later), from Debian's package gnome-cards-data.
"""

import gzip
import io

import datasets
import resvg_py
import torch
from PIL import Image

from .packages import DebianFiles, image_dataset, images_made_once, recipe_name


CARDS = DebianFiles(
    package="gnome-cards-data",
    version="1:3.22.23-1",
    file_name="gnome-cards-data.tar",
    sha256="34dd20d43cdc62e0e0ece776d37e561ec348e37e619f6b48bac05be6e44416b2",
    folder="usr/share/aisleriot/cards",
)
# Decks of one family share images: the same deck in other colors or as bitmaps, decks with the same number cards but
# other court cards, or with nearly the same court cards. swiss-xvii is left out: its suits are acorns, bells, roses
# and shields.
CARD_FAMILIES = [
    ["anglo", "anglo_bitmap", "gnomangelo", "gnomangelo_bitmap"],
    ["anglo_modern", "anglo_modern_4_color", "atlasnye", "atlasnye_skat", "Атласные"],
    ["neoclassical", "neoclassical_4_color"],
    ["berlin", "lattmann", "orell", "rheinland", "tarocco"],
    ["ancient_french", "bellot", "tigullio"],
    ["guyenne-classic", "paris"],
    ["anglo_poker"],
    ["dondorf"],
    ["ornamental"],
    ["plastic"],
    ["simplistic"],
    ["slavic_costumes"],
    ["tango"],
    ["tango_nuevo"],
]
_NUM_TEST, _NUM_VALIDATION = 3, 2
# Rows and columns of a deck's sheet, which also has a fifth row with jokers and the back.
_SUITS = ["clubs", "diamonds", "hearts", "spades"]
_RANKS = ["ace", "2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king"]
CARD_WIDTH = 128


def load_cards_splits(config_name: str, seed: int) -> datasets.DatasetDict:
    r"""
    Splits the families of decks at random: three for the test, two for validation and nine for training. All decks of
    a family are in the same split, so the sizes of the splits depend on the draw.

    Args:
        config_name (`str`):
            `"families"`.
        seed (`int`):
            Random seed of the draw.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    cards = images_made_once(recipe_name("cards", CARDS, CARD_FAMILIES, CARD_WIDTH), draw_cards)
    order = torch.randperm(len(CARD_FAMILIES), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = dict.fromkeys(order, "train")
    parts |= dict.fromkeys(order[:_NUM_TEST], "test")
    parts |= dict.fromkeys(order[_NUM_TEST : _NUM_TEST + _NUM_VALIDATION], "validation")
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, family in enumerate(cards["family"][:]):
        rows[parts[family]].append(row)
    return datasets.DatasetDict({part: cards.select(chosen) for part, chosen in rows.items()})


def draw_cards() -> datasets.Dataset:
    r"""
    Renders all cards on white, `CARD_WIDTH` pixels wide, with the columns `deck` and `family` (row of
    `CARD_FAMILIES`).

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    decks = [(deck, family) for family, names in enumerate(CARD_FAMILIES) for deck in names]
    sheets = CARDS.read([f"{deck}.svgz" for deck, _ in decks])
    names = [f"{rank} of {suit}" for suit in _SUITS for rank in _RANKS]
    images = []
    for (deck, _), sheet in zip(decks, sheets, strict=True):
        cards = _cut(_draw_sheet(gzip.decompress(sheet).decode()))
        images += [(f"{deck}_{name.replace(' ', '_')}.png", card) for name, card in zip(names, cards, strict=True)]
    return image_dataset(
        images,
        list(range(len(names))) * len(decks),
        names,
        deck=[deck for deck, _ in decks for _ in names],
        family=[family for _, family in decks for _ in names],
    )


def _draw_sheet(svg: str) -> Image.Image:
    # Text is not rendered (such as the corner figures of bellot), so no image depends on the fonts of the machine.
    drawing = resvg_py.svg_to_bytes(
        svg_string=svg, width=CARD_WIDTH * len(_RANKS), background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(drawing))).convert("RGB")


def _cut(sheet: Image.Image) -> list[bytes]:
    """The 52 cards of a sheet as PNG files, suit by suit."""
    cards = []
    for row in range(len(_SUITS)):
        top, bottom = (round(sheet.height * edge / (len(_SUITS) + 1)) for edge in (row, row + 1))
        for column in range(len(_RANKS)):
            buffer = io.BytesIO()
            sheet.crop((column * CARD_WIDTH, top, (column + 1) * CARD_WIDTH, bottom)).save(buffer, "PNG")
            cards.append(buffer.getvalue())
    return cards
