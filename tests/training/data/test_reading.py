"""Data from folders, files, copies of Hub data sets and published layouts, in one form; or an error with the mend."""

import json
import os
import random
import shutil
import socket

import datasets
import pytest
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image
from transformers import HfArgumentParser

from training.data.layouts import LAYOUTS
from training.data.packaged import catalog as packaged
from training.data.reading import (
    BOX,
    IMAGE,
    BadDataError,
    DataArguments,
    fingerprint,
    ignored_files,
    labels_of,
    load_images,
    natural_key,
    read_unlabeled,
    walk_folder,
)
from training.data.tiny import make_published


def _image(path, seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(seed if seed is not None else str(path)).randbytes(8 * 8 * 3)
    Image.frombytes("RGB", (8, 8), pixels).save(path)


def _folder(root, counts):
    """A folder of class folders, with as many images each."""
    for name, count in counts.items():
        for number in range(count):
            _image(root / name / f"{number}.png")
    return root


def _load(seed=0, **kwargs):
    return load_images(DataArguments(**kwargs), seed)


def _rows(split):
    """File name and label name of each image."""
    names = split.features["label"].names
    return [(os.path.basename(row["image"]["path"]), names[row["label"]]) for row in split]


def _check_form(dataset):
    assert list(dataset) == [name for name in ("train", "validation", "test") if name in dataset]
    names = dataset["train"].features["label"].names
    for split in dataset.values():
        assert split.features["image"] == IMAGE
        assert split.features["label"] == datasets.ClassLabel(names=names)
        for row in split:
            assert set(row["image"]) == {"path", "bytes"}
            assert row["image"]["bytes"] is not None or os.path.isabs(row["image"]["path"])


@pytest.fixture
def folder(tmp_path):
    return _folder(tmp_path / "train", {"cat10": 10, "cat2": 4, "dog": 6})


@pytest.fixture
def faces():
    """Images as bytes: 3 classes of 4, as on the Hub."""
    data = [random.Random(number).randbytes(192) for number in range(12)]
    images = [Image.frombytes("RGB", (8, 8), pixels) for pixels in data]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [number % 3 for number in range(12)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["c", "a", "b"])}),
    )


