# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Images in folders: one folder for each class, or any images without labels."""

import logging
import mimetypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from PIL import Image, ImageFile

from modeling_rbi import NO_LABEL, UserError
from modeling_rbi.errors_rbi import listed, normalized

from .arguments import DataArguments
from .decode import first_bytes, known_formats, missing_decoder
from .form import BadDataError, path_dataset


logger = logging.getLogger(__name__)

# Names of the splits on the Hub and in folders, in lower case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# Types by Python's own table: the system's tables differ.
_TYPES = mimetypes.MimeTypes()
# Files that stand beside images and that this table lacks.
_OTHER_ENDINGS = {
    *(".aae", ".cfg", ".db", ".ini", ".jsonl", ".lnk", ".log", ".md", ".ndjson", ".npy", ".npz", ".parquet", ".pkl"),
    *(".pt", ".pth", ".rst", ".safetensors", ".toml", ".url", ".xmp", ".yaml", ".yml"),
}
_COMMON_FORMATS = {
    **{"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"},
    **{"HEIF": ".heic", "AVIF": ".avif"},
}
_HIDDEN_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin"}


@dataclass(frozen=True)
class FolderContent:
    """
    Content of a folder with one folder for each class: absolute paths in natural order. The class of an image is the
    folder directly below `folder`, however deep the image lies in it. `unread` are files of classes that may be images
    but cannot be read as such; see [`why_unread`].
    """

    folder: str
    images: dict[str, list[str]]
    hidden: list[str]
    strays: list[str]
    unread: list[str]
    empty_classes: list[str]

    @property
    def loose_images(self) -> list[str]:
        """Images directly in `folder`, which have no class."""
        return [path for path in self.strays if os.path.dirname(path) == self.folder and _is_image(path)]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the files of classes that may be images, and with folders of classes without images."""
        return [*map(why_unread, self.unread), *map(why_empty, self.empty_classes)]


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
        BadDataError: if a folder holds no images in folders of classes, or a name is not UTF-8; without
            `skip_bad_images`, also if a file or a folder of a class cannot be read.
    """
    # The builder `imagefolder` of datasets takes the folder directly above an image for its class, drops the labels if
    # depths differ, and caches its listing.
    folders = image_folders(args)
    contents = {name: walk_folder(folder) for name, folder in folders.items()}
    classes = {name: set(map(normalized, content.images)) for name, content in contents.items()}
    # Without the files, there is nothing to learn, or other splits have labels that `train` lacks.
    is_needed = len(classes["train"]) < 2 or any(found - classes["train"] for found in classes.values())
    if not args.skip_bad_images or is_needed:
        problems = [problem for content in contents.values() for problem in content.problems]
        _refuse(problems, listed(folders.values()), args.skip_bad_images)
    splits = {}
    for name, content in contents.items():
        folder = folders[name]
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


