"""Published layouts are read right from wherever they lie, and every fault in them is named.

The oracle is in the pixels: a made-up image holds a rectangle in the color of its class, which is its box.
"""

import logging
import random
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from training.data.archives import unpack
from training.data.decode import decode_image
from training.data.layouts import LAYOUTS, PUBLISHED
from training.data.tiny import class_color, make_published


NUM_CLASSES = 4
# Of class 2, the third, in each publisher's words.
NAMES = {
    "cub_200_2011": "003.Made_up_Bird_3",
    "stanford_dogs": "Made_up_dog_2",
    "nabirds": "Made-up Bird 2 (Adult)",
    "tiny_imagenet": "made-up thing 2, thing",
    "oxford_flowers": "class_003",
    "fgvc_aircraft": "F/A-2 Made Up",
    "stanford_cars": "Made-Up Car Coupe 2002",
}
# Published, but not needed.
UNUSED = {
    "attributes.txt",
    "file_list.mat",
    "hierarchy.txt",
    "photographers.txt",
    "sizes.txt",
    "images_val.txt",
    "images_train.txt",
    "images_test.txt",
}
WITH_TEXTS = ["cub_200_2011", "nabirds", "tiny_imagenet", "fgvc_aircraft"]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path):
    """Writes a set into a folder of its own."""
    return lambda name, **kwargs: make_published(name, tmp_path / "data", NUM_CLASSES, 6, **kwargs)


def _check_pixels(data: datasets.DatasetDict):
    """Labels and boxes are what is seen: inside the box the color of the class, at its rim and beyond gray."""
    for row in (row for split in data.values() for row in split):
        pixels = np.asarray(decode_image(row["image"])).astype(float)
        color = np.array(class_color(row["label"], NUM_CLASSES))
        inside = np.abs(pixels - color).max(axis=2) < 60
        if "box" in row:
            left, top, right, bottom = (int(edge) for edge in row["box"])
            assert row["box"] == [left, top, right, bottom]
            expected = np.zeros_like(inside)
            expected[top:bottom, left:right] = True
            assert (inside == expected).mean() > 0.99
            # One column or row too many or too few is seen.
            columns, rows = np.flatnonzero(inside.mean(0) > 0.3), np.flatnonzero(inside.mean(1) > 0.3)
            assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (left, top, right, bottom)
        else:
            assert inside.mean() > 0.1


def _by_image(data: datasets.DatasetDict) -> dict[str, dict]:
    return {
        split: {Path(row["image"]["path"]).name: (row["label"], row.get("box")) for row in rows}
        for split, rows in data.items()
    }