class TestArguments:
    def test_none_or_two_sources(self):
        for kwargs in ({}, {"train_dir": "a", "dataset_name": "b"}):
            with pytest.raises(ValueError, match=r"exactly one way.*--dataset_name.*--train_dir.*--train_file"):
                DataArguments(**kwargs)

    @pytest.mark.parametrize(
        "option", ["validation_file", "test_file", "dataset_dir", "dataset_revision", "dataset_config_name"]
    )
    def test_options_of_another_source(self, option):
        with pytest.raises(ValueError, match=rf"--{option} goes with .*, not with --train_dir"):
            DataArguments(train_dir="a", **{option: "b"})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("train_val_split", 1.0), ("train_val_split", -0.1), ("max_train_samples", 0), ("max_pixels", 0)],
    )
    def test_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=f"--{name} must be at least"):
            DataArguments(train_dir="a", **{name: value})

    def test_two_ways_to_take_fewer(self):
        with pytest.raises(ValueError, match="not both"):
            DataArguments(train_dir="a", max_train_samples=3, train_samples_per_class=1)

    def test_are_parsed_under_their_names(self):
        words = ["--train_dir", "a", "--max_train_samples", "5", "--skip_bad_images", "--image_column_name", "img"]
        (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(words)
        assert args == DataArguments(train_dir="a", max_train_samples=5, skip_bad_images=True, image_column_name="img")


class TestFolders:
    def test_classes_are_in_natural_order_and_each_has_its_share_held_out(self, folder):
        dataset = _load(train_dir=str(folder), train_val_split=0.25)
        _check_form(dataset)
        assert dataset["train"].features["label"].names == ["cat2", "cat10", "dog"]
        assert labels_of(dataset["validation"]).bincount().tolist() == [1, 3, 2]
        paths = [row["image"]["path"] for split in dataset.values() for row in split]
        assert sorted(paths) == sorted(str(path) for path in folder.rglob("*.png"))
        for split in dataset.values():
            assert all(
                row["image"]["path"].split(os.sep)[-2] == name
                for row, (_, name) in zip(split, _rows(split), strict=True)
            )

    def test_agrees_with_the_builder_of_datasets(self, folder, tmp_path):
        ours = _load(train_dir=str(folder), train_val_split=0)["train"]
        theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
        theirs = theirs.cast_column("image", IMAGE)
        assert sorted(_rows(ours)) == sorted(_rows(theirs))

    @pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
    def test_one_folder_with_the_splits_in_it(self, tmp_path, validation):
        for name, count in (("train", 3), (validation, 2), ("test", 1)):
            _folder(tmp_path / name, {"a": count, "b": count})
        dataset = _load(train_dir=str(tmp_path))
        _check_form(dataset)
        assert {name: len(split) for name, split in dataset.items()} == {"train": 6, "validation": 4, "test": 2}

    def test_test_images_are_never_held_out(self, folder, tmp_path):
        test = _folder(tmp_path / "test", {"cat2": 3, "dog": 2})
        dataset = _load(train_dir=str(folder), test_dir=str(test))
        assert len(dataset["test"]) == 5
        assert all(str(test) in row["image"]["path"] for row in dataset["test"])
        assert not any(str(test) in row["image"]["path"] for row in dataset["validation"])

    def test_a_class_called_train(self, tmp_path):
        _folder(tmp_path, {"train": 3, "bus": 3, "test": 3})
        dataset = _load(train_dir=str(tmp_path))
        assert dataset["train"].features["label"].names == ["bus", "test", "train"]

    def test_splits_are_never_taken_for_classes(self, tmp_path):
        for name in ("train", "test"):
            _image(tmp_path / "flat" / name / "1.png")
            _folder(tmp_path / "loose" / name, {"a": 2, "b": 2})
        with pytest.raises(BadDataError, match="nothing but test, train, and no folders of classes"):
            _load(train_dir=str(tmp_path / "flat"))
        _image(tmp_path / "loose" / "train" / "1.png")
        assert list(_load(train_dir=str(tmp_path / "loose"))) == ["train", "validation", "test"]
        _image(tmp_path / "loose" / "bus" / "1.png")
        with pytest.raises(ValueError, match=r"folder train with folders in it, beside folders of images \(bus\)"):
            _load(train_dir=str(tmp_path / "loose"))

    def test_a_test_folder_without_classes_is_left_out(self, tmp_path, caplog):
        _folder(tmp_path / "train", {"a": 3, "b": 3})
        _image(tmp_path / "test" / "1.png")
        assert list(_load(train_dir=str(tmp_path))) == ["train", "validation"]
        assert "no labels: left out" in caplog.text

    def test_a_split_named_twice(self, tmp_path):
        for name in ("train", "val"):
            _folder(tmp_path / name, {"a": 3, "b": 3})
        with pytest.raises(ValueError, match="are both for validation"):
            _load(train_dir=str(tmp_path), validation_dir=str(tmp_path / "val"))
        _folder(tmp_path / "valid", {"a": 3, "b": 3})
        with pytest.raises(ValueError, match=r"val and .*valid are both for validation"):
            _load(train_dir=str(tmp_path))

    def test_what_is_no_image_of_a_class(self, folder):
        for name in (".DS_Store", "dog/Thumbs.db", "dog/._0.png", "dog/notes.txt", "loose.png", "dog/.hidden/a.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"?")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "._x.jpg").write_bytes(b"?")
        (folder / "empty").mkdir()
        os.mkfifo(folder / "dog" / "pipe.png")
        dataset = _load(train_dir=str(folder), train_val_split=0)
        assert len(dataset["train"]) == 20
        found = ignored_files(DataArguments(train_dir=str(folder)))
        relative = {kind: sorted(os.path.relpath(path, folder) for path in paths) for kind, paths in found.items()}
        assert relative == {
            "hidden": [".DS_Store", "__MACOSX", "dog/._0.png", "dog/.hidden", "dog/Thumbs.db"],
            "stray": ["dog/notes.txt", "dog/pipe.png", "empty", "loose.png"],
        }

    def test_what_lies_beside_the_folders_of_splits(self, tmp_path, caplog):
        _folder(tmp_path / "train", {"a": 3, "b": 3})
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "unlabeled").mkdir()
        found = ignored_files(DataArguments(train_dir=str(tmp_path)))
        assert found == {"hidden": [str(tmp_path / "__MACOSX")], "stray": [str(tmp_path / "unlabeled")]}
        assert "unlabeled" in caplog.text

    def test_nested_images_are_of_the_outermost_folder(self, folder):
        _image(folder / "dog" / "poodle" / "toy" / "x.jpg")
        assert ("x.jpg", "dog") in _rows(_load(train_dir=str(folder), train_val_split=0)["train"])

    def test_links(self, folder, tmp_path):
        (folder / "dog" / "again").symlink_to(folder, target_is_directory=True)
        (folder / "linked").symlink_to(_folder(tmp_path / "else", {"a": 2}) / "a", target_is_directory=True)
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
        assert {os.path.splitext(path)[1] for path in content.strays} <= {
            *(".eps", ".ps", ".bufr", ".grib", ".wmf", ".emf", ".h5", ".hdf"),
        }
        assert len(content.images["a"]) > 40

    def test_names_that_are_not_utf8(self, folder):
        with open(os.fsencode(folder / "dog") + b"/\xff.png", "wb"):
            pass
        with pytest.raises(BadDataError, match=r"not UTF-8.*udcff\.png"):
            _load(train_dir=str(folder))

    @pytest.mark.parametrize(
        ("counts", "message"),
        [({}, "no images"), ({"a": 3}, 'of one class, "a"'), ({"": 3}, "3 images beside.*folder for each class")],
    )
    def test_nothing_to_learn(self, tmp_path, counts, message):
        tmp_path.joinpath("data").mkdir()
        with pytest.raises(BadDataError, match=message):
            _load(train_dir=str(_folder(tmp_path / "data", counts)))

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"--train_dir .*nowhere is not a folder"):
            _load(train_dir=str(tmp_path / "nowhere"))

    def test_a_label_that_train_does_not_have(self, folder, tmp_path):
        test = _folder(tmp_path / "test", {"dog": 1, "zebra": 1})
        with pytest.raises(BadDataError, match="test split has labels that train does not have: zebra"):
            _load(train_dir=str(folder), test_dir=str(test))

    def test_classes_without_validation(self, folder, tmp_path):
        validation = str(_folder(tmp_path / "validation", {"dog": 1}))
        with pytest.raises(BadDataError, match=r"2 classes.*: cat2, cat10\. .*--allow_missing_classes"):
            _load(train_dir=str(folder), validation_dir=validation)
        dataset = _load(train_dir=str(folder), validation_dir=validation, allow_missing_classes=True)
        _check_form(dataset)
        assert _rows(dataset["validation"]) == [("0.png", "dog")]

    def test_a_class_with_one_image_is_trained_on(self, folder):
        _folder(folder, {"rare": 1})
        with pytest.raises(BadDataError, match="1 classes have no images for validation: rare"):
            _load(train_dir=str(folder))
        dataset = _load(train_dir=str(folder), allow_missing_classes=True)
        assert ("0.png", "rare") in _rows(dataset["train"])

    def test_no_class_can_be_held_out(self, tmp_path):
        _folder(tmp_path, {"a": 1, "b": 1})
        with pytest.raises(BadDataError, match="--train_val_split 0"):
            _load(train_dir=str(tmp_path), allow_missing_classes=True)
        assert list(_load(train_dir=str(tmp_path), train_val_split=0)) == ["train"]


