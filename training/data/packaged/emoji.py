# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Emoji in five free drawing styles, one image per class and style; the test is a style that was not trained on.

Credits: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter, CC-BY-4.0), OpenMoji (CC-BY-SA-4.0), Fluent Emoji
(Microsoft, MIT), Emoji One 1.5.2 (CC-BY-SA-4.0), all from the packages of Iconify.
"""

import json
from collections.abc import Collection

import datasets
import resvg_py

from .packages import NpmTarball, image_dataset, images_made_once, recipe_name


# The style after the one held out for the test is for validation; the first follows the last.
EMOJI_STYLES = {
    "google": NpmTarball(
        package="@iconify-json/noto",
        version="1.2.9",
        file_name="iconify-json-noto-1.2.9.tgz",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twitter": NpmTarball(
        package="@iconify-json/twemoji",
        version="1.2.5",
        file_name="iconify-json-twemoji-1.2.5.tgz",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "openmoji": NpmTarball(
        package="@iconify-json/openmoji",
        version="1.2.29",
        file_name="iconify-json-openmoji-1.2.29.tgz",
        sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "fluent": NpmTarball(
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        file_name="iconify-json-fluent-emoji-flat-1.2.6.tgz",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojione": NpmTarball(
        package="@iconify-json/emojione-v1",
        version="1.2.3",
        file_name="iconify-json-emojione-v1-1.2.3.tgz",
        sha256="6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    ),
}
EMOJI_CONFIGS = [f"{style}-{classes}" for classes in ("fine", "all") for style in EMOJI_STYLES]
FINE_CATEGORIES = ("Smileys & Emotion", "People & Body", "Animals & Nature")
EMOJI_SIZE = 128


def load_emoji_splits(config_name: str, seed: int) -> datasets.DatasetDict:
    r"""
    Uses three styles for training, one for validation and one for the test. Each has one image of each class.

    Args:
        config_name (`str`):
            `<style>-fine` (254 classes: smileys, people, animals and nature) or `<style>-all` (897 classes), where
            `<style>` is held out for the test. The next style in `EMOJI_STYLES` is for validation.
        seed (`int`):
            Has no effect: the splits are fixed.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    held_out, classes = config_name.split("-")
    styles = list(EMOJI_STYLES)
    validation = styles[(styles.index(held_out) + 1) % len(styles)]
    emoji = images_made_once(
        recipe_name(f"emoji-{classes}", EMOJI_STYLES, EMOJI_SIZE, FINE_CATEGORIES),
        lambda: draw_emoji(FINE_CATEGORIES if classes == "fine" else None),
    )
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, style in enumerate(emoji["style"][:]):
        rows[{held_out: "test", validation: "validation"}.get(style, "train")].append(row)
    return datasets.DatasetDict({part: emoji.select(chosen) for part, chosen in rows.items()})


def draw_emoji(chosen_categories: Collection[str] | None) -> datasets.Dataset:
    r"""
    Renders the emoji that all styles have, on white, with the columns `style` and `category`. There are no variants in
    skin color.

    Args:
        chosen_categories (collection of `str`, *optional*):
            Unicode categories to use. `None`: all.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    icons = {style: _read_json(package, "icons") for style, package in EMOJI_STYLES.items()}
    # Name of each sequence of code points in each style. Emoji One's table is empty; its names are those in Noto's.
    tables = {style: _read_json(package, "chars") for style, package in EMOJI_STYLES.items()}
    own_names = icons["emojione"]["icons"].keys() | icons["emojione"]["aliases"].keys()
    tables["emojione"] = {points: name for points, name in tables["google"].items() if name in own_names}
    categories = {
        name: category
        for category, names in _read_json(EMOJI_STYLES["google"], "metadata")["categories"].items()
        for name in names
    }
    classes = [
        (name, points, categories[name])
        for points, name in tables["google"].items()
        if all(points in table for table in tables.values())
        and (chosen_categories is None or categories[name] in chosen_categories)
    ]
    classes.sort(key=lambda item: (item[2], item[0]))
    images, labels = [], []
    columns: dict[str, list[str]] = {"style": [], "category": []}
    for style, table in tables.items():
        for label, (name, points, category) in enumerate(classes):
            drawing = resvg_py.svg_to_bytes(
                svg_string=_svg(icons[style], table[points]), background="#ffffff", skip_system_fonts=True
            )
            images.append((f"{style}_{name}.png", bytes(drawing)))
            labels.append(label)
            columns["style"].append(style)
            columns["category"].append(category)
    return image_dataset(images, labels, [name.replace("-", " ") for name, _, _ in classes], **columns)


def _read_json(package: NpmTarball, name: str) -> dict:
    return json.loads(package.read([f"package/{name}.json"])[0])


def _svg(icons: dict, name: str) -> str:
    """An icon of an Iconify set (https://iconify.design/docs/types/iconify-json.html) as a square SVG."""
    icon, alias = icons["icons"].get(name), {}
    if icon is None:
        alias = icons["aliases"][name]
        icon = icons["icons"][alias["parent"]]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{EMOJI_SIZE}" '
        f'height="{EMOJI_SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
