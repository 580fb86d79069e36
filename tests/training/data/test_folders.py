"""Folders of images: splits, classes, and everything that is not an image of a class."""

import io
import os
import unicodedata

import datasets
import numpy as np
import pytest
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, features

from training.data import decode, folders
from training.data.arguments import DataArguments
from training.data.folders import ignored_files, natural_key, read_unlabeled, walk_folder
from training.data.form import IMAGE, BadDataError, labels_of


class TestFolders:
    def test_classes_are_in_natural_order_and_each_has_its_share_held_out(self, folder, check_form, load, rows_of):
        dataset = load(train_dir=str(folder), train_val_split=0.25)
        check_form(dataset)
        assert dataset["train"].features["label"].names == ["cat2", "cat10", "dog"]
        assert labels_of(dataset["validation"]).bincount().tolist() == [1, 3, 2]
        paths = [row["image"]["path"] for split in dataset.values() for row in split]
        assert sorted(paths) == sorted(str(path) for path in folder.rglob("*.png"))
        for split in dataset.values():
            assert all(
                row["image"]["path"].split(os.sep)[-2] == name
                for row, (_, name) in zip(split, rows_of(split), strict=True)
            )

    def test_agrees_with_the_builder_of_datasets(self, folder, tmp_path, load, rows_of):
        ours = load(train_dir=str(folder), train_val_split=0)["train"]
        theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
        theirs = theirs.cast_column("image", IMAGE)
        assert sorted(rows_of(ours)) == sorted(rows_of(theirs))

    @pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
    def test_one_folder_with_the_splits_in_it(self, tmp_path, validation, check_form, load, make_folder):
        for name, count in (("train", 3), (validation, 2), ("test", 1)):
            make_folder(tmp_path / name, {"a": count, "b": count})
        dataset = load(train_dir=str(tmp_path))
        check_form(dataset)
        assert {name: len(split) for name, split in dataset.items()} == {"train": 6, "validation": 4, "test": 2}

    def test_test_images_are_never_held_out(self, folder, tmp_path, load, make_folder):
        test = make_folder(tmp_path / "test", {"cat2": 3, "dog": 2})
        dataset = load(train_dir=str(folder), test_dir=str(test))
        assert len(dataset["test"]) == 5
        assert all(str(test) in row["image"]["path"] for row in dataset["test"])
        assert not any(str(test) in row["image"]["path"] for row in dataset["validation"])

    def test_a_class_called_train(self, tmp_path, load, make_folder):
        make_folder(tmp_path, {"train": 3, "bus": 3, "test": 3})
        dataset = load(train_dir=str(tmp_path))
        assert dataset["train"].features["label"].names == ["bus", "test", "train"]

    def test_splits_are_never_taken_for_classes(self, tmp_path, load, make_folder, make_image):
        for name in ("train", "test"):
            make_image(tmp_path / "flat" / name / "1.png")
            make_folder(tmp_path / "loose" / name, {"a": 2, "b": 2})
        with pytest.raises(BadDataError, match=r"only the folders test, train, and .*no folders of classes"):
            load(train_dir=str(tmp_path / "flat"))
        make_image(tmp_path / "loose" / "train" / "1.png")
        assert list(load(train_dir=str(tmp_path / "loose"))) == ["train", "validation", "test"]
        make_image(tmp_path / "loose" / "bus" / "1.png")
        with pytest.raises(ValueError, match=r"train with folders in it, and beside it folders of images \(bus\)"):
            load(train_dir=str(tmp_path / "loose"))

    def test_a_test_folder_without_classes_is_left_out(self, tmp_path, caplog, load, make_folder, make_image):
        make_folder(tmp_path / "train", {"a": 3, "b": 3})
        make_image(tmp_path / "test" / "1.png")
        assert list(load(train_dir=str(tmp_path))) == ["train", "validation"]
        assert "no labels: left out" in caplog.text

    def test_a_split_named_twice(self, tmp_path, load, make_folder):
        for name in ("train", "val"):
            make_folder(tmp_path / name, {"a": 3, "b": 3})
        with pytest.raises(ValueError, match="are both for validation"):
            load(train_dir=str(tmp_path), validation_dir=str(tmp_path / "val"))
        make_folder(tmp_path / "valid", {"a": 3, "b": 3})
        with pytest.raises(ValueError, match=r"val and .*valid are both for validation"):
            load(train_dir=str(tmp_path))

    def test_what_is_no_image_of_a_class(self, folder, load):
        for name in (".DS_Store", "dog/Thumbs.db", "dog/._0.png", "dog/notes.txt", "loose.png", "dog/.hidden/a.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"?")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "._x.jpg").write_bytes(b"?")
        (folder / "empty").mkdir()
        os.mkfifo(folder / "dog" / "pipe.png")
        dataset = load(train_dir=str(folder), train_val_split=0, skip_bad_images=True)
        assert len(dataset["train"]) == 20
        found = ignored_files(DataArguments(train_dir=str(folder)))
        relative = {kind: sorted(os.path.relpath(path, folder) for path in paths) for kind, paths in found.items()}
        assert relative == {
            "hidden_file": [".DS_Store", "__MACOSX", "dog/._0.png", "dog/.hidden", "dog/Thumbs.db"],
            "stray_file": ["dog/notes.txt", "dog/pipe.png", "loose.png"],
            "unread_file": [],
            "empty_class": ["empty"],
        }

    def test_what_lies_beside_the_folders_of_splits(self, tmp_path, caplog, make_folder):
        make_folder(tmp_path / "train", {"a": 3, "b": 3})
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "unlabeled").mkdir()
        found = ignored_files(DataArguments(train_dir=str(tmp_path)))
        assert {kind: paths for kind, paths in found.items() if paths} == {
            "hidden_file": [str(tmp_path / "__MACOSX")],
            "stray_file": [str(tmp_path / "unlabeled")],
        }
        assert "unlabeled" in caplog.text

    def test_nested_images_are_of_the_outermost_folder(self, folder, load, make_image, rows_of):
        make_image(folder / "dog" / "poodle" / "toy" / "x.jpg")
        assert ("x.jpg", "dog") in rows_of(load(train_dir=str(folder), train_val_split=0)["train"])

    def test_links(self, folder, tmp_path, make_folder):
        (folder / "dog" / "again").symlink_to(folder, target_is_directory=True)
        (folder / "linked").symlink_to(make_folder(tmp_path / "else", {"a": 2}) / "a", target_is_directory=True)
        content = walk_folder(folder)
        assert {name: len(paths) for name, paths in content.images.items()} == {
            "cat2": 4,
            "cat10": 10,
            "dog": 6,
            "linked": 2,
        }

    def test_all_endings_of_the_builder_of_datasets_but_those_not_decoded(self, tmp_path):
        for ending in ImageFolder.EXTENSIONS:
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / f"x{ending}").write_bytes(b"?")
        content = walk_folder(tmp_path)
        assert {os.path.splitext(path)[1] for path in content.strays + content.unread} <= {
            *(".eps", ".ps", ".bufr", ".grib", ".wmf", ".emf", ".h5", ".hdf"),
        }
        assert len(content.images["a"]) > 40

    def test_names_that_are_not_utf8(self, folder, load):
        with open(os.fsencode(folder / "dog") + b"/\xff.png", "wb"):
            pass
        with pytest.raises(BadDataError, match=r"not UTF-8.*udcff\.png"):
            load(train_dir=str(folder))

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ({}, "no images"),
            ({"a": 3}, 'of one class, "a"'),
            ({"": 3}, "3 images but no folders of classes"),
        ],
    )
    def test_nothing_to_learn(self, tmp_path, counts, message, load, make_folder):
        tmp_path.joinpath("data").mkdir()
        with pytest.raises(BadDataError, match=message):
            load(train_dir=str(make_folder(tmp_path / "data", counts)))

    @pytest.mark.parametrize("names", [("café", "cafe\u0301"), ("cat", "cat "), (" cat", "cat")])
    def test_names_that_look_the_same(self, folder, tmp_path, load, make_folder, rows_of, names):
        # Alone, such a name is normalized, and is the same in all splits.
        other = str(make_folder(tmp_path / "validation", {names[1]: 1, "dog": 1}))
        make_folder(folder, {names[0]: 2})
        dataset = load(train_dir=str(folder), validation_dir=other, allow_missing_classes=True)
        clean = unicodedata.normalize("NFC", names[0]).strip()
        assert clean in dataset["train"].features["label"].names
        assert sorted(rows_of(dataset["validation"])) == sorted([("0.png", clean), ("0.png", "dog")])
        make_folder(folder, {names[1]: 2})
        with pytest.raises(BadDataError, match=f'"{clean}" of train is spelled in two ways') as error:
            load(train_dir=str(folder))
        assert all(ascii(name) in str(error.value) for name in names)

    def test_no_folder(self, tmp_path, load):
        with pytest.raises(ValueError, match=r"--train_dir .*nowhere is not a folder"):
            load(train_dir=str(tmp_path / "nowhere"))

    def test_a_label_that_train_does_not_have(self, folder, tmp_path, load, make_folder):
        test = make_folder(tmp_path / "test", {"dog": 1, "zebra": 1})
        with pytest.raises(BadDataError, match="test split has labels that train does not have: zebra"):
            load(train_dir=str(folder), test_dir=str(test))

    def test_classes_without_validation(self, folder, tmp_path, check_form, load, make_folder, rows_of):
        validation = str(make_folder(tmp_path / "validation", {"dog": 1}))
        with pytest.raises(BadDataError, match=r"2 classes.*: cat2, cat10\. .*--allow_missing_classes"):
            load(train_dir=str(folder), validation_dir=validation)
        dataset = load(train_dir=str(folder), validation_dir=validation, allow_missing_classes=True)
        check_form(dataset)
        assert rows_of(dataset["validation"]) == [("0.png", "dog")]

    def test_a_class_with_one_image_is_trained_on(self, folder, load, make_folder, rows_of):
        make_folder(folder, {"rare": 1})
        with pytest.raises(BadDataError, match="1 classes have no images for validation: rare"):
            load(train_dir=str(folder))
        dataset = load(train_dir=str(folder), allow_missing_classes=True)
        assert ("0.png", "rare") in rows_of(dataset["train"])

    def test_no_class_can_be_held_out(self, tmp_path, load, make_folder):
        make_folder(tmp_path, {"a": 1, "b": 1})
        with pytest.raises(BadDataError, match="--train_val_split 0"):
            load(train_dir=str(tmp_path), allow_missing_classes=True)
        assert list(load(train_dir=str(tmp_path), train_val_split=0)) == ["train"]


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    formats = [name for name in decode.known_formats() if name != "HEIF"]
    for module in (decode, folders):
        monkeypatch.setattr(module, "known_formats", lambda: formats)
    folders._image_endings.cache_clear()
    yield
    folders._image_endings.cache_clear()