class TestFewer:
    @pytest.fixture
    def counts(self, folder, tmp_path):
        test = str(_folder(tmp_path / "test", {"cat2": 5, "cat10": 5, "dog": 5}))

        def counts(seed=0, **kwargs):
            dataset = _load(seed, train_dir=str(folder), test_dir=test, train_val_split=0.5, **kwargs)
            return {name: labels_of(split).bincount(minlength=3).tolist() for name, split in dataset.items()}

        return counts

    def test_all_classes_are_covered(self, counts):
        found = counts(max_train_samples=3, max_eval_samples=4, max_test_samples=3)
        assert found["train"] == found["test"] == [1, 1, 1]
        assert sum(found["validation"]) == 4 and min(found["validation"]) == 1

    def test_of_each_class(self, counts):
        assert counts(train_samples_per_class=2)["train"] == [2, 2, 2]
        with pytest.raises(BadDataError, match='Class "cat2" has 2 training images: too few'):
            counts(train_samples_per_class=3)

    @pytest.mark.parametrize("option", ["max_train_samples", "max_eval_samples"])
    def test_too_few_for_all_classes(self, counts, option):
        with pytest.raises(ValueError, match=f"--{option} 2 can't cover the 3 classes"):
            counts(**{option: 2})
        found = counts(**{option: 2}, allow_missing_classes=True)
        assert sum(found["train" if "train" in option else "validation"]) == 2

    def test_the_seed_decides(self, folder):
        def names(seed):
            dataset = _load(seed, train_dir=str(folder), train_val_split=0.5, max_train_samples=6)
            return [_rows(split) for split in dataset.values()]

        assert names(1) == names(1) != names(2)


