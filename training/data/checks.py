# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set, before it costs a training run.

Every image is decoded once. What was seen is kept in the cache (`$RBI_CACHE`), in one file for all images of a
data set however they are labeled and split, so that a training with another seed, fold or learning rate does not
decode them again. A file counts as the same while its path, size and time of change are.
"""

import hashlib
import io
import json
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import PIL
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from modeling_rbi import UserError

from ..files import cache_dir, write_json
from .arguments import DataArguments
from .decode import DEFAULT_MAX_PIXELS, MAX_ASPECT_RATIO, UnreadableImageError, decode_image
from .folders import read_unlabeled
from .form import SPLITS, BadDataError, classes_missing_from, iter_rows, labels_of
from .reading import load_images


logger = logging.getLogger(__name__)

# What each kind of finding is, in the order of a report.
KINDS = {
    "unreadable": "absent or no image",
    "truncated": "broken or cut off",
    "oversized": "more pixels than the limit",
    "zero_size": "empty, or less than 2 pixels wide or high",
    "narrow": f"one side more than {MAX_ASPECT_RATIO} times the other",
    "empty_box": "no part of the image is in its box",
    "label_clash": "the same image under several labels",
    "leak": "the same image in several splits",
    "missing_class": "class without images in a split",
    "duplicate": "the same image several times in a split",
    "few_images": "class with few training images",
    "hidden_file": "hidden file or folder, ignored",
    "stray_file": "other file or empty folder, ignored",
}
DEFAULT_MIN_PER_CLASS = 5
# Of what is kept of an image; a change makes what was kept before worthless.
_FACTS_VERSION = 2
_CHUNK_PER_WORKER = 16


@dataclass(frozen=True)
class Place:
    """An image of the data set, or a file beside (without split and row)."""

    name: str
    split: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Finding:
    """
    One thing that was found: its kind of `KINDS`, what it is in words, whether it stops a training, the places, and
    those of them to leave out for it to be mended.
    """

    kind: str
    message: str
    fatal: bool
    places: tuple[Place, ...] = ()
    leave_out: tuple[Place, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """All findings in a data set, in the order of `KINDS`, and the number of images looked at in each split."""

    images: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def fatal(self) -> list[Finding]:
        """What stops a training."""
        return [finding for finding in self.findings if finding.fatal]

    @property
    def notes(self) -> list[Finding]:
        """What is good to know."""
        return [finding for finding in self.findings if not finding.fatal]

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind that there are any of."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return kinds

    def rows_to_leave_out(self) -> dict[str, list[int]]:
        r"""
        Row numbers of each split to leave out, in ascending order: images that can't be used, all images of a
        label clash, and of an image in several splits those in all but the last of train, validation and test.
        """
        rows: dict[str, set[int]] = {split: set() for split in self.images}
        for finding in self.findings:
            for place in finding.leave_out:
                if place.split is not None and place.row is not None:
                    rows[place.split].add(place.row)
        return {split: sorted(chosen) for split, chosen in rows.items() if chosen}

    def to_dict(self) -> dict[str, Any]:
        """All of it, for a run's record."""
        return {
            "images": self.images,
            "fatal": len(self.fatal),
            "notes": len(self.notes),
            "left_out": self.rows_to_leave_out(),
            "findings": [asdict(finding) for finding in self.findings],
        }


class _Facts(NamedTuple):
    """What one image is: a kind of problem and its words, or the hash of its pixels; and the hash of its file."""

    problem: str | None
    detail: str
    content: str | None
    pixels: str | None


@dataclass(frozen=True)
class _Image:
    place: Place
    key: str
    label: str