class TestUnreadFiles:
    """Files of classes that may be images stop a training, so that no class vanishes."""

    def _file(self, image_format):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, image_format)
        return buffer.getvalue()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.heic", HEIC, "cannot be read. It is HEIC: install pillow-heif .*convert it to JPEG"),
            ("a.HEIF", b"", "cannot be read. It is HEIC: install pillow-heif"),
            ("IMG_0001", HEIC, "cannot be read. It is HEIC"),
            ("a.txt", HEIC, "cannot be read. It is HEIC"),
            ("IMG_0001", "JPEG", r"is an image of format JPEG: give it the ending \.jpg"),
            ("a.txt", "PNG", r"is an image of format PNG: give it the ending \.png"),
            ("a.json", "WEBP", r"is an image of format WEBP: give it the ending \.webp"),
            ("a.jpg.download", "JPEG", "is an image of format JPEG"),
            ("IMG_0001", b"?", "has no known ending: convert it to JPEG or PNG if it is an image, else remove it"),
            ("a.cr2", b"?", "has no known ending"),
            ("a.jxl", b"\xff\x0a", "has no known ending"),
            ("a.svg", b"<svg/>", "has the ending of an image that cannot be read: convert it to JPEG or PNG"),
            ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0", "has the ending of an image that cannot be read"),
        ],
    )
    @pytest.mark.parametrize("is_whole_class", [False, True])
    def test_stop(self, folder, tmp_path, load, without_heif, name, content, message, is_whole_class):
        path = folder / ("new" if is_whole_class else "dog") / "deep" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(self._file(content) if isinstance(content, str) else content)
        with pytest.raises(BadDataError, match=rf"{name} {message}") as error:
            load(train_dir=str(folder))
        assert ("new holds no image that can be read" in str(error.value)) == is_whole_class
        assert "--skip_bad_images" in str(error.value)
        dataset = load(train_dir=str(folder), skip_bad_images=True)
        assert dataset["train"].features["label"].names == ["cat2", "cat10", "dog"]
        found = ignored_files(DataArguments(train_dir=str(folder)))
        assert found["unread_file"] == [str(path)]
        assert found["empty_class"] == ([str(folder / "new")] if is_whole_class else [])

    @pytest.mark.parametrize(
        "name", ["a.txt", "a.json", "a.csv", "a.xml", "a.yaml", "a.mov", "a.AAE", "a.xmp", "a.zip", "a.py", "a.pdf"]
    )
    def test_other_files_are_passed_over(self, folder, load, name):
        (folder / "dog" / name).write_bytes(b"BM or anything else")
        assert load(train_dir=str(folder))
        assert ignored_files(DataArguments(train_dir=str(folder)))["stray_file"] == [str(folder / "dog" / name)]

    def test_the_cause_is_named_before_what_follows_from_it(self, tmp_path, load, make_folder, without_heif):
        """A class that is missing from one split, or the last but one class."""
        for split in ("train", "validation"):
            make_folder(tmp_path / split, {"a": 3, "b": 3})
        (tmp_path / "validation" / "c").mkdir()
        (tmp_path / "validation" / "c" / "0.heic").write_bytes(HEIC)
        with pytest.raises(BadDataError, match=r"c/0\.heic cannot be read\. It is HEIC"):
            load(train_dir=str(tmp_path))
        assert load(train_dir=str(tmp_path), skip_bad_images=True)
        make_folder(tmp_path / "validation", {"d": 1})
        (tmp_path / "train" / "d").mkdir()
        (tmp_path / "train" / "d" / "0.heic").write_bytes(HEIC)
        with pytest.raises(BadDataError, match=r"d/0\.heic cannot be read\. It is HEIC"):
            load(train_dir=str(tmp_path), skip_bad_images=True)
        for name in ("x", "y"):
            (tmp_path / "two" / name).mkdir(parents=True)
            (tmp_path / "two" / name / "0.heic").write_bytes(HEIC)
        with pytest.raises(BadDataError, match=r"y/0\.heic cannot be read\. It is HEIC"):
            load(train_dir=str(tmp_path / "two"), skip_bad_images=True)

    def test_of_unlabeled_images(self, folder, tmp_path, without_heif):
        for place in ("loose.heic", "dog/a.heic"):
            (folder / place).write_bytes(HEIC)
        (folder / "notes.txt").write_bytes(b"?")
        with pytest.raises(BadDataError, match=r"2:\n.*loose\.heic cannot be read\. It is HEIC.*\n.*dog/a\.heic"):
            read_unlabeled(folder)
        assert len(read_unlabeled(folder, skip_bad_images=True)) == 20

    @pytest.mark.parametrize(("ending", "package"), [(".heic", "pillow_heif"), (".avif", None)])
    def test_a_class_of_other_formats_is_read(self, folder, load, ending, package):
        if package is not None:
            pytest.importorskip(package)
        elif "AVIF" not in decode.known_formats() or not features.check("avif"):
            pytest.skip("Pillow has no AVIF")
        decode.known_formats()  # registers HEIC
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, 16:] = (200, 40, 90)
        (folder / "new").mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(folder / "new" / f"{number}{ending}", quality=95)
        dataset = load(train_dir=str(folder))
        assert dataset["train"].features["label"].names == ["cat2", "cat10", "dog", "new"]
        image = next(row["image"] for row in dataset["train"] if row["image"]["path"].endswith(ending))
        difference = np.abs(np.asarray(decode.decode_image(image)).astype(int) - pixels)
        assert difference[:, [*range(12), *range(20, 32)]].max() <= 10


