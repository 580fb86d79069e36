# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Finds problems in a data set before training.

Every image is decoded once. The results are cached (`$RBI_CACHE`) in one file per set of images, so another fold,
learning rate or seed (unless it draws other images) does not decode them again. If an image is added, removed or
changed (path, size or modification time), all images are decoded again.
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
from modeling_rbi.errors_rbi import listed

from ..files import cache_dir, write_json
from .arguments import DataArguments
from .decode import DEFAULT_MAX_PIXELS, MAX_ASPECT_RATIO, UnreadableImageError, decode_image
from .folders import ignored_files, read_unlabeled, why_empty, why_unread
from .form import SPLITS, BadDataError, classes_missing_from, iter_rows, labels_of
from .reading import load_images


logger = logging.getLogger(__name__)

# The kinds of findings, in the order of a report. Kinds up to `leak` are fatal, and so is `missing_class` in
# validation unless it is allowed; the others are notes.
KINDS = {
    "unreadable": "missing, or not an image",
    "truncated": "broken or cut off",
    "oversized": "more pixels than the limit",
    "zero_size": "empty, or less than 2 pixels wide or high",
    "narrow": f"one side more than {MAX_ASPECT_RATIO} times as long as the other",
    "empty_box": "the box does not overlap the image",
    "unread_file": "may be an image, but cannot be read",
    "empty_class": "class folder without a readable image",
    "label_clash": "the same image under several labels",
    "leak": "the same image in several splits",
    "missing_class": "class without images in a split",
    "duplicate": "the same image several times in one split",
    "few_images": "class with few training images",
    "deep_gray": "gray of more than 8 bits, scaled to 8",
    "hidden_file": "hidden file or folder, ignored",
    "stray_file": "other file or folder, ignored",
}
DEFAULT_MIN_PER_CLASS = 5
# Version of the cached results; a change discards older ones.
_FACTS_VERSION = 4
_CHUNK_PER_WORKER = 16