def read_unlabeled(folder: str | Path, skip_bad_images: bool = False) -> datasets.Dataset:
    r"""
    All images in a folder and the folders below it, each with the label -100. With `skip_bad_images`, files that may
    be images but cannot be read as such are left out.

    Raises:
        UserError: if it is not a folder.
        BadDataError: if it holds no images, a name is not UTF-8 or, without `skip_bad_images`, a file may be an image
            but cannot be read as one.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder.")
    content = walk_folder(Path(folder))
    loose = content.loose_images
    _refuse_other_encodings(loose, content.folder)
    unread = [path for path in content.strays if os.path.dirname(path) == content.folder and _may_be_image(path)]
    unread += content.unread
    if not skip_bad_images:
        _refuse([why_unread(path) for path in unread], str(folder), skip_bad_images)
    paths = [*sorted(loose, key=natural_key), *(path for paths in content.images.values() for path in paths)]
    if not paths:
        raise BadDataError(f"{folder} holds no images.")
    return path_dataset(paths, [NO_LABEL] * len(paths), "int64")


def walk_folder(folder: Path) -> FolderContent:
    r"""
    Sorts the content of a folder with one folder for each class into images, known by the endings that Pillow reads,
    and the rest. Files of classes may be images if their ending is that of another format of images or unknown, or if
    their first bytes are those of an image.

    Hidden are names with a leading dot, and what Windows and macOS leave behind (`Thumbs.db`, `__MACOSX`); hidden
    folders are not searched. Links are followed, except to a folder that contains them.

    Raises:
        BadDataError: if a name is not UTF-8.
    """
    root = os.path.abspath(folder)
    images: dict[str, list[str]] = {}
    content = FolderContent(root, images, [], [], [], [])
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
            if parent != root and _is_image(path):
                images[os.path.relpath(parent, root).split(os.sep)[0]].append(path)
            elif parent != root and _may_be_image(path):
                content.unread.append(path)
            else:
                content.strays.append(path)
    _refuse_other_encodings([*images, *content.unread, *(path for paths in images.values() for path in paths)], root)
    for name in [name for name, paths in images.items() if not paths]:
        content.empty_classes.append(os.path.join(root, name))
        del images[name]
    return content


def ignored_files(args: DataArguments) -> dict[str, list[str]]:
    """
    Files and folders among the folders of images that are not images of a class, by the kind of finding that
    `checks.py` makes of them.
    """
    found: dict[str, list[str]] = {"hidden_file": [], "stray_file": [], "unread_file": [], "empty_class": []}
    folders = image_folders(args)
    if args.train_dir is not None and folders["train"] != Path(args.train_dir):
        for path in sorted(set(Path(args.train_dir).absolute().iterdir())):
            if path not in {folder.absolute() for folder in folders.values()}:
                found["hidden_file" if _is_hidden(path.name) else "stray_file"].append(str(path))
    for folder in folders.values():
        content = walk_folder(folder)
        found["hidden_file"] += content.hidden
        found["stray_file"] += content.strays
        found["unread_file"] += content.unread
        found["empty_class"] += content.empty_classes
    return found


def why_unread(path: str) -> str:
    """Why a file that may be an image cannot be read as one, and what to do."""
    ending = os.path.splitext(path)[1].lower()
    if (hint := missing_decoder(first_bytes(path), ending)) is not None:
        return f"{path} cannot be read. {hint}"
    if (name := _common_format(path)) is not None:
        return f"{path} is an image of format {name}: give it the ending {_COMMON_FORMATS[name]}."
    if _type_of(path) is None:
        return f"{path} has no known ending: convert it to JPEG or PNG if it is an image, else remove it."
    return f"{path} has the ending of an image that cannot be read: convert it to JPEG or PNG."


def why_empty(folder: str) -> str:
    """What is wrong with a class folder without images, and what to do."""
    return f"{folder} holds no image that can be read: add images of the class, or remove the folder."


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


def _refuse(problems: list[str], where: str, is_skipped: bool):
    if problems:
        more = f"\n    and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise BadDataError(
            f"{where} has files or folders of classes that cannot be used, {len(problems)}:"
            + "".join(f"\n    {problem}" for problem in problems[:10])
            + f"{more}\nFix them"
            + ("." if is_skipped else ", or leave them out with --skip_bad_images.")
        )


def _refuse_other_encodings(paths: Iterable[str], folder: str):
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise BadDataError(f"A name in {folder} is not UTF-8, rename it: {path!a}.") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN_NAMES


def _is_image(path: str) -> bool:
    return _is_regular(path) and os.path.splitext(path)[1].lower() in _image_endings()


def _may_be_image(path: str) -> bool:
    """Whether a file that is none by its ending may still be an image."""
    ending = os.path.splitext(path)[1].lower()
    if not _is_regular(path) or ending in _image_endings():
        return False
    kind = _type_of(path)
    if ending not in _OTHER_ENDINGS and (kind is None or kind.startswith("image/") or ending == ".eps"):
        return True
    return _common_format(path) is not None or missing_decoder(first_bytes(path)) is not None


def _is_regular(path: str) -> bool:
    # Reading a pipe or a device would never end. A broken link counts as a missing image.
    return os.path.isfile(path) or not os.path.exists(path)


def _type_of(path: str) -> str | None:
    """The type of a file by its ending."""
    return _TYPES.guess_type(f"x{os.path.splitext(path)[1].lower()}", strict=False)[0]


def _common_format(path: str) -> str | None:
    """The format of an image by its first bytes, if it is a common one."""
    try:
        with Image.open(path, formats=[name for name in _COMMON_FORMATS if name in known_formats()]) as image:
            return image.format
    except Exception:  # Pillow's readers raise errors of many kinds
        return None


@cache
def _image_endings() -> set[str]:
    """Endings of the formats that Pillow decodes, without EPS and formats that it only recognizes."""
    formats = known_formats()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    return {ending for ending, name in Image.registered_extensions().items() if name in formats and name not in stubs}