class TestFiles:
    def _write(self, path, rows):
        """Rows of image and label as CSV, TSV or JSON Lines."""
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jsonl":
            lines = [json.dumps({"image": image, "label": label}) for image, label in rows]
        else:
            separator = "," if path.suffix == ".csv" else "\t"
            lines = [separator.join(map(str, row)) for row in [("image", "label"), *rows]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        return str(path)

    @pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
    def test_paths_are_relative_to_the_file(self, folder, tmp_path, ending, monkeypatch):
        rows = [(f"../train/{name}/{number}.png", name) for name in ("dog", "cat2") for number in range(3)]
        rows.append((str(folder / "dog" / "5.png"), "dog"))
        monkeypatch.chdir("/")
        file = self._write(tmp_path / "lists" / f"train.{ending}", rows)
        dataset = _load(train_file=file, validation_file=file)
        _check_form(dataset)
        for split in dataset.values():
            assert [row["image"]["path"] for row in split] == [
                os.path.normpath(tmp_path / "lists" / path) for path, _ in rows
            ]
            assert [name for _, name in _rows(split)] == [name for _, name in rows]

    def test_labels_that_look_like_numbers_stay_as_written(self, folder, tmp_path):
        labels = ["10", "9", "007", "1e3"]
        rows = [(f"train/cat10/{number}.png", labels[number % 4]) for number in range(8)]
        dataset = _load(train_file=self._write(tmp_path / "a.csv", rows), train_val_split=0)
        assert dataset["train"].features["label"].names == ["1e3", "007", "9", "10"]
        assert [name for _, name in _rows(dataset["train"])] == [label for _, label in rows]

    @pytest.mark.parametrize("labels", [[10, 9], ["10", "9"], [10.0, 9.0]])
    def test_whole_numbers_of_json_are_classes(self, folder, tmp_path, labels):
        rows = [(f"train/cat10/{number}.png", labels[number % 2]) for number in range(8)]
        dataset = _load(train_file=self._write(tmp_path / "a.jsonl", rows))
        assert dataset["train"].features["label"].names == ["9", "10"]

    def test_missing_files_are_named(self, folder, tmp_path):
        rows = [("train/dog/0.png", "dog"), ("train/dog/99.png", "dog"), ("0.png", "cat")]
        with pytest.raises(BadDataError, match=rf"2 of the 3 images .*{tmp_path}/train/dog/99.png, {tmp_path}/0.png"):
            _load(train_file=self._write(tmp_path / "a.csv", rows))

    def test_wrong_columns_are_offered_nearest_first(self, folder, tmp_path):
        file = tmp_path / "a.csv"
        file.write_text("id,species,img_path\n1,dog,train/dog/0.png\n")
        with pytest.raises(ValueError, match='has no column "image": set --image_column_name to img_path, '):
            _load(train_file=str(file))
        with pytest.raises(ValueError, match='no column "label"'):
            _load(train_file=str(file), image_column_name="img_path")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "image,label\n", "no rows"),
            ("a.csv", "image,label\ntrain/dog/0.png,dog\ntrain/dog/1.png,\n", "Line 3 .* no label"),
            ("a.csv", "image,label\ntrain/dog/0.png\n", "Line 2 .* no label"),
            ("a.csv", "image,label\n,dog\n", "Line 2 .* no path"),
            ("a.csv", "image,label\na, b.png,dog\n", "Line 2 .* more cells"),
            ("a.jsonl", '{"image": "a"\n', "Line 1 .* not JSON"),
            ("a.jsonl", '["a", "b"]\n', "Line 1 .* not a JSON object"),
            ("a.jsonl", '{"image": "train/dog/0.png", "label": ["a", "b"]}\n', r"line 1 .* is \['a', 'b'\]"),
            ("a.jsonl", '{"image": "train/dog/0.png", "label": 0.5}\n', "line 1 .* is 0.5"),
            ("a.txt", "", r"must be a \.csv, \.tsv, \.jsonl, \.ndjson file"),
        ],
    )
    def test_faults(self, folder, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            _load(train_file=str(tmp_path / name))

    def test_other_encodings(self, folder, tmp_path):
        (tmp_path / "a.csv").write_bytes("image,label\ntrain/dog/0.png,Bär\n".encode("latin-1"))
        with pytest.raises(BadDataError, match="can't be read"):
            _load(train_file=str(tmp_path / "a.csv"))

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="There is no file"):
            _load(train_file=str(tmp_path / "a.csv"))