def check_images(
    dataset: datasets.DatasetDict,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_per_class: int = DEFAULT_MIN_PER_CLASS,
    num_workers: int | None = None,
    ignored: Mapping[str, Sequence[str]] | None = None,
    allow_missing_classes: bool = False,
) -> DataReport:
    r"""
    Looks for what is wrong with the images, their labels and their splits; shows its progress on a terminal.

    Two images are the same if their decoded RGB pixels are, whatever the format of their files. With a column `box`,
    only what is in the box counts.

    Args:
        dataset (`datasets.DatasetDict`):
            As [`load_images`] gives it.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels; more are not decoded.
        min_per_class (`int`, *optional*, defaults to 5):
            Classes with fewer training images are noted.
        num_workers (`int`, *optional*):
            Threads that decode, by default as many as there are cores for this process.
        ignored (mapping of `"hidden"` and `"stray"` to paths, *optional*):
            What lies beside the images, to be noted; see [`ignored_files`].
        allow_missing_classes (`bool`, *optional*, defaults to `False`):
            Whether a class without images for validation is a note only.
    """
    images = list(_list_images(dataset))
    facts = _look_at_all(dataset, [image.key for image in images], max_pixels, num_workers or _num_cores())
    findings = [
        *_problems(images, facts),
        *_same_images(images, facts),
        *_class_findings(dataset, min_per_class, allow_missing_classes),
        *(
            Finding(f"{kind}_file", path, False, (Place(path),))
            for kind, paths in (ignored or {}).items()
            for path in paths
        ),
    ]
    order = list(KINDS)
    findings.sort(key=lambda finding: order.index(finding.kind))
    return DataReport({name: len(split) for name, split in dataset.items()}, tuple(findings))


def load_checked_images(args: DataArguments, seed: int) -> tuple[datasets.DatasetDict, DataReport]:
    r"""
    The images that the arguments name, without those to leave out where `skip_bad_images` says so, and what was
    found.

    Raises:
        BadDataError: if they cannot be trained on; names the files.
    """
    images = load_images(args, seed)
    report = check_images(images, max_pixels=args.max_pixels, allow_missing_classes=args.allow_missing_classes)
    if args.skip_bad_images:
        return drop_bad(images, report), report
    refuse_bad(report)
    return images, report


def load_unlabeled_images(
    folder: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS, skip_bad_images: bool = False
) -> datasets.Dataset:
    r"""
    The images in a folder and those in it, whatever their classes, each looked at; see [`read_unlabeled`].

    Raises:
        UserError: if it is no folder.
        BadDataError: if it holds no images, or some that cannot be decoded, unless these are to be skipped; names
            them.
    """
    images = read_unlabeled(folder)
    keys = [_key(values) for values in iter_rows(images)]
    facts = _look_at_all(datasets.DatasetDict(unlabeled=images), keys, max_pixels, _num_cores())
    bad = [row for row, key in enumerate(keys) if facts[key].problem is not None]
    if bad and not skip_bad_images:
        named = "".join(f"\n    {facts[keys[row]].detail}" for row in bad[:3])
        raise BadDataError(
            f"{len(bad)} of the {len(keys)} images in {folder} cannot be read:{named}\nMend them, or leave them out "
            "with --skip_bad_images."
        )
    if len(bad) == len(keys):
        raise BadDataError(f"No image in {folder} is fit to be used.")
    if bad:
        logger.warning("%d of the %d images in %s are left out: they can't be read.", len(bad), len(keys), folder)
    return images.select(sorted(set(range(len(keys))) - set(bad))) if bad else images


def refuse_bad(report: DataReport):
    r"""
    Stops a training on a data set that has something wrong.

    Raises:
        BadDataError: if anything in the report is fatal; names the first files of each kind.
    """
    if not report.fatal:
        return
    lines = ["The data has findings that stop a training:"]
    for kind, findings in DataReport(report.images, tuple(report.fatal)).by_kind().items():
        lines.append(f"- {kind} ({KINDS[kind]}), {len(findings)}:")
        lines += [f"    {finding.message}" for finding in findings[:3]]
        if len(findings) > 3:
            lines.append(f"    and {len(findings) - 3} more")
    raise BadDataError(
        "\n".join(lines) + "\n`python -m training.check_data` with the same arguments lists all. Mend them, or leave "
        "the images out with --skip_bad_images."
    )


