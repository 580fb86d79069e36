# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Readers of fine-grained data sets in the layout of their publishers.

Nothing is downloaded here: get the files from the publisher, agree to the terms, and name the archive, the folder that
it unpacks to, the folder above that, or a folder with all archives of the data set.

- `cub_200_2011`: Caltech-UCSD Birds-200-2011. Caltech vision lab, data set page: `CUB_200_2011.tgz`.
- `stanford_dogs`: Stanford Dogs. Stanford vision lab, ImageNetDogs page: `images.tar`, `lists.tar`, and for boxes
  `annotation.tar`.
- `nabirds`: NABirds. Cornell Lab of Ornithology, allaboutbirds.org: `nabirds.tar.gz`.
- `tiny_imagenet`: Tiny-ImageNet. Stanford course CS231n: `tiny-imagenet-200.zip`.
- `oxford_flowers`: Oxford 102 Category Flowers. Oxford Visual Geometry Group: `102flowers.tgz`, `imagelabels.mat`,
  `setid.mat`.
- `fgvc_aircraft`: FGVC-Aircraft 2013b. Oxford Visual Geometry Group: `fgvc-aircraft-2013b.tar.gz`.
- `stanford_cars`: Stanford Cars. Stanford AI lab, car data set page (offline at times): `cars_train.tgz`,
  `cars_test.tgz`, `car_devkit.tgz`, `cars_test_annos_withlabels.mat`.