class TestCopiesOfHubDataSets:
    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise AssertionError("a connection was tried")

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        monkeypatch.setattr(socket.socket, "connect", refuse)

    @pytest.mark.parametrize("kind", ["parquet", "saved", "saved_split"])
    def test_kinds(self, faces, tmp_path, kind):
        if kind == "parquet":
            faces.to_parquet(tmp_path / "copy" / "train.parquet")
        elif kind == "saved":
            datasets.DatasetDict({"train": faces, "test": faces}).save_to_disk(tmp_path / "copy")
        else:
            faces.save_to_disk(tmp_path / "copy")
        dataset = _load(dataset_name=str(tmp_path / "copy"), train_val_split=0.25)
        _check_form(dataset)
        # Published names keep their order.
        assert dataset["train"].features["label"].names == ["c", "a", "b"]
        rows = sorted(
            (row["image"]["bytes"], row["label"]) for name in ("train", "validation") for row in dataset[name]
        )
        assert rows == sorted((row["image"]["bytes"], row["label"]) for row in faces.cast_column("image", IMAGE))
        assert (len(dataset["test"]) == 12) if kind == "saved" else ("test" not in dataset)

    def _saved(self, tmp_path, **splits):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "copy")
        return str(tmp_path / "copy")

    def _labeled(self, faces, labels, feature):
        return faces.remove_columns("label").add_column("label", labels, feature=feature)

    def test_wrong_columns_are_offered(self, faces, tmp_path):
        path = self._saved(tmp_path, train=faces.rename_columns({"image": "img", "label": "fine_label"}))
        with pytest.raises(ValueError, match='has no column "image": set --image_column_name to img'):
            _load(dataset_name=path)
        with pytest.raises(ValueError, match='has no column "label": set --label_column_name to fine_label'):
            _load(dataset_name=path, image_column_name="img")
        with pytest.raises(ValueError, match=r'"fine_label" .* holds no images.*Images are in img'):
            _load(dataset_name=path, image_column_name="fine_label", label_column_name="img")
        _check_form(_load(dataset_name=path, image_column_name="img", label_column_name="fine_label"))

    def test_a_chosen_column_beside_one_of_the_usual_name(self, faces, tmp_path):
        path = self._saved(tmp_path, train=faces.add_column("fine", [n % 2 for n in range(12)]))
        dataset = _load(dataset_name=path, label_column_name="fine", train_val_split=0)
        assert dataset["train"].column_names == ["image", "label"]
        assert labels_of(dataset["train"]).tolist() == [0, 1] * 6

    @pytest.mark.parametrize(
        ("feature", "labels", "names"),
        [
            (datasets.Value("int32"), [7, 30, 200], ["7", "30", "200"]),
            (datasets.Value("string"), ["x9", "x10", "X1"], ["X1", "x9", "x10"]),
            (datasets.Value("bool"), [True, False, True], ["False", "True"]),
            (datasets.Value("float32"), [1.0, 0.0, 10.0], ["0", "1", "10"]),
        ],
    )
    def test_kinds_of_labels(self, faces, tmp_path, feature, labels, names):
        path = self._saved(tmp_path, train=self._labeled(faces, labels * 4, feature))
        dataset = _load(dataset_name=path, train_val_split=0)
        assert dataset["train"].features["label"].names == names
        found = [names[label] for label in labels_of(dataset["train"]).tolist()]
        assert found == [str(int(label) if isinstance(label, float) else label) for label in labels * 4]

    def test_binary_images(self, faces, tmp_path):
        data = [row["image"]["bytes"] for row in faces.cast_column("image", IMAGE)]
        binary = faces.remove_columns("image").add_column("image", data, feature=datasets.Value("binary"))
        dataset = _load(dataset_name=self._saved(tmp_path, train=binary), train_val_split=0)
        _check_form(dataset)
        assert [row["image"]["bytes"] for row in dataset["train"]] == data

    @pytest.mark.parametrize(
        ("feature", "none"),
        [
            (datasets.ClassLabel(names=["c", "a", "b"]), -1),
            (datasets.Value("int64"), -1),
            (datasets.Value("string"), None),
        ],
    )
    def test_a_test_split_without_labels_is_left_out(self, faces, tmp_path, feature, none, caplog):
        labels = [str(n % 3) if feature == datasets.Value("string") else n % 3 for n in range(12)]
        train, test = (self._labeled(faces, given, feature) for given in (labels, [none] * 12))
        dataset = _load(dataset_name=self._saved(tmp_path, train=train, test=test))
        assert list(dataset) == ["train", "validation"]
        assert "test split has no labels: left out" in caplog.text
        with pytest.raises(BadDataError, match="1 of the 12 images of train have no label, the first in row 0"):
            _load(dataset_name=self._saved(tmp_path, train=self._labeled(faces, [none, *labels[1:]], feature)))

    def test_names_count_and_not_numbers(self, faces, tmp_path):
        other = self._labeled(faces, [0, 1, 2] * 4, datasets.ClassLabel(names=["a", "b", "c"]))
        dataset = _load(dataset_name=self._saved(tmp_path, train=faces, validation=other))
        names = dataset["validation"].features["label"].int2str(labels_of(dataset["validation"]))
        assert names == ["a", "b", "c"] * 4

    def test_a_name_that_no_training_image_has(self, faces, tmp_path):
        train = faces.filter(lambda row: row["label"] != 2)
        dataset = _load(dataset_name=self._saved(tmp_path, train=train))
        assert dataset["train"].features["label"].names == ["c", "a", "b"]
        with pytest.raises(BadDataError, match="test split has labels that train does not have: b"):
            _load(dataset_name=self._saved(tmp_path, train=train, test=faces))

    def test_splits_of_other_names(self, faces, tmp_path, caplog):
        assert len(_load(dataset_name=self._saved(tmp_path, full=faces), train_val_split=0)["train"]) == 12
        dataset = _load(dataset_name=self._saved(tmp_path, train=faces, dev=faces, extra=faces))
        assert list(dataset) == ["train", "validation"]
        assert "extra" in caplog.text
        with pytest.raises(BadDataError, match="no training split, only test"):
            _load(dataset_name=self._saved(tmp_path, test=faces))
        with pytest.raises(BadDataError, match="more than one split for validation: valid, dev"):
            _load(dataset_name=self._saved(tmp_path, train=faces, valid=faces, dev=faces))

    @pytest.mark.skipif(datasets.__version__ < "5", reason="save_to_disk fails with an empty split")
    def test_an_empty_split(self, faces, tmp_path):
        with pytest.raises(BadDataError, match="one of its splits has no images"):
            _load(dataset_name=self._saved(tmp_path, train=faces, test=faces.select([])))

    def test_boxes_are_kept_where_they_are_asked_for(self, faces, tmp_path):
        boxed = faces.add_column("box", [[0.0, 0.0, 4.0, 4.0]] * 12, feature=BOX)
        path = self._saved(tmp_path, train=boxed)
        assert "box" not in _load(dataset_name=path)["train"].column_names
        for split in _load(dataset_name=path, crop_to_boxes=True).values():
            assert split[0]["box"] == [0.0, 0.0, 4.0, 4.0]
        with pytest.raises(ValueError, match="--crop_to_boxes needs a box"):
            _load(dataset_name=self._saved(tmp_path, train=faces), crop_to_boxes=True)