def drop_bad(dataset: datasets.DatasetDict, report: DataReport) -> datasets.DatasetDict:
    r"""
    The data set without the images that the report leaves out.

    Raises:
        BadDataError: if that empties a split or takes all training images of a class, or if something is fatal that
            leaving images out does not mend.
        UserError: if the report is of another data set.
    """
    if {name: len(split) for name, split in dataset.items()} != report.images:
        raise UserError(
            f"The report is of {report.images} images, not of this data set: check this one with check_images."
        )
    refuse_bad(DataReport(report.images, tuple(finding for finding in report.fatal if not finding.leave_out)))
    kept = {}
    left_out = report.rows_to_leave_out()
    for name, split in dataset.items():
        bad = set(left_out.get(name, []))
        kept[name] = split.select([row for row in range(len(split)) if row not in bad]) if bad else split
        if not len(kept[name]):
            raise BadDataError(f"No image of {name} is fit to be used: mend them, see training.check_data.")
    lost = classes_missing_from(kept["train"], dataset["train"])
    if lost:
        raise BadDataError(
            f"No training image of {', '.join(lost[:10])} is fit to be used: mend them, or leave the classes out."
        )
    return datasets.DatasetDict(kept)


def _list_images(dataset: datasets.DatasetDict) -> Iterator[_Image]:
    for split, data in dataset.items():
        names = data.features["label"].names
        for row, values in enumerate(iter_rows(data)):
            image = values["image"]
            name = image["path"] or f"{split}[{row}]"
            if image["bytes"] is not None:
                name = f"{split}[{row}]" + (f" ({image['path']})" if image["path"] else "")
            yield _Image(Place(name, split, row), _key(values), names[values["label"]])


def _key(values: dict[str, Any]) -> str:
    """What the facts about an image hold for."""
    image = values["image"]
    if image["bytes"] is not None:
        return json.dumps([_hash(image["bytes"]), values.get("box")])
    try:
        stat = os.stat(image["path"])
    except (OSError, TypeError):
        return json.dumps([image["path"], None, None, values.get("box")])
    return json.dumps([image["path"], stat.st_size, stat.st_mtime_ns, values.get("box")])