Each reader returns a `DatasetDict` with `image` (not decoded, absolute paths), `label` and, if boxes are published,
`box`: left, top, right and bottom in pixels counted from 0; right and bottom are exclusive.
"""

import logging
import math
import os
import re
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np

from modeling_rbi import MissingPackageError, UserError
from modeling_rbi.errors_rbi import listed, shown_names

from .archives import is_archive, unpack
from .form import BOX, IMAGE


logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Published:
    """The publisher's figures of a data set: number of classes, images of each split, archives, and the folder that
    the archive unpacks to (`None` if the data set comes in several parts)."""

    num_classes: int
    split_sizes: Mapping[str, int]
    archives: tuple[str, ...]
    folder: str | None


PUBLISHED = {
    "cub_200_2011": Published(200, {"train": 5994, "test": 5794}, ("CUB_200_2011.tgz",), "CUB_200_2011"),
    "stanford_dogs": Published(
        120, {"train": 12000, "test": 8580}, ("images.tar", "lists.tar", "annotation.tar"), None
    ),
    "nabirds": Published(555, {"train": 23929, "test": 24633}, ("nabirds.tar.gz",), "nabirds"),
    "tiny_imagenet": Published(200, {"train": 100000, "test": 10000}, ("tiny-imagenet-200.zip",), "tiny-imagenet-200"),
    "oxford_flowers": Published(102, {"train": 1020, "validation": 1020, "test": 6149}, ("102flowers.tgz",), None),
    "fgvc_aircraft": Published(
        100,
        {"train": 3334, "validation": 3333, "test": 3333},
        ("fgvc-aircraft-2013b.tar.gz",),
        "fgvc-aircraft-2013b",
    ),
    "stanford_cars": Published(
        196, {"train": 8144, "test": 8041}, ("cars_train.tgz", "cars_test.tgz", "car_devkit.tgz"), None
    ),
}


def read_cub_200_2011(path: Path) -> datasets.DatasetDict:
    r"""
    CUB-200-2011: 200 birds, `train` and `test`, boxes.

    Class names are from `classes.txt` (`001.Black_footed_Albatross`). The README gives boxes as x, y, width and height
    in pixels and does not say whether the first pixel is 0 or 1; 0 is assumed.

    Raises:
        FileNotFoundError: if a file or a listed image is missing.
        UserError: if the files contradict each other, or a file or the archive is not in its format.
    """
    return _read_birds("cub_200_2011", path, only_used_classes=False)


def read_nabirds(path: Path) -> datasets.DatasetDict:
    r"""
    NABirds: 555 birds, `train` and `test`, boxes.

    `classes.txt` lists the nodes of a tree. Only some have images: these are the classes, in the order of their ids.
    Boxes are read as in CUB-200-2011.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
    """
    return _read_birds("nabirds", path, only_used_classes=True)


def read_stanford_dogs(path: Path) -> datasets.DatasetDict:
    r"""
    Stanford Dogs: 120 dogs, `train` and `test`; boxes if `Annotation/` exists.

    The name of a class is the name of its folder without the WordNet id (`n02085620-Chihuahua` gives `Chihuahua`). The
    box of an image with several dogs is that of the largest. The publisher does not say how pixels are counted; the
    coordinates are taken as edges counted from 0.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
        MissingPackageError: without scipy.
    """
    source = _Source("stanford_dogs", path)
    images, boxes = source.find("Images"), source.find_optional("Annotation")
    if boxes is None:
        logger.info("%s has no folder Annotation (annotation.tar), so there are no boxes.", path)
    names: dict[int, str] = {}
    splits = {}
    for split in ("train", "test"):
        file = source.find(f"{split}_list.mat")
        content = _load_mat(file, "file_list", "annotation_list", "labels")
        columns = [np.atleast_1d(content[name]).tolist() for name in ("file_list", "annotation_list")]
        columns.append(_integers(file, content["labels"]))
        if len({len(column) for column in columns}) > 1:
            raise UserError(
                f"{file} lists {' / '.join(str(len(column)) for column in columns)} files, annotations "
                "and labels: the numbers must be equal."
            )
        rows = splits[split] = _Rows()
        for file_name, annotation, label in zip(*columns, strict=True):
            name = re.sub(r"^n\d+-", "", _below(file, file_name).parent.name)
            if names.setdefault(label, name) != name:
                raise UserError(f"{file} gives label {label} to both {names[label]} and {name}.")
            box = _largest_object(boxes / _below(file, annotation)) if boxes is not None else None
            rows.add(images / file_name, label, box)
    return _build("stanford_dogs", path, sorted(names), names, splits)


def read_tiny_imagenet(path: Path) -> datasets.DatasetDict:
    r"""
    Tiny-ImageNet: 200 classes, `train` and `test`, boxes.

    The published test images have no labels and are left out. The published validation images become `test`, the
    split that papers report; draw validation images from `train`. Classes are in the order of their WordNet ids, as in
    all folders of classes; their names are from `words.txt`. The publisher does not say how boxes are counted. Because
    the coordinates 0 and 63 occur in images of 64 pixels, they are taken as counted from 0 with the last pixel inside.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
    """
    root = _Source("tiny_imagenet", path).find("wnids.txt").parent
    ids = sorted(line for _, line in _lines(root / "wnids.txt"))
    words = _read_table(root / "words.txt")
    names = {wnid: words[wnid] for wnid in _known(ids, words, root / "words.txt", "a name")}
    splits = {"train": _Rows(), "test": _Rows()}
    for wnid in ids:
        folder = root / "train" / wnid
        file = folder / f"{wnid}_boxes.txt"
        for name, line in _read_table(file).items():
            splits["train"].add(folder / "images" / _below(file, name), wnid, _inclusive(file, name, line.split(), 0))
    file = root / "val" / "val_annotations.txt"
    for name, line in _read_table(file).items():
        wnid, *box = line.split()
        splits["test"].add(root / "val" / "images" / _below(file, name), wnid, _inclusive(file, name, box, 0))
    return _build("tiny_imagenet", path, ids, names, splits)


def read_oxford_flowers(path: Path) -> datasets.DatasetDict:
    r"""
    Oxford Flowers 102: 102 flowers, `train`, `validation` and `test`, no boxes.

    The files do not name the classes, so they are called `class_001` to `class_102`, after their numbers.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
        MissingPackageError: without scipy.
    """
    source = _Source("oxford_flowers", path)
    images, label_file, split_file = (source.find(name) for name in ("jpg", "imagelabels.mat", "setid.mat"))
    labels = _integers(label_file, _load_mat(label_file, "labels")["labels"])
    split_ids = _load_mat(split_file, "trnid", "valid", "tstid")
    splits = {}
    taken: Counter[int] = Counter()
    for split, variable in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        rows = splits[split] = _Rows()
        for number in _integers(split_file, split_ids[variable]):
            if not 1 <= number <= len(labels):
                raise UserError(f"{split_file} lists image {number}, but {label_file} has labels 1 to {len(labels)}.")
            taken[number] += 1
            rows.add(images / f"image_{number:05d}.jpg", labels[number - 1])
    _check_once(taken, split_file)
    names = {number: f"class_{number:03d}" for number in range(1, max(labels, default=0) + 1)}
    return _build("oxford_flowers", path, sorted(names), names, splits)


def read_fgvc_aircraft(path: Path) -> datasets.DatasetDict:
    r"""
    FGVC-Aircraft: the 100 variants, `train`, `validation` and `test`, boxes.

    Classes are in the order of `variants.txt`. Published boxes are counted from 1 and include the last pixel. The
    lowest 20 rows of an image are a banner with the photographer's name, which the publisher asks to cut off; cropping
    to the box does.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
    """
    root = _Source("fgvc_aircraft", path).find("data/variants.txt", "variants.txt").parent
    names = [line for _, line in _lines(root / "variants.txt")]
    box_file = root / "images_box.txt"
    boxes = _read_table(box_file)
    splits = {}
    taken: Counter[str] = Counter()
    for split, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        rows, file = _Rows(), root / f"images_variant_{part}.txt"
        splits[split] = rows
        labels = _read_table(file)
        taken.update(labels.keys())
        for image in _known(labels, boxes, box_file, "a box"):
            box = _inclusive(box_file, image, boxes[image].split(), 1)
            rows.add(root / "images" / f"{_below(file, image)}.jpg", labels[image], box)
    _check_once(taken, root / "images_variant_*.txt")
    return _build("fgvc_aircraft", path, names, {name: name for name in names}, splits)


def read_stanford_cars(path: Path) -> datasets.DatasetDict:
    r"""
    Stanford Cars: 196 cars, `train` and `test`, boxes.

    The labels of the test images are in `cars_test_annos_withlabels.mat`, a separate download. Boxes are published as
    smallest and largest pixel. The publisher does not say how pixels are counted; as the devkit is for MATLAB, the
    first is assumed to be 1.

    Raises:
        FileNotFoundError, UserError: see [`read_cub_200_2011`].
        MissingPackageError: without scipy.
    """
    source = _Source("stanford_cars", path)
    files = {
        "train": source.find("devkit/cars_train_annos.mat", "cars_train_annos.mat"),
        "test": source.find("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"),
    }
    meta = source.find("devkit/cars_meta.mat", "cars_meta.mat")
    names = dict(enumerate(np.atleast_1d(_load_mat(meta, "class_names")["class_names"]).tolist(), start=1))
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    splits = {}
    for split, file in files.items():
        images, rows = source.find(f"cars_{split}"), _Rows()
        splits[split] = rows
        for row in np.atleast_1d(_load_mat(file, "annotations")["annotations"]).tolist():
            absent = [name for name in fields if not isinstance(row, dict) or name not in row]
            if absent:
                raise UserError(f"{file} has no field {absent[0]!r} in `annotations`.")
            *box, label, name = (row[field] for field in fields)
            rows.add(images / _below(file, name), _integers(file, label)[0], _inclusive(file, name, box, 1))
    return _build("stanford_cars", path, sorted(names), names, splits)


LAYOUTS: dict[str, Callable[[Path], datasets.DatasetDict]] = {
    "cub_200_2011": read_cub_200_2011,
    "stanford_dogs": read_stanford_dogs,
    "nabirds": read_nabirds,
    "tiny_imagenet": read_tiny_imagenet,
    "oxford_flowers": read_oxford_flowers,
    "fgvc_aircraft": read_fgvc_aircraft,
    "stanford_cars": read_stanford_cars,
}


class _Source:
    """Finds the files of a data set in or below a folder or archive."""

    def __init__(self, name: str, path: Path):
        self.published = PUBLISHED[name]
        self.name = name
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.start = unpack(self.path)

    @cached_property
    def _unpacked(self) -> list[Path]:
        """Unpacked archives of the data set that lie in the given folder, or beside the given archive."""
        folder = self.path if self.path.is_dir() else self.path.parent
        if self.published.folder is not None and folder != self.path:
            return []
        stems = {_stem(name) for name in self.published.archives}
        return [
            unpack(file)
            for file in sorted(folder.iterdir())
            if file.is_file() and is_archive(file) and _stem(file.name) in stems
        ]

    def _levels(self) -> Iterator[list[Path]]:
        """Folders to search, the nearest first; all folders of one level are equally near."""
        yield [self.start]
        below = _folders(self.start)
        yield [self.start / self.published.folder] if self.published.folder else []
        yield below
        yield [folder / self.published.folder for folder in below] if self.published.folder else []
        if self.start != self.path and self.published.folder is None:
            yield [self.path.parent]
        yield self._unpacked
        yield [inner for folder in self._unpacked for inner in _folders(folder)]

    def find_optional(self, *names: str) -> Path | None:
        """Path of the file or folder with one of these names, or `None`."""
        for level in self._levels():
            found = [next((folder / name for name in names if (folder / name).exists()), None) for folder in level]
            hits = [path for path in found if path is not None]
            if len(hits) > 1:
                raise UserError(f"There are both {hits[0]} and {hits[1]}: point at the folder of one data set.")
            if hits:
                return hits[0]
        return None

    def find(self, *names: str) -> Path:
        """Path of the file or folder with one of these names, which must exist."""
        path = self.find_optional(*names)
        if path is None:
            archives = ", ".join(self.published.archives)
            raise FileNotFoundError(
                f"{names[0]} of {self.name} is not in {self.path}, which must hold the content of the publisher's "
                f"archives ({archives}), or all of the archives."
            )
        return path


def _stem(name: str) -> str:
    return re.sub(r"\.(tar|tar\.gz|tgz|zip)$", "", name.lower())


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


@dataclass
class _Rows:
    """Images of a split: files, labels as published, and boxes if there are any."""

    images: list[Path] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)

    def add(self, image: Path, label: Any, box: Box | None = None):
        self.images.append(image)
        self.labels.append(label)
        if box is not None:
            self.boxes.append(box)


def _read_birds(name: str, path: Path, only_used_classes: bool) -> datasets.DatasetDict:
    root = _Source(name, path).find("images.txt").parent
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")
    images, labels, is_train, boxes, names = (_read_table(root / file) for file in files)
    for file, table in zip(files[1:4], (labels, is_train, boxes), strict=True):
        _known(images, table, root / file, "a line")
        _known(table, images, root / "images.txt", "an image")
    wrong = [image for image, value in is_train.items() if value not in ("0", "1")]
    if wrong:
        raise UserError(f"{root / files[2]} has {is_train[wrong[0]]!r} for {wrong[0]}: it must be 0 or 1.")
    used = set(labels.values())
    _known(used, names, root / "classes.txt", "a name")
    ids = [number for number in names if number in used or not only_used_classes]
    if not all(number.isdecimal() for number in ids):
        raise UserError(f"{root / 'classes.txt'} must begin each line with the number of a class.")
    splits = {"train": _Rows(), "test": _Rows()}
    for image, file_name in images.items():
        left, top, width, height = _numbers(root / files[3], image, boxes[image].split())
        splits["train" if is_train[image] == "1" else "test"].add(
            root / "images" / _below(root / "images.txt", file_name),
            labels[image],
            (left, top, left + width, top + height),
        )
    return _build(name, path, sorted(ids, key=int), names, splits)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and contents of the lines that are not empty, without surrounding white space."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the publisher's archive holds it.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _read_table(file: Path) -> dict[str, str]:
    """The first word of each line, and the rest of it."""
    table: dict[str, str] = {}
    for number, line in _lines(file):
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(f"{file}, line {number}: there must be at least two words, got {line!r}.")
        if key in table:
            raise UserError(f"{file}, line {number}: {key} is listed twice.")
        table[key] = rest[0]
    return table


def _load_mat(file: Path, *variables: str) -> dict[str, Any]:
    """Variables of a MATLAB file; a list of one element is read as the element."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingPackageError(f"scipy is needed to read {file}: pip install scipy.") from error
    try:
        content = loadmat(file, simplify_cells=True, variable_names=variables)
    except MemoryError:
        raise
    except Exception as error:
        # scipy raises errors of many kinds for broken files.
        raise UserError(f"{file} cannot be read as a MATLAB file ({error}): download it again.") from error
    absent = [name for name in variables if name not in content]
    if absent:
        raise UserError(f"{file} has no variable {absent[0]!r}.")
    return content