def _edit(file: Path, old: str, new: str):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", LAYOUTS)
class TestEveryLayout:
    def test_canonical_form(self, name, make):
        data = LAYOUTS[name](make(name))
        assert list(data) == list(PUBLISHED[name].split_sizes)
        paths = [row["image"]["path"] for split in data.values() for row in split]
        assert len(set(paths)) == 6 * NUM_CLASSES
        assert all(Path(path).is_absolute() for path in paths)
        for split in data.values():
            assert split.features["image"] == datasets.Image(decode=False)
            assert split[0]["image"]["bytes"] is None
            assert np.bincount(split["label"]).tolist() == [6 // len(data)] * NUM_CLASSES
            assert split.features["label"].names[2] == NAMES[name]
            assert split.features["label"].num_classes == NUM_CLASSES
            assert ("box" in split.features) == (name != "oxford_flowers")
            if "box" in split.features:
                assert split.features["box"] == datasets.Sequence(datasets.Value("float32"), length=4)
        _check_pixels(data)

    @pytest.mark.parametrize("images_per_class", [7, 8])
    def test_splits_are_the_publishers(self, name, images_per_class, tmp_path):
        path = make_published(name, tmp_path / "data", NUM_CLASSES, images_per_class)
        # The maker deals out 7 as 4 + 3 or 3 + 2 + 2, and 8 as 3 + 3 + 2.
        sizes = {2: {7: [4, 3], 8: [4, 4]}, 3: {7: [3, 2, 2], 8: [3, 3, 2]}}[len(PUBLISHED[name].split_sizes)]
        data = LAYOUTS[name](path)
        assert [len(split) for split in data.values()] == [NUM_CLASSES * size for size in sizes[images_per_class]]

    def test_from_everywhere(self, name, make, tmp_path, monkeypatch):
        path = make(name)
        expected = _by_image(LAYOUTS[name](path))
        monkeypatch.chdir(path.parent)
        for given in (path, tmp_path / "data", path.parent, Path(path.name), str(path)):
            data = LAYOUTS[name](given)
            assert _by_image(data) == expected
            assert Path(data["train"][0]["image"]["path"]).is_absolute()

    def test_from_archives(self, name, make, tmp_path):
        expected = _by_image(LAYOUTS[name](make(name)))
        shutil.rmtree(tmp_path / "data")
        path = make(name, archive=True)
        archives = [file for file in (tmp_path / "data").iterdir() if file.name in PUBLISHED[name].archives]
        for given in (path, tmp_path / "data", *archives):
            data = LAYOUTS[name](given)
            assert _by_image(data) == expected
            _check_pixels(data)

    def test_from_unpacked_archives(self, name, make, tmp_path):
        make(name, archive=True)
        for archive in PUBLISHED[name].archives:
            # As tools unpack them, each into a folder of its own name.
            shutil.move(unpack(tmp_path / "data" / archive), tmp_path / "data" / f"{archive} unpacked")
            (tmp_path / "data" / archive).unlink()
        _check_pixels(LAYOUTS[name](tmp_path / "data"))

    def test_sizes_that_are_not_the_published_are_said(self, name, make, caplog):
        with caplog.at_level(logging.WARNING):
            LAYOUTS[name](make(name))
        assert f"has {NUM_CLASSES} classes, " in caplog.text
        assert f"{name} as published has {PUBLISHED[name].num_classes} classes, " in caplog.text

    def test_the_published_sizes_are_not_remarked_upon(self, name, make, caplog, monkeypatch):
        published = PUBLISHED[name]
        sizes = dict.fromkeys(published.split_sizes, 6 * NUM_CLASSES // len(published.split_sizes))
        here = type(published)(NUM_CLASSES, sizes, published.archives, published.folder)
        monkeypatch.setitem(PUBLISHED, name, here)
        with caplog.at_level(logging.WARNING):
            LAYOUTS[name](make(name))
        assert not caplog.records

    def test_an_absent_image(self, name, make, tmp_path):
        path = make(name)
        image = Path(LAYOUTS[name](path)["test"][3]["image"]["path"])
        image.unlink()
        with pytest.raises(FileNotFoundError, match=rf"1 of \d+ images of the split 'test'.*{image.name}"):
            LAYOUTS[name](path)

    def test_every_listed_file_is_missed(self, name, make, tmp_path):
        make(name)
        root = tmp_path / "data"
        needed = [file for file in root.rglob("*") if file.suffix in (".txt", ".mat") and file.name not in UNUSED]
        assert needed
        for file in needed:
            file.rename(tmp_path / "away")
            with pytest.raises(FileNotFoundError, match=file.name):
                LAYOUTS[name](root)
            (tmp_path / "away").rename(file)
        LAYOUTS[name](root)

    def test_nothing_there(self, name, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            LAYOUTS[name](tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=rf"of {name} is not in .*empty.*{PUBLISHED[name].archives[0]}"):
            LAYOUTS[name](tmp_path / "empty")

    def test_a_cut_off_archive(self, name, make, tmp_path):
        path = make(name, archive=True)
        file = tmp_path / "data" / PUBLISHED[name].archives[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"{file.name} is broken or cut off"):
            LAYOUTS[name](path)


class TestTexts:
    @pytest.mark.parametrize("name", WITH_TEXTS)
    def test_order_of_lines_means_nothing(self, name, make, tmp_path):
        path = make(name)
        before = LAYOUTS[name](path)
        for number, file in enumerate(sorted((tmp_path / "data").rglob("*.txt"))):
            # The order of the variants is the order of the classes.
            if file.name != "variants.txt":
                lines = file.read_text().splitlines()
                random.Random(number).shuffle(lines)
                file.write_text("\n".join(lines))
        after = LAYOUTS[name](path)
        assert _by_image(after) == _by_image(before)
        assert after["train"].features == before["train"].features

    @pytest.mark.parametrize("name", WITH_TEXTS)
    def test_windows_line_ends_and_byte_order_marks(self, name, make, tmp_path):
        path = make(name)
        before = LAYOUTS[name](path)
        for file in (tmp_path / "data").rglob("*.txt"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
        after = LAYOUTS[name](path)
        assert _by_image(after) == _by_image(before)
        assert after["train"].features == before["train"].features

    @pytest.mark.parametrize(
        ("name", "file", "change", "message"),
        [
            ("cub_200_2011", "image_class_labels.txt", lambda lines: lines[1:], r"lacks a line for 1 of 24: 1\."),
            ("cub_200_2011", "train_test_split.txt", lambda lines: lines[1:], "train_test_split.txt lacks a line"),
            ("nabirds", "bounding_boxes.txt", lambda lines: lines[:-2], "bounding_boxes.txt lacks a line for 2 of 24"),
            ("cub_200_2011", "images.txt", lambda lines: lines[1:], "images.txt lacks an image for 1 of 24"),
            ("cub_200_2011", "classes.txt", lambda lines: lines[1:], r"classes.txt lacks a name for 1 of 4: 1\."),
            ("nabirds", "classes.txt", lambda lines: lines[:-1], r"classes.txt lacks a name for 1 of 4: 295\."),
            ("cub_200_2011", "images.txt", lambda lines: [*lines, lines[0]], "line 25: 1 is listed twice"),
            ("cub_200_2011", "images.txt", lambda lines: [*lines, "25"], "line 25: there must be at least two words"),
            ("cub_200_2011", "train_test_split.txt", lambda lines: ["1 2", *lines[1:]], "'2' for 1: it must be 0 or"),
            ("cub_200_2011", "bounding_boxes.txt", lambda lines: ["1 2 3 4", *lines[1:]], "4 numbers as the box of 1"),
            ("nabirds", "bounding_boxes.txt", lambda lines: [lines[0] + "x", *lines[1:]], "must have 4 numbers"),
            ("cub_200_2011", "bounding_boxes.txt", lambda lines: ["1 1 1 nan 1", *lines[1:]], "finite numbers"),
            ("cub_200_2011", "images.txt", lambda lines: ["1 ../../a.jpg", *lines[1:]], "points out of its folder"),
            ("cub_200_2011", "images.txt", lambda lines: ["1 /etc/passwd", *lines[1:]], "points out of its folder"),
            ("cub_200_2011", "classes.txt", lambda lines: ["a b", *lines], "begin each line with the number of a cl"),
            ("cub_200_2011", "train_test_split.txt", lambda lines: [f"{n} 0" for n in range(1, 25)], "'train'"),
            ("tiny_imagenet", "words.txt", lambda lines: lines[:-1], "words.txt lacks a name for 1 of 4"),
            ("tiny_imagenet", "wnids.txt", lambda lines: lines[1:], "which is not among its classes"),
            ("tiny_imagenet", "wnids.txt", lambda lines: [*lines, lines[0]], "twice"),
            ("tiny_imagenet", "val_annotations.txt", lambda lines: ["a.JPEG n1", *lines], "4 numbers as the box of a"),
            ("fgvc_aircraft", "variants.txt", lambda lines: lines[1:], "label F/A-0 Made Up, which is not among"),
            ("fgvc_aircraft", "images_box.txt", lambda lines: lines[1:], "images_box.txt lacks a box for 1 of 8"),
            ("fgvc_aircraft", "variants.txt", lambda lines: [*lines, lines[0]], "lists a class twice: F/A-0"),
        ],
    )
    def test_files_that_disagree(self, name, file, change, message, make, tmp_path):
        path = make(name)
        file = next((tmp_path / "data").rglob(file))
        file.write_text("\n".join(change(file.read_text().splitlines())))
        with pytest.raises(ValueError, match=message):
            LAYOUTS[name](path)

    def test_a_text_that_is_none(self, make):
        path = make("cub_200_2011")
        (path / "classes.txt").write_bytes(b"1 \xff\xfe\n")
        with pytest.raises(ValueError, match=r"classes\.txt is not text in UTF-8"):
            LAYOUTS["cub_200_2011"](path)

    def test_an_image_in_two_splits(self, make):
        data = make("fgvc_aircraft") / "data"
        line = (data / "images_variant_test.txt").read_text().splitlines()[0]
        with (data / "images_variant_train.txt").open("a") as file:
            file.write(f"{line}\n")
        with pytest.raises(ValueError, match=rf"list each image once, but lists 1 more often: {line.split()[0]}\."):
            LAYOUTS["fgvc_aircraft"](data)


class TestNABirds:
    def test_classes_are_the_used_ones_by_number(self, make):
        names = LAYOUTS["nabirds"](make("nabirds"))["train"].features["label"].names
        assert names == [f"Made-up Bird {label} (Adult)" for label in range(NUM_CLASSES)]

    def test_numbers_count_and_not_their_digits(self, make):
        path = make("nabirds")
        for file in ("classes.txt", "image_class_labels.txt"):
            text = (path / file).read_text()
            (path / file).write_text(text.replace(" 302\n", " 1302\n").replace("302 M", "1302 M"))
        names = LAYOUTS["nabirds"](path)["train"].features["label"].names
        assert [name[13] for name in names] == ["0", "2", "3", "1"]

    def test_names_that_are_shared_carry_their_number(self, make):
        path = make("nabirds")
        _edit(path / "classes.txt", "Made-up Bird 3", "Made-up Bird 1")
        names = LAYOUTS["nabirds"](path)["train"].features["label"].names
        assert names[1:4:2] == ["Made-up Bird 1 (Adult) (302)", "Made-up Bird 1 (Adult) (316)"]
        # Which is the name of another class, too.
        _edit(path / "classes.txt", "Made-up Bird 2 (Adult)", "Made-up Bird 1 (Adult) (302)")
        names = LAYOUTS["nabirds"](path)["train"].features["label"].names
        assert len(set(names)) == NUM_CLASSES and names[1:3] == [f"{names[2]} (302)", "Made-up Bird 1 (Adult) (302)"]


class TestTinyImageNet:
    def test_the_published_validation_is_the_test(self, make):
        data = LAYOUTS["tiny_imagenet"](make("tiny_imagenet"))
        assert {Path(row["image"]["path"]).name[:4] for row in data["test"]} == {"val_"}

    def test_test_images_are_not_needed(self, make):
        path = make("tiny_imagenet")
        shutil.rmtree(path / "test")
        assert set(LAYOUTS["tiny_imagenet"](path)) == {"train", "test"}


class TestStanfordDogs:
    def test_without_annotation_there_are_no_boxes(self, make):
        path = make("stanford_dogs")
        shutil.rmtree(path / "Annotation")
        assert "box" not in LAYOUTS["stanford_dogs"](path)["train"].features

    def test_annotations(self, make):
        path = make("stanford_dogs")
        file = next(file for file in (path / "Annotation").rglob("*") if file.is_file())
        for content, message in [("<annotation/>", "no object with a box"), ("<annotation>", "is not XML")]:
            file.write_text(content)
            with pytest.raises(ValueError, match=f"{file.name} .*{message}|{file.name} {message}"):
                LAYOUTS["stanford_dogs"](path)
        file.write_text("<a><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax></bndbox></a>")
        with pytest.raises(ValueError, match="4 numbers as the box of an object, not 1 1 9 nothing"):
            LAYOUTS["stanford_dogs"](path)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            LAYOUTS["stanford_dogs"](path)


class TestMatlabFiles:
    @pytest.mark.parametrize("name", ["stanford_dogs", "oxford_flowers", "stanford_cars"])
    def test_cut_off_or_altered(self, name, make, tmp_path):
        path = make(name)
        rng = random.Random(0)
        for file in [file for file in (tmp_path / "data").rglob("*.mat") if file.name not in UNUSED]:
            data = file.read_bytes()
            for cut in (0, 3, 127, 130, len(data) // 2, len(data) - 2):
                file.write_bytes(data[:cut])
                with pytest.raises(ValueError, match=file.name):
                    LAYOUTS[name](path)
            for _ in range(20):
                altered = bytearray(data)
                altered[rng.randrange(len(data))] ^= rng.randrange(1, 256)
                file.write_bytes(altered)
                try:
                    LAYOUTS[name](path)
                except (ValueError, FileNotFoundError) as error:
                    assert str(path) in str(error)
            file.write_bytes(data)

    def test_another_variable(self, make):
        from scipy.io import savemat

        path = make("oxford_flowers")
        savemat(path / "setid.mat", {"trnid": [[1]], "valid": [[2]]})
        with pytest.raises(ValueError, match=r"setid\.mat has no variable 'tstid'"):
            LAYOUTS["oxford_flowers"](path)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ([1, 2, 3], "list each image once, but lists 2 more often: 1, 2"),
            ([25], "lists image 25"),
            ([0], "image 0"),
        ],
    )
    def test_numbers_of_flowers(self, numbers, message, make):
        from scipy.io import savemat

        path = make("oxford_flowers")
        savemat(path / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [numbers]})
        with pytest.raises(ValueError, match=message):
            LAYOUTS["oxford_flowers"](path)

    def test_one_image_is_a_list_too(self, tmp_path):
        path = make_published("stanford_cars", tmp_path / "data", 2, 2)
        assert [len(split) for split in LAYOUTS["stanford_cars"](path).values()] == [2, 2]
        from scipy.io import savemat

        fields = {"bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 9, "bbox_y2": 9, "class": 2, "fname": "00001.jpg"}
        savemat(path / "devkit" / "cars_train_annos.mat", {"annotations": fields})
        row = LAYOUTS["stanford_cars"](path)["train"][0]
        assert (row["label"], row["box"]) == (1, [0, 0, 9, 9])
        del fields["class"]
        savemat(path / "cars_test_annos_withlabels.mat", {"annotations": fields})
        with pytest.raises(ValueError, match=r"withlabels\.mat has no field 'class'"):
            LAYOUTS["stanford_cars"](path)

    def test_without_scipy(self, make, monkeypatch):
        path = make("oxford_flowers")
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(ImportError, match=r"scipy is needed to read .*imagelabels\.mat: pip install scipy"):
            LAYOUTS["oxford_flowers"](path)


def test_two_sets_in_one_folder(tmp_path):
    # NABirds has files of the same names; each is found by the name of its folder.
    make_published("cub_200_2011", tmp_path, NUM_CLASSES)
    make_published("nabirds", tmp_path, NUM_CLASSES)
    for name in ("cub_200_2011", "nabirds"):
        assert LAYOUTS[name](tmp_path)["train"].features["label"].names[2] == NAMES[name]
    (tmp_path / "CUB_200_2011").rename(tmp_path / "cub")
    with pytest.raises(ValueError, match=r"There are both .*cub.* and .*nabirds.*: point at the folder of one"):
        LAYOUTS["cub_200_2011"](tmp_path)


def test_images_are_not_opened(tmp_path, monkeypatch):
    path = make_published("cub_200_2011", tmp_path)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened"))
    LAYOUTS["cub_200_2011"](path)