def _look_at_all(
    dataset: datasets.DatasetDict, keys: list[str], max_pixels: int, num_workers: int
) -> dict[str, _Facts]:
    digest = hashlib.sha256("\n".join(sorted(keys)).encode())
    digest.update(json.dumps([_FACTS_VERSION, PIL.__version__, max_pixels]).encode())
    path = cache_dir() / "checks" / f"{digest.hexdigest()}.json"
    facts = _read_facts(path)
    wanted = set(keys) - set(facts)
    if not wanted:
        return facts
    rows = (row for split in dataset.values() for row in iter_rows(split))
    todo = _first_of_each(zip(keys, rows, strict=True), wanted)
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(num_workers)
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            warnings.catch_warnings(),
        ):
            # Our own limit is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            task = progress.add_task("Checking images", total=len(wanted))
            # Some at a time: the bytes of all would fill the memory.
            while chunk := list(islice(todo, _CHUNK_PER_WORKER * num_workers)):
                seen = pool.map(lambda item: _look_at(item[1], max_pixels), chunk)
                facts.update(zip((key for key, _ in chunk), seen, strict=True))
                progress.advance(task, len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    # A file that may not be read now may be next time, with the same key.
    lasting = {key: value for key, value in facts.items() if value.content is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, lasting)
    except OSError as error:
        logger.warning("What was seen of the images can't be kept for the next time: %s", error)
    return facts


def _first_of_each(items: Iterator[tuple[str, Any]], wanted: set[str]) -> Iterator[tuple[str, Any]]:
    open_keys = set(wanted)
    for key, row in items:
        if key in open_keys:
            open_keys.remove(key)
            yield key, row


def _read_facts(path: Path) -> dict[str, _Facts]:
    try:
        return {key: _Facts(*values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _look_at(values: dict[str, Any], max_pixels: int) -> _Facts:
    stored = values["image"]
    data = stored["bytes"]
    if data is None:
        try:
            data = Path(stored["path"]).read_bytes()
        except (OSError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it has neither a path nor bytes"
            return _Facts("unreadable", f"{stored['path'] or 'the image'} can't be read: {reason}.", None, None)
    content = _hash(data)
    # With its path, the image is named in the error. Where the data set holds the bytes, the same may have several.
    source = {"path": stored["path"] if stored["bytes"] is None else None, "bytes": data}
    try:
        image = decode_image(source, values.get("box"), max_pixels)
    except UnreadableImageError as error:
        return _Facts(_problem(data, error, max_pixels), str(error), content, None)
    except ValueError as error:
        return _Facts("empty_box", str(error), content, None)
    short, long = sorted(image.size)
    if short < 2 or long > MAX_ASPECT_RATIO * short:
        size = f"{image.width} x {image.height}"
        kind = "zero_size" if short < 2 else "narrow"
        return _Facts(kind, f"{source['path'] or 'the image'} has {size} pixels.", content, None)
    return _Facts(None, "", content, _hash(f"{image.width} {image.height} ".encode() + image.tobytes()))


def _problem(data: bytes, error: UnreadableImageError, max_pixels: int) -> str:
    """The kind of problem: with a header that can be read, the rest is what is broken."""
    if not data:
        return "zero_size"
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return "oversized"
    if isinstance(error.__cause__, Image.UnidentifiedImageError):
        return "unreadable"
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception:  # Pillow's readers raise errors of many kinds
        return "unreadable"
    return "oversized" if width * height > max_pixels else "truncated"


def _problems(images: list[_Image], facts: dict[str, _Facts]) -> Iterator[Finding]:
    for image in images:
        problem, detail = facts[image.key][:2]
        if problem is not None:
            name = image.place.name
            message = detail if name in detail else f"{name}: {detail}"
            yield Finding(problem, message, True, (image.place,), (image.place,))


def _same_images(images: list[_Image], facts: dict[str, _Facts]) -> Iterator[Finding]:
    groups = defaultdict(list)
    for image in images:
        if facts[image.key].pixels is not None:
            groups[facts[image.key].pixels].append(image)
    for group in groups.values():
        if len(group) < 2:
            continue
        places = tuple(image.place for image in group)
        names = ", ".join(
            place.name if place.name.startswith(f"{place.split}[") else f"{place.split}: {place.name}"
            for place in places
        )
        what = "file" if len({facts[image.key].content for image in group}) == 1 else "pixels"
        labels = sorted({image.label for image in group})
        splits = {place.split for place in places}
        last = max(splits, key=SPLITS.index)
        if len(labels) > 1:
            yield Finding("label_clash", f"The same {what} as {', '.join(labels)}: {names}", True, places, places)
        elif len(splits) > 1:
            earlier = tuple(place for place in places if place.split != last)
            yield Finding("leak", f"The same {what}: {names}", True, places, earlier)
        else:
            yield Finding("duplicate", f"The same {what}: {names}", False, places)


def _class_findings(
    dataset: datasets.DatasetDict, min_per_class: int, allow_missing_classes: bool
) -> Iterator[Finding]:
    train = dataset["train"]
    names = train.features["label"].names
    counts = labels_of(train).bincount(minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if not count:
            yield Finding("missing_class", f'"{name}" has no images in train', False)
        elif count < min_per_class:
            yield Finding("few_images", f'"{name}" has {count}, fewer than {min_per_class}', False)
    for split in ("validation", "test"):
        if split in dataset:
            fatal = split == "validation" and not allow_missing_classes
            for name in classes_missing_from(dataset[split], train):
                yield Finding("missing_class", f'"{name}" has no images in {split}', fatal)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
