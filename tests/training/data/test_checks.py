"""Everything that is wrong with a data set is found, named, and left out if asked; a clean one stays as it is."""

import io
import json
import os
import random
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.odd_images import tiff
from training.data import checks
from training.data.arguments import DataArguments
from training.data.checks import (
    KINDS,
    DataReport,
    Finding,
    Place,
    check_images,
    drop_bad,
    load_checked_images,
    load_unlabeled_images,
    refuse_bad,
)
from training.data.folders import ignored_files
from training.data.form import BOX, IMAGE, BadDataError
from training.data.reading import load_images
from training.files import cache_dir


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


def _image(seed, size=(16, 12), mode="RGB"):
    number_of_bytes = size[0] * size[1] * len(mode)
    return Image.frombytes(mode, size, random.Random(seed).randbytes(number_of_bytes))


def _save(path, seed=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    _image(str(path) if seed is None else seed).save(path, **kwargs)
    return path


def _png_with_header_only(width, height):
    """A valid PNG file whose pixels are one byte of nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """A clean folder: 2 classes, 6 images each in train, 2 in validation and test."""
    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        for label in ("a", "b"):
            for number in range(count):
                _save(tmp_path / "data" / split / label / f"{number}.png")
    return tmp_path / "data"


def _check(folder, skip_bad_images=False, **kwargs):
    args = DataArguments(train_dir=str(folder), allow_missing_classes=True, skip_bad_images=skip_bad_images)
    dataset = load_images(args, 0)
    return dataset, check_images(dataset, ignored=ignored_files(args), **kwargs)


def _kinds(report):
    return {kind: len(findings) for kind, findings in report.by_kind().items()}


def _only(report, kind) -> Finding:
    """The one finding of the report."""
    assert _kinds(report) == {kind: 1}
    return report.findings[0]


def _left_out(dataset, report):
    """Paths, relative to the data, that the report leaves out."""
    return {
        "/".join(dataset[split][row]["image"]["path"].split("/")[-3:])
        for split, rows in report.rows_to_leave_out().items()
        for row in rows
    }


def _paths(dataset):
    return {row["image"]["path"] for split in dataset.values() for row in split}


def test_a_clean_data_set(folder):
    dataset, report = _check(folder)
    assert report == DataReport({"train": 12, "validation": 4, "test": 4}, ())
    refuse_bad(report)
    assert _paths(drop_bad(dataset, report)) == _paths(dataset)


def test_gray_of_more_than_8_bits(folder):
    """The range that was taken for white is a note, one for all images of the same range."""
    values = np.random.default_rng(0).integers(0, 256, (5, 8, 8))
    values[:, 0, 0] = 255
    for number, white in enumerate((255, 255, 65535, 4095)):
        (folder / "train" / "a" / f"x{number}.tif").write_bytes(tiff((values[number] * (white / 255)).astype("i4")))
    (folder / "train" / "b" / "y.tif").write_bytes(tiff((values[4] * 16).astype("u2")))
    dataset, report = _check(folder)
    assert _kinds(report) == {"deep_gray": 4} and not report.fatal
    messages = {finding.message.replace(f"{folder}/train/", "") for finding in report.findings}
    assert messages == {
        "2 images from 0 to 255, by the range of the pixels: a/x0.tif, a/x1.tif",
        "1 image from 0 to 65535, by the range of the pixels: a/x2.tif",
        "1 image from 0 to 4095, by the range of the pixels: a/x3.tif",
        "1 image from 0 to 65535, as the file states, though no pixel is above a sixteenth of that: b/y.tif",
    }
    # From the cache, too.
    assert check_images(dataset).findings == report.findings


def _truncate(path):
    _image(1, (64, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def _huge(path):
    path.write_bytes(_png_with_header_only(20_000, 20_000))


BAD = {
    "truncated": [_truncate, lambda path: path.write_bytes(_png_with_header_only(16, 16))],
    "zero_size": [
        lambda path: path.write_bytes(b""),
        lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"),
        lambda path: Image.new("RGB", (9, 1)).save(path, "PNG"),
    ],
    "narrow": [lambda path: Image.new("RGB", (2, 201)).save(path, "PNG")],
    "unreadable": [
        lambda path: path.write_text("not an image"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    ],
    "oversized": [
        lambda path: _image(1, (40, 30)).save(path, "PNG"),
        _huge,
        # Above twice Pillow's own limit, which is an error of another kind.
        lambda path: path.write_bytes(_png_with_header_only(60_000, 60_000)),
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind in BAD for number in range(len(BAD[kind]))])
def test_images_that_can_not_be_used(folder, kind, number):
    path = folder / "train" / "a" / "x.jpg"
    BAD[kind][number](path)
    dataset, report = _check(folder, max_pixels=64 * 64 if number else 1000 if kind == "oversized" else 64 * 64)
    finding = _only(report, kind)
    assert finding.fatal and str(path) in finding.message
    assert _left_out(dataset, report) == {"train/a/x.jpg"}
    with pytest.raises(BadDataError, match=rf"(?s){kind}.*x\.jpg.*training\.check_data.*--skip_bad_images"):
        refuse_bad(report)
    dropped = drop_bad(dataset, report)
    assert _paths(dataset) - _paths(dropped) == {str(path)}
    refuse_bad(check_images(dropped))


def test_test_images_that_can_not_be_used_go_too(folder):
    (folder / "test" / "a" / "x.jpg").write_bytes(b"")
    dataset, report = _check(folder)
    assert _left_out(dataset, report) == {"test/a/x.jpg"}


# Lossless, under another name and format, with other bytes.
COPIES = {
    "same file": lambda source, target: target.with_suffix(".png").write_bytes(source.read_bytes()),
    "bmp": lambda source, target: Image.open(source).save(target.with_suffix(".bmp")),
    "tiff": lambda source, target: Image.open(source).save(target.with_suffix(".tiff"), compression="tiff_lzw"),
    "webp": lambda source, target: Image.open(source).save(target.with_suffix(".webp"), lossless=True),
    "opaque": lambda source, target: Image.open(source).convert("RGBA").save(target.with_suffix(".png")),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("source", "target", "goes"),
    [("train", "test", "train/a/0.png"), ("validation", "test", "validation/a/0.png"), ("train", "validation", None)],
)
def test_the_same_image_in_several_splits(folder, how, source, target, goes):
    COPIES[how](folder / source / "a" / "0.png", folder / target / "a" / "copy")
    dataset, report = _check(folder)
    finding = _only(report, "leak")
    assert finding.fatal and ("same file" if how == "same file" else "same pixels") in finding.message
    assert "0.png" in finding.message and "copy" in finding.message
    assert _left_out(dataset, report) == {goes or "train/a/0.png"}
    assert len(drop_bad(dataset, report)["test"]) == len(dataset["test"])


def test_in_three_splits_the_test_stays(folder):
    for split in ("train", "validation", "test"):
        _save(folder / split / "a" / "x.png", seed=1)
    _save(folder / "train" / "a" / "y.bmp", seed=1)
    dataset, report = _check(folder)
    assert len(_only(report, "leak").places) == 4
    assert _left_out(dataset, report) == {"train/a/x.png", "train/a/y.bmp", "validation/a/x.png"}


def test_the_same_image_twice_in_a_split_is_a_note(folder):
    _save(folder / "train" / "a" / "x.png", seed=1)
    _save(folder / "train" / "a" / "y.bmp", seed=1)
    dataset, report = _check(folder)
    assert not _only(report, "duplicate").fatal
    refuse_bad(report)
    assert _paths(drop_bad(dataset, report)) == _paths(dataset)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_image_under_two_labels(folder, split):
    _save(folder / "train" / "a" / "x.png", seed=1)
    _save(folder / split / "b" / "y.bmp", seed=1)
    dataset, report = _check(folder)
    finding = _only(report, "label_clash")
    assert finding.fatal and "as a, b:" in finding.message
    assert _left_out(dataset, report) == {"train/a/x.png", f"{split}/b/y.bmp"}


def test_an_image_that_differs_in_one_pixel_is_another(folder):
    image = _image(1)
    image.save(folder / "train" / "a" / "x.png")
    image.putpixel((3, 3), tuple(255 - value for value in image.getpixel((3, 3))))
    image.save(folder / "test" / "b" / "y.png")
    assert _check(folder)[1].findings == ()


def test_pixels_of_another_shape_are_another_image(folder):
    pixels = bytes(16 * 12 * 3)
    Image.frombytes("RGB", (16, 12), pixels).save(folder / "train" / "a" / "x.png")
    Image.frombytes("RGB", (12, 16), pixels).save(folder / "test" / "b" / "y.png")
    assert _check(folder)[1].findings == ()


def test_files_that_are_ignored_are_noted(folder):
    for name in ("train/.DS_Store", "test/a/Thumbs.db", "__MACOSX/._x.jpg", "train/b/list.txt", "train/loose.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    report = _check(folder)[1]
    assert _kinds(report) == {"hidden_file": 3, "stray_file": 2} and not report.fatal
    found = {os.path.relpath(finding.places[0].name, folder) for finding in report.findings}
    assert found == {"train/.DS_Store", "test/a/Thumbs.db", "__MACOSX", "train/b/list.txt", "train/loose.png"}


def test_files_that_may_be_images_and_empty_classes_stop(folder):
    unread, empty = folder / "train" / "new" / "IMG_0001", folder / "train" / "empty"
    for path in (unread.parent, empty):
        path.mkdir()
    unread.write_bytes(b"?")
    dataset, report = _check(folder, skip_bad_images=True)
    assert _kinds(report) == {"unread_file": 1, "empty_class": 2} and len(report.fatal) == 3
    assert {finding.places[0].name for finding in report.findings} == {str(unread), str(unread.parent), str(empty)}
    with pytest.raises(BadDataError, match=r"(?s)unread_file .*IMG_0001 has no known ending"):
        refuse_bad(DataReport(report.images, report.findings[:1]))
    with pytest.raises(BadDataError, match=r"(?s)empty_class .*, 2:\n.*empty holds no image"):
        refuse_bad(report)
    with pytest.raises(BadDataError, match=r"IMG_0001 has no known ending"):
        load_checked_images(DataArguments(train_dir=str(folder)), 0)
    # Left out and recorded.
    assert drop_bad(dataset, report).keys() == dataset.keys()
    images, recorded = load_checked_images(DataArguments(train_dir=str(folder), skip_bad_images=True), 0)
    assert images["train"].features["label"].names == ["a", "b"]
    assert recorded.findings == report.findings


def test_classes(folder):
    for number in range(3):
        _save(folder / "train" / "rare" / f"{number}.png")
    dataset, report = _check(folder)
    assert [finding.message for finding in report.findings] == [
        '"rare" has no images in validation',
        '"rare" has no images in test',
        '"rare" has 3, fewer than 5',
    ]
    assert [finding.fatal for finding in report.findings] == [True, False, False]
    with pytest.raises(BadDataError, match='"rare" has no images in validation'):
        drop_bad(dataset, report)
    report = _check(folder, allow_missing_classes=True, min_per_class=3)[1]
    assert _kinds(report) == {"missing_class": 2} and not report.fatal


def _bytes_dataset(images, labels, box=None):
    columns = {"image": images, "label": labels} | ({"box": box} if box else {})
    features = {"image": IMAGE, "label": datasets.ClassLabel(names=["a", "b"])} | ({"box": BOX} if box else {})
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _encoded(image, format_="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return {"path": None, "bytes": buffer.getvalue()}


def test_images_as_bytes_are_named_by_split_and_row():
    good = [_encoded(_image(number)) for number in range(6)]
    train = _bytes_dataset([*good[:4], {"path": "x.jpg", "bytes": b"?"}, good[4]], [0, 1, 0, 1, 0, 0])
    test = _bytes_dataset([_encoded(_image(4), "BMP"), good[5]], [0, 1])
    report = check_images(datasets.DatasetDict({"train": train, "test": test}), min_per_class=0)
    assert _kinds(report) == {"unreadable": 1, "leak": 1}
    assert report.findings[0].message.startswith("train[4] (x.jpg): ")
    assert "train[5]" in report.findings[1].message and "test[0]" in report.findings[1].message
    assert report.rows_to_leave_out() == {"train": [4, 5]}


def test_with_boxes_what_is_in_them_counts():
    image = _encoded(_image(1))
    boxes = [[0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 8, 8], [100, 100, 120, 120]]
    train = _bytes_dataset([image] * 4, [0, 1, 0, 0], boxes)
    report = check_images(datasets.DatasetDict({"train": train}), min_per_class=0)
    assert _kinds(report) == {"empty_box": 1, "duplicate": 1}
    assert [place.row for place in report.findings[1].places] == [0, 2]
    assert report.rows_to_leave_out() == {"train": [3]}


class TestUnlabeled:
    @pytest.fixture
    def folder(self, tmp_path):
        """7 images, one of them in a folder of its own."""
        for number in range(6):
            _save(tmp_path / "others" / f"{number}.png")
        _save(tmp_path / "others" / "more" / "6.png")
        return tmp_path / "others"

    def test_all_that_are_whole(self, folder):
        split = load_unlabeled_images(folder)
        assert [os.path.relpath(row["image"]["path"], folder) for row in split] == [
            *(f"{number}.png" for number in range(6)),
            "more/6.png",
        ]

    @pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind in BAD for number in range(len(BAD[kind]))])
    def test_those_that_can_not_be_used_are_named_or_left_out(self, folder, kind, number, caplog):
        path = folder / "more" / "x.jpg"
        BAD[kind][number](path)
        with pytest.raises(BadDataError, match=r"(?s)1 of the 8 images in .*others.*x\.jpg.*--skip_bad_images"):
            load_unlabeled_images(folder, max_pixels=1000)
        assert not caplog.messages
        split = load_unlabeled_images(folder, max_pixels=1000, skip_bad_images=True)
        assert "1 of the 8 images in" in caplog.text
        assert len(split) == 7 and str(path) not in {row["image"]["path"] for row in split}

    def test_the_first_of_many_are_named(self, folder):
        for number in range(5):
            (folder / f"{number}.png").write_bytes(b"")
        with pytest.raises(BadDataError, match="5 of the 7") as raised:
            load_unlabeled_images(folder)
        assert str(raised.value).count(".png") == 3

    def test_none_is_left(self, folder):
        for path in folder.rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(BadDataError, match=r"No image in .*others can be used"):
            load_unlabeled_images(folder, skip_bad_images=True)


class TestKeptFacts:
    @pytest.fixture
    def decoded(self, monkeypatch):
        """Names of the images that are decoded."""
        names = []
        decode_image = checks.decode_image

        def decode(image, *args):
            names.append(image["path"])
            return decode_image(image, *args)

        monkeypatch.setattr(checks, "decode_image", decode)
        return names

    def test_images_are_decoded_once_however_they_are_split(self, tmp_path, decoded):
        for number in range(12):
            _save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
        (tmp_path / "data" / "a" / "bad.jpg").write_bytes(b"")
        for seed, share in ((0, 0.2), (1, 0.5), (2, 0)):
            dataset = load_images(DataArguments(train_dir=str(tmp_path / "data"), train_val_split=share), seed)
            report = check_images(dataset, min_per_class=0)
            assert _only(report, "zero_size").places[0].name.endswith("bad.jpg")
            assert len(decoded) == 13
        assert len(list((cache_dir() / "checks").iterdir())) == 1

    def test_what_was_altered_is_decoded_again(self, folder, decoded):
        _check(folder)
        path = folder / "train" / "a" / "0.png"
        content = path.read_bytes()
        path.write_bytes(content[:-30] + bytes(30))
        os.utime(path, ns=(1, 1))
        assert _only(_check(folder)[1], "truncated").places[0].name == str(path)

    def test_another_limit_is_another_check(self, folder):
        assert _check(folder)[1].findings == ()
        assert _kinds(_check(folder, max_pixels=100)[1]) == {"oversized": 20}

    def test_an_image_that_comes_back_is_seen(self, folder):
        path = folder / "train" / "a" / "x.png"
        path.symlink_to(folder.parent / "later.png")
        assert _kinds(_check(folder)[1]) == {"unreadable": 1}
        _save(folder.parent / "later.png")
        assert _check(folder)[1].findings == ()

    def test_a_file_that_may_be_read_later_is_seen(self, folder, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(checks.Path, "read_bytes", refuse)
            report = _check(folder)[1]
        assert (
            _kinds(report) == {"unreadable": 20} and "cannot be read: Permission denied" in report.findings[0].message
        )
        assert _check(folder)[1].findings == ()

    def test_the_same_bytes_are_decoded_once(self, decoded):
        split = _bytes_dataset([_encoded(_image(1))] * 5, [0] * 5)
        report = check_images(datasets.DatasetDict({"train": split}), min_per_class=0)
        assert len(report.by_kind()["duplicate"][0].places) == 5
        assert len(decoded) == 1

    @pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1]}', "{"])
    def test_a_broken_file_is_made_anew(self, folder, decoded, content):
        first = _check(folder)[1]
        (path,) = (cache_dir() / "checks").iterdir()
        path.write_text(content)
        assert _check(folder)[1] == first
        assert len(decoded) == 40
        assert len(json.loads(path.read_text())) == 20

    def test_a_cache_that_can_not_be_written(self, folder, monkeypatch, caplog):
        (folder.parent / "file").write_text("")
        monkeypatch.setenv("RBI_CACHE", str(folder.parent / "file"))
        assert _check(folder)[1].findings == ()
        assert "cannot be cached" in caplog.text

    def test_ctrl_c_leaves_nothing(self, folder, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(checks, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _check(folder)
        assert not cache_dir().exists()

    def test_the_number_of_threads_does_not_matter(self, folder, monkeypatch, tmp_path):
        _huge(folder / "train" / "a" / "x.png")
        reports = []
        for number in (1, 3, 50):
            monkeypatch.setenv("RBI_CACHE", str(tmp_path / str(number)))
            reports.append(_check(folder, num_workers=number)[1])
        assert reports[0] == reports[1] == reports[2]


class TestDropBad:
    def test_another_data_set(self, folder):
        dataset, report = _check(folder)
        with pytest.raises(ValueError, match="check this one"):
            drop_bad(datasets.DatasetDict({"train": dataset["train"]}), report)

    def test_a_class_or_split_without_images(self, folder):
        for split in ("train", "test"):
            for path in (folder / split / "a").iterdir():
                path.write_bytes(b"")
        with pytest.raises(BadDataError, match="No training image of a can be used"):
            drop_bad(*_check(folder))
        for path in (folder / "test" / "b").iterdir():
            path.write_bytes(b"")
        with pytest.raises(BadDataError, match="No image of test can be used"):
            drop_bad(*_check(folder))


def test_the_report_as_a_record(folder):
    (folder / "train" / "a" / "x.jpg").write_bytes(b"")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    _, report = _check(folder)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["images"] == {"train": 13, "validation": 4, "test": 4}
    assert (record["fatal"], record["notes"], record["left_out"]) == (1, 1, {"train": [6]})
    assert [finding["kind"] for finding in record["findings"]] == ["zero_size", "hidden_file"]
    assert record["findings"][0]["places"][0]["name"].endswith("x.jpg")


def test_errors_name_the_first_of_many():
    place = Place("x", "train", 0)
    report = DataReport({"train": 1}, tuple(Finding("leak", f"n{number}", True, (place,)) for number in range(9)))
    with pytest.raises(BadDataError) as error:
        refuse_bad(report)
    assert "n2" in str(error.value) and "n3" not in str(error.value) and "and 6 more" in str(error.value)


def test_kinds_are_those_that_are_found():
    assert set(BAD) | {"empty_box", "label_clash", "leak", "duplicate"} < set(KINDS)