class TestFormats:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_published_layouts(self, name, tmp_path):
        made = make_published(name, tmp_path, num_classes=3, images_per_class=9)
        dataset = _load(dataset_format=name, dataset_dir=str(made))
        _check_form(dataset)
        published = LAYOUTS[name](made)
        assert {"train", "validation", "test"} == set(dataset)
        assert _rows(dataset["test"]) == _rows(published["test"])
        both = [row for split in ("train", "validation") for row in _rows(dataset[split])]
        assert sorted(both) == sorted(
            row for split in ("train", "validation") if split in published for row in _rows(published[split])
        )

    def test_packaged(self, faces, monkeypatch):
        calls = []

        def load(*args):
            calls.append(args)
            return datasets.DatasetDict({"train": faces.cast_column("image", IMAGE)})

        name = next(iter(packaged.PACKAGED))
        monkeypatch.setattr(packaged, "load", load)
        dataset = _load(3, dataset_format=name, dataset_config_name="full")
        _check_form(dataset)
        assert calls == [(name, "full", 3)]

    def test_an_empty_split(self, faces, monkeypatch):
        train = faces.cast_column("image", IMAGE)
        splits = datasets.DatasetDict({"train": train, "test": train.select([])})
        monkeypatch.setattr(packaged, "load", lambda *args: splits)
        with pytest.raises(BadDataError, match="The test split has no images"):
            _load(dataset_format=next(iter(packaged.PACKAGED)))

    def test_faults(self, tmp_path):
        with pytest.raises(ValueError, match="no --dataset_format cub: choose cub_200_2011, "):
            _load(dataset_format="cub")
        with pytest.raises(ValueError, match="needs --dataset_dir"):
            _load(dataset_format="cub_200_2011")
        with pytest.raises(ValueError, match="leave --dataset_config_name out"):
            _load(dataset_format="cub_200_2011", dataset_dir=str(tmp_path), dataset_config_name="x")
        with pytest.raises(ValueError, match="leave --dataset_dir out"):
            _load(dataset_format=next(iter(packaged.PACKAGED)), dataset_dir=str(tmp_path))