def _integers(file: Path, values: Any) -> list[int]:
    try:
        return [int(value) for value in np.atleast_1d(values)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} has {values!r} where numbers are expected.") from error


def _below(file: Path, name: Any) -> PurePosixPath:
    """A path that `file` lists; it must not lead out of its folder."""
    if not isinstance(name, str):
        raise UserError(f"{file} lists {name!r} where the name of a file is expected.")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{file} lists {name!r}, which points out of its folder.")
    return path


def _known(keys: Iterable[Any], table: Mapping[Any, Any], file: Path, what: str) -> list[Any]:
    """The keys as a list; all must be in the table that was read from `file`."""
    keys = list(keys)
    absent = [key for key in keys if key not in table]
    if absent:
        raise UserError(f"{file} lacks {what} for {len(absent)} of {len(keys)}: {listed(absent, 3)}.")
    return keys


def _check_once(taken: Counter, file: Path):
    """Refuses images that are in two splits, or in one split twice."""
    twice = [key for key, count in taken.items() if count > 1]
    if twice:
        raise UserError(f"{file} must list each image once, but lists {len(twice)} more often: {listed(twice, 3)}.")


def _numbers(file: Path, name: str, values: Sequence[Any]) -> Box:
    try:
        left, top, right, bottom = (float(value) for value in values)
    except ValueError as error:
        raise UserError(
            f"{file} must have 4 numbers as the box of {name}, not {' '.join(map(str, values))}."
        ) from error
    if not all(math.isfinite(value) for value in (left, top, right, bottom)):
        raise UserError(f"{file} must have finite numbers as the box of {name}, not {' '.join(map(str, values))}.")
    return left, top, right, bottom


