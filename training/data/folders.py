# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images in folders: one folder for each class, or any images without labels."""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from PIL import Image, ImageFile

from modeling_rbi import NO_LABEL, UserError
from modeling_rbi.errors_rbi import listed

from .arguments import DataArguments
from .form import BadDataError, path_dataset


logger = logging.getLogger(__name__)

# Names of the splits on the Hub and in folders, in lower case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_HIDDEN_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin"}


@dataclass(frozen=True)
class FolderContent:
    """
    Content of a folder with one folder for each class: absolute paths in natural order. The class of an image is the
    folder directly below `folder`, however deep the image lies in it.
    """

    folder: str
    images: dict[str, list[str]]
    hidden: list[str]
    strays: list[str]
    empty_classes: list[str]

    @property
    def loose_images(self) -> list[str]:
        """Images directly in `folder`, which have no class."""
        return [path for path in self.strays if os.path.dirname(path) == self.folder and _is_image(path)]


def image_folders(args: DataArguments) -> dict[str, Path]:
    r"""
    The folder of each split if the data are folders of images; empty otherwise.

    Raises:
        UserError: if a folder does not exist, or a split is named twice.
    """
    if args.train_dir is None:
        return {}
    given = {"train": args.train_dir, "validation": args.validation_dir, "test": args.test_dir}
    folders = {name: Path(folder) for name, folder in given.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"--{name}_dir {folder} is not a folder.")
    for name, folder in _split_folders(folders["train"]).items():
        if name != "train" and name in folders:
            raise UserError(
                f"--{name}_dir {folders[name]} and {folder} are both for {name}: give --train_dir "
                f"{folders['train'] / 'train'}, or leave --{name}_dir out."
            )
        folders[name] = folder
    return folders


def read_folders(args: DataArguments) -> dict[str, datasets.Dataset]:
    r"""
    Reads the images of each split; labels are the names of the folders.

    Raises:
        UserError: see [`image_folders`].
        BadDataError: if a folder holds no images in folders of classes, or a name is not UTF-8.
    """
    # The builder `imagefolder` of datasets takes the folder directly above an image for its class, drops the labels if
    # depths differ, and caches its listing.
    splits = {}
    for name, folder in image_folders(args).items():
        content = walk_folder(folder)
        if not content.images:
            loose = content.loose_images
            if name == "test" and loose and args.test_dir is None:
                logger.warning("%s has no folders of classes, so its images have no labels: left out", folder)
                continue
            found = f"{len(loose)} images but no folders of classes" if loose else "no images"
            raise BadDataError(f"{folder} has {found}: put the images of each class in a folder of its own.")
        splits[name] = path_dataset(
            [path for paths in content.images.values() for path in paths],
            [label for label, paths in content.images.items() for _ in paths],
            "string",
        )
    return splits


