# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Data sets that install by package name. They are downloaded on first use and checked by hash."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import datasets

from .cards import load_cards_splits
from .elpv import ELPV_CONFIGS, load_elpv_splits
from .emoji import EMOJI_CONFIGS, load_emoji_splits
from .fashion_mnist import FASHION_MNIST_SHOTS, load_fashion_mnist_splits
from .orl import ORL_SHOTS, load_orl_splits
from .packages import unknown_name_error


@dataclass(frozen=True)
class PackagedDataset:
    r"""
    A data set that installs by package name.

    Args:
        description (`str`):
            What the images show, and how the test differs.
        credit (`str`):
            Authors to credit, and the license.
        config_names (iterable of `str`):
            Names of its configurations.
        default_config_name (`str`):
            The configuration to use if none is named.
        load_splits (`Callable`):
            Loads the splits, given the name of a configuration and a seed.
    """

    description: str
    credit: str
    config_names: Iterable[str]
    default_config_name: str
    load_splits: Callable[[str, int], datasets.DatasetDict]


PACKAGED = {
    "orl_faces": PackagedDataset(
        description="400 photographs of 40 people's faces, aligned, 92 x 112 gray; few of each person to train on",
        credit="AT&T Laboratories Cambridge (credit asked for)",
        config_names=ORL_SHOTS,
        default_config_name="2-shot",
        load_splits=load_orl_splits,
    ),
    "emoji": PackagedDataset(
        description="drawings of 254 or 897 emoji in five styles; the test is a style not trained on",
        credit="Noto Emoji (Apache-2.0), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0), Fluent Emoji (MIT), "
        "Emoji One 1.5.2 (CC-BY-SA-4.0)",
        config_names=EMOJI_CONFIGS,
        default_config_name="twitter-fine",
        load_splits=load_emoji_splits,
    ),
    "elpv": PackagedDataset(
        description="2,624 photographs of solar cells, 300 x 300 gray, 4 levels of defects; the test is other modules",
        credit="Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021 (CC-BY-NC-SA-4.0, not for commercial use)",
        config_names=ELPV_CONFIGS,
        default_config_name="all",
        load_splits=load_elpv_splits,
    ),
    "cards": PackagedDataset(
        description="drawings of the 52 playing cards in 29 decks; the test is designs not trained on",
        credit="GNOME AisleRiot and the decks' authors (GPL-3.0-or-later)",
        config_names=["families"],
        default_config_name="families",
        load_splits=load_cards_splits,
    ),
    "fashion_mnist": PackagedDataset(
        description="70,000 photographs of clothes, 28 x 28 gray, 10 classes; the official test",
        credit="Zalando SE (MIT)",
        config_names=FASHION_MNIST_SHOTS,
        default_config_name="full",
        load_splits=load_fashion_mnist_splits,
    ),
}


def load(name: str, config_name: str | None, seed: int) -> datasets.DatasetDict:
    r"""
    Loads the splits of a packaged data set, with the columns `image` (`datasets.Image(decode=False)`) and `label`
    (`datasets.ClassLabel`). The splits do not overlap, and the same seed gives the same splits.

    Args:
        name (`str`):
            A key of `PACKAGED`.
        config_name (`str`, *optional*):
            The configuration. `None`: the default one.
        seed (`int`):
            Random seed, if the splits are drawn at random.

    Raises:
        ConnectionError: if a package is not in the cache and cannot be downloaded.
        UserError: if there is no such data set or configuration, or a package has another hash.
    """
    if name not in PACKAGED:
        raise unknown_name_error("packaged data set", name, PACKAGED)
    dataset = PACKAGED[name]
    if config_name is None:
        config_name = dataset.default_config_name
    if config_name not in dataset.config_names:
        raise unknown_name_error(f"configuration of {name}", config_name, dataset.config_names)
    return dataset.load_splits(config_name, seed)
