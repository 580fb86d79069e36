# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set, before it costs a training run.

Every picture is decoded once. What was seen is kept in the cache (`$RBI_CACHE`), in one file for all pictures of a
data set however they are labelled and split, so that a training with another seed, fold or learning rate does not
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

from ..files import cache_dir, write_json
from .decode import DEFAULT_MAX_PIXELS, MAX_ASPECT_RATIO, UnreadableImageError, decode_image
from .reading import (
    SPLITS,
    BadDataError,
    DataArguments,
    classes_missing_from,
    iter_rows,
    labels_of,
    load_pictures,
    read_unlabelled,
)


logger = logging.getLogger(__name__)

# What each kind of finding is, in the order of a report.
KINDS = {
    "unreadable": "absent or no picture",
    "truncated": "broken or cut off",
    "oversized": "more pixels than the limit",
    "zero_size": "empty, or less than 2 pixels wide or high",
    "narrow": f"one side more than {MAX_ASPECT_RATIO} times the other",
    "empty_box": "no part of the picture is in its box",
    "label_clash": "the same picture under several labels",
    "leak": "the same picture in several splits",
    "missing_class": "class without pictures in a split",
    "duplicate": "the same picture several times in a split",
    "few_pictures": "class with few training pictures",
    "hidden_file": "hidden file or folder, ignored",
    "stray_file": "other file or empty folder, ignored",
}
DEFAULT_MIN_PER_CLASS = 5
# Of what is kept of a picture; a change makes what was kept before worthless.
_FACTS_VERSION = 2
_CHUNK_PER_WORKER = 16


@dataclass(frozen=True)
class Place:
    """A picture of the data set, or a file beside (without split and row)."""

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
    """All findings in a data set, in the order of `KINDS`, and the number of pictures looked at in each split."""

    pictures: dict[str, int]
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
        Row numbers of each split to leave out, in ascending order: pictures that can't be used, all pictures of a
        label clash, and of a picture in several splits those in all but the last of train, validation and test.
        """
        rows: dict[str, set[int]] = {split: set() for split in self.pictures}
        for finding in self.findings:
            for place in finding.leave_out:
                if place.split is not None and place.row is not None:
                    rows[place.split].add(place.row)
        return {split: sorted(chosen) for split, chosen in rows.items() if chosen}

    def to_dict(self) -> dict[str, Any]:
        """All of it, for a run's record."""
        return {
            "pictures": self.pictures,
            "fatal": len(self.fatal),
            "notes": len(self.notes),
            "left_out": self.rows_to_leave_out(),
            "findings": [asdict(finding) for finding in self.findings],
        }


class _Facts(NamedTuple):
    """What one picture is: a kind of problem and its words, or the hash of its pixels; and the hash of its file."""

    problem: str | None
    detail: str
    content: str | None
    pixels: str | None


@dataclass(frozen=True)
class _Picture:
    place: Place
    key: str
    label: str