@dataclass(frozen=True)
class Place:
    """An image of the data set, or another file (without split and row)."""

    name: str
    split: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Finding:
    """
    One finding: its kind (a key of `KINDS`), a message, whether it prevents training, the places, and the places to
    leave out to fix it.
    """

    kind: str
    message: str
    fatal: bool
    places: tuple[Place, ...] = ()
    leave_out: tuple[Place, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """All findings in a data set, in the order of `KINDS`, and the number of images in each split."""

    images: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def fatal(self) -> list[Finding]:
        """Findings that prevent training."""
        return [finding for finding in self.findings if finding.fatal]

    @property
    def notes(self) -> list[Finding]:
        """Findings that do not prevent training."""
        return [finding for finding in self.findings if not finding.fatal]

    def by_kind(self) -> dict[str, list[Finding]]:
        """Findings grouped by kind."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return kinds

    def rows_to_leave_out(self) -> dict[str, list[int]]:
        r"""
        Row numbers of each split to leave out, in ascending order: images that can't be used, all images of a
        label clash, and, if an image is in several splits, its copies in all but the last of them (in the
        order train, validation, test).
        """
        rows: dict[str, set[int]] = {split: set() for split in self.images}
        for finding in self.findings:
            for place in finding.leave_out:
                if place.split is not None and place.row is not None:
                    rows[place.split].add(place.row)
        return {split: sorted(chosen) for split, chosen in rows.items() if chosen}

    def to_dict(self) -> dict[str, Any]:
        """The whole report, for the record of a run."""
        return {
            "images": self.images,
            "fatal": len(self.fatal),
            "notes": len(self.notes),
            "left_out": self.rows_to_leave_out(),
            "findings": [asdict(finding) for finding in self.findings],
        }


class _Facts(NamedTuple):
    """
    Result of decoding an image: the kind of problem, if any, and its message; hashes of the file and the pixels; and
    the range of gray of more than 8 bits.
    """

    problem: str | None
    detail: str
    content: str | None
    pixels: str | None
    gray_range: str | None = None


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
    Checks the images, their labels and their splits; shows its progress on a terminal.

    Two images are the same if their decoded RGB pixels are equal, in whatever format their files are. With a column
    `box`, only the pixels in the box count.

    Args:
        dataset (`datasets.DatasetDict`):
            The result of [`load_images`].
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels; larger images are not decoded.
        min_per_class (`int`, *optional*, defaults to 5):
            Classes with fewer training images are reported.
        num_workers (`int`, *optional*):
            Number of threads that decode. Defaults to the number of cores that this process may use.
        ignored (mapping of kinds of findings to paths, *optional*):
            Other files and folders among the images, to be reported; see [`ignored_files`].
        allow_missing_classes (`bool`, *optional*, defaults to `False`):
            If `True`, a class without validation images does not prevent training.
    """
    images = list(_list_images(dataset))
    ignored = ignored or {}
    facts = _look_at_all(dataset, [image.key for image in images], max_pixels, num_workers or _num_cores())
    findings = [
        *_problems(images, facts),
        *_same_images(images, facts),
        *_class_findings(dataset, min_per_class, allow_missing_classes),
        *_deep_gray(images, facts),
        *(
            Finding(kind, explain(path), True, (Place(path),), (Place(path),))
            for kind, explain in (("unread_file", why_unread), ("empty_class", why_empty))
            for path in ignored.get(kind, ())
        ),
        *(
            Finding(kind, path, False, (Place(path),))
            for kind in ("hidden_file", "stray_file")
            for path in ignored.get(kind, ())
        ),
    ]
    order = list(KINDS)
    findings.sort(key=lambda finding: order.index(finding.kind))
    return DataReport({name: len(split) for name, split in dataset.items()}, tuple(findings))


def load_checked_images(args: DataArguments, seed: int) -> tuple[datasets.DatasetDict, DataReport]:
    r"""
    Loads and checks the images that the arguments name. With `skip_bad_images`, bad images are left out.

    Returns:
        The images and the report of the check.

    Raises:
        BadDataError: if the data cannot be trained on; names the files.
    """
    images = load_images(args, seed)
    report = check_images(
        images,
        max_pixels=args.max_pixels,
        ignored=ignored_files(args),
        allow_missing_classes=args.allow_missing_classes,
    )
    if args.skip_bad_images:
        return drop_bad(images, report), report
    refuse_bad(report)
    return images, report


def load_unlabeled_images(
    folder: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS, skip_bad_images: bool = False
) -> datasets.Dataset:
    r"""
    Loads and checks all images in a folder and the folders below it, without labels; see [`read_unlabeled`].

    Raises:
        UserError: if it is not a folder.
        BadDataError: if it holds no images, or, without `skip_bad_images`, images that cannot be decoded; names them.
    """
    images = read_unlabeled(folder, skip_bad_images)
    keys = [_key(values) for values in iter_rows(images)]
    facts = _look_at_all(datasets.DatasetDict(unlabeled=images), keys, max_pixels, _num_cores())
    bad = [row for row, key in enumerate(keys) if facts[key].problem is not None]
    if bad and not skip_bad_images:
        named = "".join(f"\n    {facts[keys[row]].detail}" for row in bad[:3])
        raise BadDataError(
            f"{len(bad)} of the {len(keys)} images in {folder} cannot be read:{named}\nFix them, or leave them out "
            "with --skip_bad_images."
        )
    if len(bad) == len(keys):
        raise BadDataError(f"No image in {folder} can be used.")
    if bad:
        logger.warning("%d of the %d images in %s are left out: they cannot be read.", len(bad), len(keys), folder)
    return images.select(sorted(set(range(len(keys))) - set(bad))) if bad else images


def refuse_bad(report: DataReport):
    r"""
    Stops a training if the report has a fatal finding.

    Raises:
        BadDataError: if it has; names the first files of each kind.
    """
    if not report.fatal:
        return
    lines = ["The data has findings that prevent training:"]
    for kind, findings in DataReport(report.images, tuple(report.fatal)).by_kind().items():
        lines.append(f"- {kind} ({KINDS[kind]}), {len(findings)}:")
        lines += [f"    {finding.message}" for finding in findings[:3]]
        if len(findings) > 3:
            lines.append(f"    and {len(findings) - 3} more")
    raise BadDataError(
        "\n".join(lines) + "\n`python -m training.check_data` with the same arguments lists all. Fix them, or leave "
        "the images out with --skip_bad_images."
    )


def drop_bad(dataset: datasets.DatasetDict, report: DataReport) -> datasets.DatasetDict:
    r"""
    The data set without the images that the report leaves out.

    Raises:
        BadDataError: if that empties a split or removes all training images of a class, or if a fatal finding remains.
        UserError: if the splits have other sizes than in the report.
    """
    if {name: len(split) for name, split in dataset.items()} != report.images:
        raise UserError(
            f"The report is about {report.images} images, not this data set: check this one with check_images."
        )
    refuse_bad(DataReport(report.images, tuple(finding for finding in report.fatal if not finding.leave_out)))
    kept = {}
    left_out = report.rows_to_leave_out()
    for name, split in dataset.items():
        bad = set(left_out.get(name, []))
        kept[name] = split.select([row for row in range(len(split)) if row not in bad]) if bad else split
        if not len(kept[name]):
            raise BadDataError(f"No image of {name} can be used: fix them, see training.check_data.")
    lost = classes_missing_from(kept["train"], dataset["train"])
    if lost:
        raise BadDataError(
            f"No training image of {', '.join(lost[:10])} can be used: fix them, or leave the classes out."
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
    """Identifies an image in the cache."""
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
            # The limit is `max_pixels`, not that of Pillow.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            task = progress.add_task("Checking images", total=len(wanted))
            # In chunks: the bytes of all images would fill the memory.
            while chunk := list(islice(todo, _CHUNK_PER_WORKER * num_workers)):
                seen = pool.map(lambda item: _look_at(item[1], max_pixels), chunk)
                facts.update(zip((key for key, _ in chunk), seen, strict=True))
                progress.advance(task, len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    # A file without permission to read may be readable next time, with the same key.
    lasting = {key: value for key, value in facts.items() if value.content is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, lasting)
    except OSError as error:
        logger.warning("The results of the check cannot be cached: %s", error)
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
            return _Facts("unreadable", f"{stored['path'] or 'the image'} cannot be read: {reason}.", None, None)
    content = _hash(data)
    # The path names the image in the error. Bytes in a data set have no path here: equal bytes may have several.
    source = {"path": stored["path"] if stored["bytes"] is None else None, "bytes": data}
    try:
        image = decode_image(source, values.get("box"), max_pixels)
    except UnreadableImageError as error:
        return _Facts(_problem(data, error, max_pixels), str(error), content, None)
    except UserError as error:
        return _Facts("empty_box", str(error), content, None)
    short, long = sorted(image.size)
    if short < 2 or long > MAX_ASPECT_RATIO * short:
        size = f"{image.width} x {image.height}"
        kind = "zero_size" if short < 2 else "narrow"
        return _Facts(kind, f"{source['path'] or 'the image'} has {size} pixels.", content, None)
    pixels = _hash(f"{image.width} {image.height} ".encode() + image.tobytes())
    return _Facts(None, "", content, pixels, image.info.get("gray_range"))


def _problem(data: bytes, error: UnreadableImageError, max_pixels: int) -> str:
    """The kind of problem; an image with a readable header is truncated, not unreadable."""
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


def _deep_gray(images: list[_Image], facts: dict[str, _Facts]) -> Iterator[Finding]:
    groups = defaultdict(list)
    for image in images:
        if (gray_range := facts[image.key].gray_range) is not None:
            groups[gray_range].append(image.place)
    for gray_range, places in groups.items():
        number = f"{len(places)} image{'s' if len(places) > 1 else ''}"
        yield Finding(
            "deep_gray", f"{number} {gray_range}: {listed((place.name for place in places), 3)}", False, tuple(places)
        )


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