def _inclusive(file: Path, name: str, values: Sequence[Any], first: int) -> Box:
    """A box that is published as its first and last column and row, counted from `first`."""
    left, top, right, bottom = _numbers(file, name, values)
    return left - first, top - first, right - first + 1, bottom - first + 1


def _largest_object(file: Path) -> Box:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, but a list names it.")
    try:
        tree = xml.etree.ElementTree.parse(file)
    except xml.etree.ElementTree.ParseError as error:
        raise UserError(f"{file} is not XML: {error}.") from error
    edges = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        _numbers(file, "an object", [box.findtext(edge, "nothing") for edge in edges]) for box in tree.iter("bndbox")
    ]
    if not boxes:
        raise UserError(f"{file} has no object with a box.")
    return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))


def _build(
    name: str, path: Path, ids: Sequence[Any], names: Mapping[Any, str], splits: Mapping[str, _Rows]
) -> datasets.DatasetDict:
    """The data set; class `k` is `ids[k]`. Names are as [`shown_names`] tells them apart, by their ids."""
    nameless = [number for number in ids if not isinstance(names[number], str)]
    if nameless:
        raise UserError(f"{path} must have text as the name of class {nameless[0]}.")
    if twice := [number for number, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{path} lists a class twice: {twice[0]}.")
    class_names = list(shown_names({number: names[number] for number in ids}).values())
    numbers = {number: label for label, number in enumerate(ids)}
    result = datasets.DatasetDict()
    for split, rows in splits.items():
        unknown = [label for label in rows.labels if label not in numbers]
        if unknown:
            raise UserError(f"{path} has images with the label {unknown[0]}, which is not among its classes.")
        if not rows.images:
            raise UserError(f"{path} has no images for the split {split!r} of {name}.")
        absent = [image for image in rows.images if not image.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} of {len(rows.images)} images of the split {split!r} of {name} are listed but do not "
                f"exist: {listed(absent, 3)}. The publisher's archive holds them."
            )
        features = {"image": IMAGE, "label": datasets.ClassLabel(names=class_names)}
        columns: dict[str, list] = {
            "image": [{"path": str(image), "bytes": None} for image in rows.images],
            "label": [numbers[label] for label in rows.labels],
        }
        if rows.boxes:
            features["box"] = BOX
            columns["box"] = rows.boxes
        result[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    _compare(name, path, len(ids), {split: len(rows.images) for split, rows in splits.items()})
    return result


def _compare(name: str, path: Path, num_classes: int, split_sizes: Mapping[str, int]):
    published = PUBLISHED[name]
    if (num_classes, split_sizes) != (published.num_classes, published.split_sizes):
        logger.warning(
            "%s has %s; %s as published has %s.",
            path,
            _counts(num_classes, split_sizes),
            name,
            _counts(published.num_classes, published.split_sizes),
        )


def _counts(num_classes: int, split_sizes: Mapping[str, int]) -> str:
    return ", ".join([f"{num_classes} classes", *(f"{size} {split}" for split, size in split_sizes.items())])
