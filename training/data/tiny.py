# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Small synthetic data sets in exactly the published layouts, for dry runs and tests.

Each image is gray noise with a rectangle in the color of its class. The box of the image, written in the publisher's
convention, is that rectangle, so the pixels show whether a reader gets labels and boxes right. Ids and names have the
publisher's form, and their order does not reveal the labels.
"""

import colorsys
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_rbi import UserError

from .layouts import PUBLISHED


@dataclass(frozen=True)
class Example:
    """A synthetic image: its class (from 0), split, pixels, and box (left, top, right and bottom, counted from 0;
    right and bottom are exclusive)."""

    label: int
    split: str
    image: Image.Image
    box: tuple[int, int, int, int]


def make_published(
    name: str, folder: Path, num_classes: int = 4, images_per_class: int = 6, archive: bool = False
) -> Path:
    r"""
    Writes a small data set in a published layout.

    Args:
        name (`str`):
            The layout, a key of `training.data.layouts.LAYOUTS`.
        folder (`Path`):
            Where to write. It is created if it does not exist.
        num_classes (`int`, *optional*, defaults to 4):
            Number of classes, at least 2.
        images_per_class (`int`, *optional*, defaults to 6):
            Number of images of each class, spread evenly over the splits; at least one for each split.
        archive (`bool`, *optional*, defaults to `False`):
            Whether to write the publisher's archives instead of their content.

    Returns:
        `Path`: the argument for the reader of the layout: the folder or the archive, or the folder with all parts if
        the data set is published in several.

    Raises:
        UserError: if the layout is unknown, or there are too few classes or images.
        MissingPackageError: if the layout has MATLAB files and scipy is not installed.
    """
    if name not in _MAKERS:
        raise UserError(f"{name!r} is not a published layout: choose one of {', '.join(_MAKERS)}.")
    published = PUBLISHED[name]
    splits = list(published.split_sizes)
    if num_classes < 2 or images_per_class < len(splits):
        raise UserError(
            f"{name} needs at least 2 classes and {len(splits)} images of each, got {num_classes} and "
            f"{images_per_class}."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    examples = [
        _draw(label, splits[number * len(splits) // images_per_class], num_classes, rng)
        for label in range(num_classes)
        for number in range(images_per_class)
    ]
    shuffled = [examples[number] for number in rng.permutation(len(examples))]
    parts = _MAKERS[name](folder, shuffled, num_classes, rng)
    if archive:
        for file_name, members in parts.items():
            _pack(folder, file_name, members)
    if published.folder is None:
        return folder
    return folder / (published.archives[0] if archive else published.folder)


def _draw(label: int, split: str, num_classes: int, rng: np.random.Generator) -> Example:
    # The size of Tiny-ImageNet's images, so that it fits all layouts.
    width = height = 64
    left, top, right, bottom = (int(edge) for edge in rng.integers([0, 0, 43, 43], [22, 22, 65, 65]))
    pixels = np.repeat(rng.integers(100, 156, (height, width, 1)), 3, axis=2)
    pixels[top:bottom, left:right] = class_color(label, num_classes)
    pixels[top:bottom, left:right] += rng.integers(-5, 6, (bottom - top, right - left, 1))
    return Example(label, split, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), (left, top, right, bottom))


def class_color(label: int, num_classes: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of the rectangles of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label / num_classes, 0.9, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def _save(example: Example, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    example.image.save(path, format="JPEG", quality=95, subsampling=0)


def _write(path: Path, lines: list[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _save_mat(path: Path, **variables):
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables, do_compression=True)


def _cells(values: list[str]) -> np.ndarray:
    """A cell array of one column."""
    cells = np.empty((len(values), 1), dtype=object)
    cells[:, 0] = values
    return cells


def _make_cub(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    root = folder / "CUB_200_2011"
    names = [f"{label + 1:03d}.Made_up_Bird_{label + 1}" for label in range(num_classes)]
    files, boxes = [], []
    for number, example in enumerate(examples, start=1):
        name = names[example.label]
        files.append(f"{name}/{name[4:]}_{number:04d}_{rng.integers(10**6)}.jpg")
        _save(example, root / "images" / files[-1])
        left, top, right, bottom = example.box
        boxes.append(f"{left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}")
    _write_birds(root, [str(number) for number in range(1, len(examples) + 1)], examples, files, boxes)
    _write(
        root / "image_class_labels.txt",
        [f"{number} {example.label + 1}" for number, example in enumerate(examples, start=1)],
    )
    _write(root / "classes.txt", [f"{label + 1} {name}" for label, name in enumerate(names)])
    _write(folder / "attributes.txt", ["1 has_bill_shape::curved_(up_or_down)"])
    return {"CUB_200_2011.tgz": ["CUB_200_2011", "attributes.txt"]}


def _make_nabirds(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    root = folder / "nabirds"
    # Numbers of the leaves, with gaps and written in another order; 0 is the root of the tree.
    numbers = [295 + 7 * label for label in range(num_classes)]
    ids = [uuid.UUID(bytes=rng.bytes(16)) for _ in examples]
    files, boxes = [], []
    for image, example in zip(ids, examples, strict=True):
        files.append(f"{numbers[example.label]:04d}/{image.hex}.jpg")
        _save(example, root / "images" / files[-1])
        left, top, right, bottom = example.box
        boxes.append(f"{left} {top} {right - left} {bottom - top}")
    _write_birds(root, [str(image) for image in ids], examples, files, boxes)
    _write(
        root / "image_class_labels.txt",
        [f"{image} {numbers[example.label]}" for image, example in zip(ids, examples, strict=True)],
    )
    leaves = [f"{number} Made-up Bird {label} (Adult)" for label, number in enumerate(numbers)]
    _write(root / "classes.txt", ["0 Birds", "1 Made-up Birds", *reversed(leaves)])
    _write(root / "hierarchy.txt", ["1 0", *(f"{number} 1" for number in numbers)])
    sizes = [
        f"{image} {example.image.width} {example.image.height}" for image, example in zip(ids, examples, strict=True)
    ]
    _write(root / "sizes.txt", sizes)
    _write(root / "photographers.txt", [f"{image} Nobody" for image in ids])
    return {"nabirds.tar.gz": ["nabirds"]}


def _write_birds(root: Path, ids: list[str], examples: list[Example], files: list[str], boxes: list[str]):
    splits = [str(int(example.split == "train")) for example in examples]
    for name, values in (("images", files), ("train_test_split", splits), ("bounding_boxes", boxes)):
        _write(root / f"{name}.txt", [f"{image} {value}" for image, value in zip(ids, values, strict=True)])


def _make_stanford_dogs(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for number, example in enumerate(examples):
        wnid = f"n{2085620 + example.label:08d}"
        stem = f"{wnid}-Made_up_dog_{example.label}/{wnid}_{number}"
        lists[example.split].append((stem, example.label + 1))
        _save(example, folder / "Images" / f"{stem}.jpg")
        # A smaller dog comes first.
        left, top, right, bottom = example.box
        _write(
            folder / "Annotation" / stem,
            [
                "<annotation>",
                f"<folder>{wnid[1:]}</folder><filename>{wnid}_{number}</filename><segment>0</segment>",
                f"<size><width>{example.image.width}</width><height>{example.image.height}</height><depth>3</depth>"
                "</size>",
                *(
                    f"<object><name>Made_up_dog_{example.label}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
                    f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
                    for xmax, ymax in ((left + 2, top + 2), (right, bottom))
                ),
                "</annotation>",
            ],
        )
    for split, rows in (*lists.items(), ("file", lists["train"] + lists["test"])):
        _save_mat(
            folder / f"{split}_list.mat",
            file_list=_cells([f"{stem}.jpg" for stem, _ in rows]),
            annotation_list=_cells([stem for stem, _ in rows]),
            labels=np.array([[label] for _, label in rows], dtype=np.uint8),
        )
    return {
        "images.tar": ["Images"],
        "annotation.tar": ["Annotation"],
        "lists.tar": ["file_list.mat", "test_list.mat", "train_list.mat"],
    }


def _make_tiny_imagenet(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    root = folder / "tiny-imagenet-200"
    wnids = [f"n{1443537 + 11 * label:08d}" for label in range(num_classes)]
    boxes: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    annotations = []
    for number, example in enumerate(examples):
        # Boxes include their last column and row.
        left, top, right, bottom = example.box
        box, wnid = f"{left}\t{top}\t{right - 1}\t{bottom - 1}", wnids[example.label]
        if example.split == "train":
            file_name = f"{wnid}_{len(boxes[wnid])}.JPEG"
            _save(example, root / "train" / wnid / "images" / file_name)
            boxes[wnid].append(f"{file_name}\t{box}")
        else:
            _save(example, root / "val" / "images" / f"val_{number}.JPEG")
            annotations.append(f"val_{number}.JPEG\t{wnid}\t{box}")
            _save(example, root / "test" / "images" / f"test_{number}.JPEG")
    for wnid, lines in boxes.items():
        _write(root / "train" / wnid / f"{wnid}_boxes.txt", lines)
    _write(root / "val" / "val_annotations.txt", annotations)
    _write(root / "wnids.txt", [wnids[number] for number in rng.permutation(num_classes)])
    words = [f"{wnid}\tmade-up thing {label}, thing" for label, wnid in enumerate(wnids)]
    _write(root / "words.txt", ["n00001740\tentity", *words])
    return {"tiny-imagenet-200.zip": ["tiny-imagenet-200"]}


def _make_oxford_flowers(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    numbers: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, example in enumerate(examples, start=1):
        numbers[example.split].append(number)
        _save(example, folder / "jpg" / f"image_{number:05d}.jpg")
    _save_mat(
        folder / "imagelabels.mat", labels=np.array([[example.label + 1 for example in examples]], dtype=np.uint8)
    )
    _save_mat(
        folder / "setid.mat",
        **{
            variable: np.array([rng.permutation(numbers[split])], dtype=np.uint16)
            for variable, split in (("trnid", "train"), ("valid", "validation"), ("tstid", "test"))
        },
    )
    return {"102flowers.tgz": ["jpg"]}


def _make_fgvc_aircraft(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    root = folder / "fgvc-aircraft-2013b" / "data"
    names = [f"F/A-{label} Made Up" for label in range(num_classes)]
    ids = [f"{number:07d}" for number in rng.choice(10**7, len(examples), replace=False)]
    lists: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    boxes = []
    for image, example in zip(ids, examples, strict=True):
        _save(example, root / "images" / f"{image}.jpg")
        lists[example.split].append(f"{image} {names[example.label]}")
        # The first pixel is (1, 1), and boxes include their last column and row.
        left, top, right, bottom = example.box
        boxes.append(f"{image} {left + 1} {top + 1} {right} {bottom}")
    for part, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        _write(root / f"images_variant_{part}.txt", lists[split])
        _write(root / f"images_{part}.txt", [line.split()[0] for line in lists[split]])
    _write(root / "images_box.txt", sorted(boxes))
    _write(root / "variants.txt", names)
    return {"fgvc-aircraft-2013b.tar.gz": ["fgvc-aircraft-2013b"]}


def _make_stanford_cars(folder: Path, examples: list[Example], num_classes: int, rng: np.random.Generator):
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows: dict[str, list[tuple]] = {"train": [], "test": []}
    for example in examples:
        file_name = f"{len(rows[example.split]) + 1:05d}.jpg"
        _save(example, folder / f"cars_{example.split}" / file_name)
        left, top, right, bottom = example.box
        rows[example.split].append((left + 1, top + 1, right, bottom, example.label + 1, file_name))
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        annotations = np.empty((1, len(rows[split])), dtype=[(name, object) for name in fields])
        annotations[0] = rows[split]
        _save_mat(folder / path, annotations=annotations)
    names = np.empty((1, num_classes), dtype=object)
    names[0] = [f"Made-Up Car Coupe {2000 + label}" for label in range(num_classes)]
    _save_mat(folder / "devkit" / "cars_meta.mat", class_names=names)
    return {"cars_train.tgz": ["cars_train"], "cars_test.tgz": ["cars_test"], "car_devkit.tgz": ["devkit"]}


def _pack(folder: Path, file_name: str, members: list[str]):
    """Moves files and folders into an archive."""
    path = folder / file_name
    if file_name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(file for member in members for file in (folder / member).rglob("*")):
                archive.write(file, file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w" if file_name.endswith(".tar") else "w:gz") as tar:
            for member in members:
                tar.add(folder / member, member)
    for member in members:
        if (folder / member).is_dir():
            shutil.rmtree(folder / member)
        else:
            (folder / member).unlink()


_Maker = Callable[[Path, list[Example], int, np.random.Generator], dict[str, list[str]]]
# Functions that write an unpacked data set and return, for each of its archives, the files and folders in it.
_MAKERS: dict[str, _Maker] = {
    "cub_200_2011": _make_cub,
    "stanford_dogs": _make_stanford_dogs,
    "nabirds": _make_nabirds,
    "tiny_imagenet": _make_tiny_imagenet,
    "oxford_flowers": _make_oxford_flowers,
    "fgvc_aircraft": _make_fgvc_aircraft,
    "stanford_cars": _make_stanford_cars,
}