class TestUnlabeled:
    def _names(self, folder):
        return [os.path.relpath(row["image"]["path"], folder) for row in read_unlabeled(folder)]

    def test_images_at_any_depth_in_an_order_of_their_own(self, tmp_path):
        places = ["10.png", "9.jpg", "b/2.png", "a/deep/er/1.png", "a/0.webp", "train/3.png", "test/4.png"]
        for place in reversed(places):
            _image(tmp_path / place)
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

    @pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: _image(path / ".hidden" / "0.png")])
    def test_no_images(self, tmp_path, make):
        make(tmp_path / "empty")
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

    def test_the_fingerprint_is_of_them_too(self, folder, tmp_path):
        labeled = _load(train_dir=str(folder))
        others = _folder(tmp_path / "others", {"x": 3, "y": 1})
        both = datasets.DatasetDict(dict(labeled) | {"unlabeled": read_unlabeled(others)})
        before = fingerprint(both)
        assert before["splits"]["unlabeled"]["images"] == 4
        assert {name: before["splits"][name] for name in labeled} == fingerprint(labeled)["splits"]
        (others / "x" / "0.png").rename(others / "x" / "9.png")
        after = fingerprint(datasets.DatasetDict(dict(labeled) | {"unlabeled": read_unlabeled(others)}))
        assert len({fingerprint(labeled)["sha256"], before["sha256"], after["sha256"]}) == 3