def read_unlabeled(folder: str | Path) -> datasets.Dataset:
    r"""
    All images in a folder and the folders below it, each with the label -100.

    Raises:
        UserError: if it is not a folder.
        BadDataError: if it holds no images, or a name is not UTF-8.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder.")
    content = walk_folder(Path(folder))
    loose = content.loose_images
    _refuse_other_encodings(loose, content.folder)
    paths = [*sorted(loose, key=natural_key), *(path for paths in content.images.values() for path in paths)]
    if not paths:
        raise BadDataError(f"{folder} holds no images.")
    return path_dataset(paths, [NO_LABEL] * len(paths), "int64")


def walk_folder(folder: Path) -> FolderContent:
    r"""
    Sorts the content of a folder with one folder for each class into images, known by the endings that Pillow reads,
    and the rest.

    Hidden are names with a leading dot, and what Windows and macOS leave behind (`Thumbs.db`, `__MACOSX`); hidden
    folders are not searched. Links are followed, except to a folder that contains them.

    Raises:
        BadDataError: if a name is not UTF-8.
    """
    root = os.path.abspath(folder)
    images: dict[str, list[str]] = {}
    content = FolderContent(root, images, [], [], [])
    above: dict[str, set[str]] = {}  # each folder, with the real paths of itself and the folders that contain it
    for parent, folders, files in os.walk(root, followlinks=True):
        real, outer = os.path.realpath(parent), above.get(os.path.dirname(parent), set())
        if real in outer:
            folders.clear()
            continue
        above[parent] = outer | {real}
        for names in (folders, files):
            content.hidden.extend(os.path.join(parent, name) for name in sorted(names) if _is_hidden(name))
            names[:] = sorted((name for name in names if not _is_hidden(name)), key=natural_key)
        if parent == root:
            images.update({name: [] for name in folders})
        for name in files:
            path = os.path.join(parent, name)
            if parent == root or not _is_image(path):
                content.strays.append(path)
            else:
                images[os.path.relpath(parent, root).split(os.sep)[0]].append(path)
    _refuse_other_encodings([*images, *(path for paths in images.values() for path in paths)], root)
    for name in [name for name, paths in images.items() if not paths]:
        content.empty_classes.append(os.path.join(root, name))
        del images[name]
    return content


def ignored_files(args: DataArguments) -> dict[str, list[str]]:
    """Files and folders among the folders of images that are not images of a class: `"hidden"` and `"stray"`."""
    found: dict[str, list[str]] = {"hidden": [], "stray": []}
    folders = image_folders(args)
    if args.train_dir is not None and folders["train"] != Path(args.train_dir):
        for path in sorted(set(Path(args.train_dir).absolute().iterdir())):
            if path not in {folder.absolute() for folder in folders.values()}:
                found["hidden" if _is_hidden(path.name) else "stray"].append(str(path))
    for folder in folders.values():
        content = walk_folder(folder)
        found["hidden"] += content.hidden
        found["stray"] += [*content.strays, *content.empty_classes]
    return found


def natural_key(name: str) -> tuple:
    """Key that sorts numbers in names by value: `class2` before `class10`."""
    parts = re.split(r"(\d+)", name)
    return [(part.lower(), 0) if index % 2 == 0 else ("", int(part)) for index, part in enumerate(parts)], name


def _split_folders(folder: Path) -> dict[str, Path]:
    """Folders of splits in a folder; empty if its folders are classes, even if one of these is called train."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))
    found: dict[str, Path] = {}
    others = []
    for path in folders:
        split = next((split for split, names in SPLIT_NAMES.items() if path.name.lower() in names), None)
        if split is None:
            others.append(path.name)
        elif split in found:
            raise UserError(f"{found[split]} and {path} are both for {split}: name one with --{split}_dir.")
        else:
            found[split] = path
    if not found:
        return {}
    if "train" not in found or not any(
        path.is_dir() and not _is_hidden(path.name) for path in found["train"].iterdir()
    ):
        if not others:
            raise BadDataError(
                f"{folder} has only the folders {listed(path.name for path in found.values())}, and "
                f"{folder / 'train'} has no folders of classes: put the images of each class in a folder of its own."
            )
        return {}
    with_images = [name for name in others if any(_is_image(str(path)) for path in (folder / name).iterdir())]
    if with_images:
        raise UserError(
            f"{folder} has a folder {found['train'].name} with folders in it, and beside it folders of images "
            f"({listed(with_images)}): name the folders of the splits, --train_dir {found['train']}, "
            "--validation_dir and --test_dir."
        )
    if others:
        logger.warning("Folders of %s that are neither train, validation nor test are left out: %s", folder, others)
    return found


def _refuse_other_encodings(paths: Iterable[str], folder: str):
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise BadDataError(f"A name in {folder} is not UTF-8, rename it: {path!a}.") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN_NAMES


def _is_image(path: str) -> bool:
    # Reading a pipe or a device would never end. A broken link counts as a missing image.
    regular = os.path.isfile(path) or not os.path.exists(path)
    return regular and os.path.splitext(path)[1].lower() in _image_endings()


@cache
def _image_endings() -> set[str]:
    """Endings of the formats that Pillow decodes, without EPS and formats that it only recognizes."""
    Image.init()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    return {
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in stubs and name != "EPS"
    }