class TestUnlabeled:
    def _names(self, folder):
        return [os.path.relpath(row["image"]["path"], folder) for row in read_unlabeled(folder)]

    def test_images_at_any_depth_in_an_order_of_their_own(self, tmp_path, make_image):
        places = ["10.png", "9.jpg", "b/2.png", "a/deep/er/1.png", "a/0.webp", "train/3.png", "test/4.png"]
        for place in reversed(places):
            make_image(tmp_path / place)
        assert self._names(tmp_path) == [
            "9.jpg",
            "10.png",
            *("a/0.webp", "a/deep/er/1.png", "b/2.png", "test/4.png", "train/3.png"),
        ]

    def test_the_form(self, folder):
        split = read_unlabeled(folder)
        assert len(split) == 20 and set(split["label"]) == {-100}
        assert split.features["image"] == IMAGE
        assert all(os.path.isabs(row["image"]["path"]) and row["image"]["bytes"] is None for row in split)
        assert (labels_of(split) == -100).all()

    def test_what_is_no_image_or_hidden_is_passed_over(self, tmp_path):
        for place in ("a.png", "notes.txt", ".b.png", ".trash/c.png", "d/__MACOSX/e.png", "d/labels.csv"):
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        assert self._names(tmp_path) == ["a.png"]

    @pytest.mark.parametrize("is_hidden", [False, True])
    def test_no_images(self, tmp_path, is_hidden, make_image):
        (tmp_path / "empty").mkdir()
        if is_hidden:
            make_image(tmp_path / "empty" / ".hidden" / "0.png")
        with pytest.raises(BadDataError, match=r"empty holds no images\."):
            read_unlabeled(tmp_path / "empty")

    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("")])
    def test_no_folder(self, tmp_path, make):
        make(tmp_path / "nothing")
        with pytest.raises(ValueError, match="nothing is not a folder"):
            read_unlabeled(tmp_path / "nothing")

    @pytest.mark.parametrize("place", [".", "a"])
    def test_names_that_are_not_utf8(self, tmp_path, place):
        os.makedirs(os.path.join(os.fsencode(tmp_path), place.encode()), exist_ok=True)
        with open(os.path.join(os.fsencode(tmp_path), place.encode(), b"\xff.png"), "wb"):
            pass
        with pytest.raises(BadDataError, match="not UTF-8, rename it"):
            read_unlabeled(tmp_path)


def test_natural_order():
    names = ["b", "a10", "a9", "A1", "10", "9", "009", "a"]
    assert sorted(names, key=natural_key) == ["009", "9", "10", "a", "A1", "a9", "a10", "b"]