class TestFingerprint:
    def _of(self, folder, **kwargs):
        return fingerprint(_load(train_dir=str(folder), **kwargs))

    def test_counts(self, folder):
        assert self._of(folder, train_val_split=0.5)["splits"] == {
            "train": {"images": 10, "classes": 3, "min_per_class": 2, "max_per_class": 5},
            "validation": {"images": 10, "classes": 3, "min_per_class": 2, "max_per_class": 5},
        }

    def test_place_and_order_do_not_matter(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "other" / "deep" / "place")
        assert self._of(copy) == self._of(folder)
        dataset = _load(train_dir=str(folder))
        shuffled = datasets.DatasetDict({name: split.shuffle(seed=1) for name, split in dataset.items()})
        assert fingerprint(shuffled) == fingerprint(dataset)

    @pytest.mark.parametrize("change", ["size", "name", "label", "split", "absent"])
    def test_changes_matter(self, folder, tmp_path, change):
        before = self._of(folder)
        image = folder / "dog" / "0.png"
        if change == "size":
            image.write_bytes(image.read_bytes() + b"0")
        elif change == "name":
            image.rename(folder / "dog" / "9.png")
        elif change == "label":
            image.rename(folder / "cat2" / "9.png")
        elif change == "absent":
            image.unlink()
        assert self._of(folder, train_val_split=0.3 if change == "split" else 0.15)["sha256"] != before["sha256"]

    def test_bytes_matter_where_the_data_set_holds_them(self, faces):
        split = faces.cast_column("image", IMAGE)
        other = split.map(lambda row: {"image": {"path": None, "bytes": row["image"]["bytes"] + b"0"}})
        digests = [fingerprint(datasets.DatasetDict({"train": data}))["sha256"] for data in (split, split, other)]
        assert digests[0] == digests[1] != digests[2]


def test_natural_order():
    names = ["b", "a10", "a9", "A1", "10", "9", "009", "a"]
    assert sorted(names, key=natural_key) == ["009", "9", "10", "a", "A1", "a9", "a10", "b"]


def test_labels_of(faces):
    assert torch.equal(labels_of(faces.cast_column("image", IMAGE).select([3, 1])), torch.tensor([0, 1]))


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    """Records and cards must tell them apart, also where they are read from elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice" / "pets").mkdir(parents=True)
    assert DataArguments(dataset_name="alice/pets").dataset_name == str((tmp_path / "alice" / "pets").resolve())
    assert DataArguments(dataset_name="alice/others").dataset_name == "alice/others"