def check_pictures(
    dataset: datasets.DatasetDict,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_per_class: int = DEFAULT_MIN_PER_CLASS,
    num_workers: int | None = None,
    ignored: Mapping[str, Sequence[str]] | None = None,
    allow_missing_classes: bool = False,
) -> DataReport:
    r"""
    Looks for what is wrong with the pictures, their labels and their splits; shows its progress on a terminal.

    Two pictures are the same if their decoded RGB pixels are, whatever the format of their files. With a column `box`,
    only what is in the box counts.

    Args:
        dataset (`datasets.DatasetDict`):
            As [`load_pictures`] gives it.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels; more are not decoded.
        min_per_class (`int`, *optional*, defaults to 5):
            Classes with fewer training pictures are noted.
        num_workers (`int`, *optional*):
            Threads that decode, by default as many as there are cores for this process.
        ignored (mapping of `"hidden"` and `"stray"` to paths, *optional*):
            What lies beside the pictures, to be noted; see [`ignored_files`].
        allow_missing_classes (`bool`, *optional*, defaults to `False`):
            Whether a class without pictures for validation is a note only.
    """
    pictures = list(_list_pictures(dataset))
    facts = _look_at_all(dataset, [picture.key for picture in pictures], max_pixels, num_workers or _num_cores())
    findings = [
        *_problems(pictures, facts),
        *_same_pictures(pictures, facts),
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


def load_checked_pictures(args: DataArguments, seed: int) -> tuple[datasets.DatasetDict, DataReport]:
    r"""
    The pictures that the arguments name, without those to leave out where `skip_bad_images` says so, and what was
    found.

    Raises:
        BadDataError: if they cannot be trained on; names the files.
    """
    pictures = load_pictures(args, seed)
    report = check_pictures(pictures, max_pixels=args.max_pixels, allow_missing_classes=args.allow_missing_classes)
    if args.skip_bad_images:
        return drop_bad(pictures, report), report
    refuse_bad(report)
    return pictures, report


def load_unlabelled_pictures(
    folder: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS, skip_bad_images: bool = False
) -> datasets.Dataset:
    r"""
    The pictures in a folder and those in it, whatever their classes, each looked at; see [`read_unlabelled`].

    Raises:
        ValueError: if it is no folder.
        BadDataError: if it holds no pictures, or some that cannot be decoded, unless these are to be skipped; names
            them.
    """
    pictures = read_unlabelled(folder)
    keys = [_key(values) for values in iter_rows(pictures)]
    facts = _look_at_all(datasets.DatasetDict(unlabelled=pictures), keys, max_pixels, _num_cores())
    bad = [row for row, key in enumerate(keys) if facts[key].problem is not None]
    if bad and not skip_bad_images:
        named = "".join(f"\n    {facts[keys[row]].detail}" for row in bad[:3])
        raise BadDataError(
            f"{len(bad)} of the {len(keys)} pictures in {folder} cannot be read:{named}\nMend them, or leave them out "
            "with --skip_bad_images."
        )
    if len(bad) == len(keys):
        raise BadDataError(f"No picture in {folder} is fit to be used.")
    if bad:
        logger.warning("%d of the %d pictures in %s are left out: they can't be read.", len(bad), len(keys), folder)
    return pictures.select(sorted(set(range(len(keys))) - set(bad))) if bad else pictures


def refuse_bad(report: DataReport):
    r"""
    Stops a training on a data set that has something wrong.

    Raises:
        BadDataError: if anything in the report is fatal; names the first files of each kind.
    """
    if not report.fatal:
        return
    lines = ["The data has findings that stop a training:"]
    for kind, findings in DataReport(report.pictures, tuple(report.fatal)).by_kind().items():
        lines.append(f"- {kind} ({KINDS[kind]}), {len(findings)}:")
        lines += [f"    {finding.message}" for finding in findings[:3]]
        if len(findings) > 3:
            lines.append(f"    and {len(findings) - 3} more")
    raise BadDataError(
        "\n".join(lines) + "\n`python -m training.check_data` with the same arguments lists all. Mend them, or leave "
        "the pictures out with --skip_bad_images."
    )


def drop_bad(dataset: datasets.DatasetDict, report: DataReport) -> datasets.DatasetDict:
    r"""
    The data set without the pictures that the report leaves out.

    Raises:
        BadDataError: if that empties a split or takes all training pictures of a class, or if something is fatal that
            leaving pictures out does not mend.
        ValueError: if the report is of another data set.
    """
    if {name: len(split) for name, split in dataset.items()} != report.pictures:
        raise ValueError(
            f"The report is of {report.pictures} pictures, not of this data set: check this one with check_pictures."
        )
    refuse_bad(DataReport(report.pictures, tuple(finding for finding in report.fatal if not finding.leave_out)))
    kept = {}
    left_out = report.rows_to_leave_out()
    for name, split in dataset.items():
        bad = set(left_out.get(name, []))
        kept[name] = split.select([row for row in range(len(split)) if row not in bad]) if bad else split
        if not len(kept[name]):
            raise BadDataError(f"No picture of {name} is fit to be used: mend them, see training.check_data.")
    lost = classes_missing_from(kept["train"], dataset["train"])
    if lost:
        raise BadDataError(
            f"No training picture of {', '.join(lost[:10])} is fit to be used: mend them, or leave the classes out."
        )
    return datasets.DatasetDict(kept)


def _list_pictures(dataset: datasets.DatasetDict) -> Iterator[_Picture]:
    for split, data in dataset.items():
        names = data.features["label"].names
        for row, values in enumerate(iter_rows(data)):
            image = values["image"]
            name = image["path"] or f"{split}[{row}]"
            if image["bytes"] is not None:
                name = f"{split}[{row}]" + (f" ({image['path']})" if image["path"] else "")
            yield _Picture(Place(name, split, row), _key(values), names[values["label"]])


def _key(values: dict[str, Any]) -> str:
    """What the facts about a picture hold for."""
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
            task = progress.add_task("Checking pictures", total=len(wanted))
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
        logger.warning("What was seen of the pictures can't be kept for the next time: %s", error)
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
    image = values["image"]
    data = image["bytes"]
    if data is None:
        try:
            data = Path(image["path"]).read_bytes()
        except (OSError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it has neither a path nor bytes"
            return _Facts("unreadable", f"{image['path'] or 'the picture'} can't be read: {reason}.", None, None)
    content = _hash(data)
    # With its path, the picture is named in the error. Where the data set holds the bytes, the same may have several.
    source = {"path": image["path"] if image["bytes"] is None else None, "bytes": data}
    try:
        picture = decode_image(source, values.get("box"), max_pixels)
    except UnreadableImageError as error:
        return _Facts(_problem(data, error, max_pixels), str(error), content, None)
    except ValueError as error:
        return _Facts("empty_box", str(error), content, None)
    short, long = sorted(picture.size)
    if short < 2 or long > MAX_ASPECT_RATIO * short:
        size = f"{picture.width} x {picture.height}"
        kind = "zero_size" if short < 2 else "narrow"
        return _Facts(kind, f"{source['path'] or 'the picture'} has {size} pixels.", content, None)
    return _Facts(None, "", content, _hash(f"{picture.width} {picture.height} ".encode() + picture.tobytes()))


def _problem(data: bytes, error: UnreadableImageError, max_pixels: int) -> str:
    """The kind of problem: with a header that can be read, the rest is what is broken."""
    if not data:
        return "zero_size"
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return "oversized"
    if isinstance(error.__cause__, Image.UnidentifiedImageError):
        return "unreadable"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
    except Exception:  # Pillow's readers raise errors of many kinds
        return "unreadable"
    return "oversized" if width * height > max_pixels else "truncated"


def _problems(pictures: list[_Picture], facts: dict[str, _Facts]) -> Iterator[Finding]:
    for picture in pictures:
        problem, detail = facts[picture.key][:2]
        if problem is not None:
            name = picture.place.name
            message = detail if name in detail else f"{name}: {detail}"
            yield Finding(problem, message, True, (picture.place,), (picture.place,))


def _same_pictures(pictures: list[_Picture], facts: dict[str, _Facts]) -> Iterator[Finding]:
    groups = defaultdict(list)
    for picture in pictures:
        if facts[picture.key].pixels is not None:
            groups[facts[picture.key].pixels].append(picture)
    for group in groups.values():
        if len(group) < 2:
            continue
        places = tuple(picture.place for picture in group)
        names = ", ".join(
            place.name if place.name.startswith(f"{place.split}[") else f"{place.split}: {place.name}"
            for place in places
        )
        what = "file" if len({facts[picture.key].content for picture in group}) == 1 else "pixels"
        labels = sorted({picture.label for picture in group})
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
            yield Finding("missing_class", f'"{name}" has no pictures in train', False)
        elif count < min_per_class:
            yield Finding("few_pictures", f'"{name}" has {count}, fewer than {min_per_class}', False)
    for split in ("validation", "test"):
        if split in dataset:
            fatal = split == "validation" and not allow_missing_classes
            for name in classes_missing_from(dataset[split], train):
                yield Finding("missing_class", f'"{name}" has no pictures in {split}', fatal)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
