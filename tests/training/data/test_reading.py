"""Data from Hub data sets and published layouts in one form, smaller sets, or an error that says what to do."""

import json
import shutil
import socket

import datasets
import pytest

from modeling_rbi import UserError
from training.data.folders import natural_key
from training.data.form import BOX, IMAGE, BadDataError, labels_of
from training.data.layouts import LAYOUTS
from training.data.packaged import catalog
from training.data.tiny import make_published


class TestFewer:
    @pytest.fixture
    def counts(self, folder, tmp_path, load, make_folder):
        test = str(make_folder(tmp_path / "test", {"cat2": 5, "cat10": 5, "dog": 5}))

        def counts(seed=0, **kwargs):
            dataset = load(seed, train_dir=str(folder), test_dir=test, train_val_split=0.5, **kwargs)
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
        with pytest.raises(ValueError, match=f"--{option} 2 cannot cover the 3 classes"):
            counts(**{option: 2})
        found = counts(**{option: 2}, allow_missing_classes=True)
        assert sum(found["train" if "train" in option else "validation"]) == 2

    def test_the_seed_decides(self, folder, load, rows_of):
        def names(seed):
            dataset = load(seed, train_dir=str(folder), train_val_split=0.5, max_train_samples=6)
            return [rows_of(split) for split in dataset.values()]

        assert names(1) == names(1) != names(2)


class TestCopiesOfHubDataSets:
    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise AssertionError("a connection was tried")

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        monkeypatch.setattr(socket.socket, "connect", refuse)

    @pytest.mark.parametrize("kind", ["parquet", "saved", "saved_split"])
    def test_kinds(self, faces, tmp_path, kind, check_form, load):
        if kind == "parquet":
            faces.to_parquet(tmp_path / "copy" / "train.parquet")
        elif kind == "saved":
            datasets.DatasetDict({"train": faces, "test": faces}).save_to_disk(tmp_path / "copy")
        else:
            faces.save_to_disk(tmp_path / "copy")
        dataset = load(dataset_name=str(tmp_path / "copy"), train_val_split=0.25)
        check_form(dataset)
        # Published names keep their order.
        assert dataset["train"].features["label"].names == ["c", "a", "b"]
        rows = sorted(
            (row["image"]["bytes"], row["label"]) for name in ("train", "validation") for row in dataset[name]
        )
        assert rows == sorted((row["image"]["bytes"], row["label"]) for row in faces.cast_column("image", IMAGE))
        assert (len(dataset["test"]) == 12) if kind == "saved" else ("test" not in dataset)

    @pytest.mark.parametrize(
        ("names", "clean"),
        [
            (["caf\u00e9", "b", "a"], ["café", "b", "a"]),
            (["cafe\u0301", "b", "a"], ["café", "b", "a"]),
            (["\u1112\u1161\u11ab", "b", "a"], ["\ud55c", "b", "a"]),
            (["cat ", " b", "\ta\u00a0"], ["cat", "b", "a"]),
            (["a b", "B", "b"], ["a b", "B", "b"]),
        ],
    )
    @pytest.mark.parametrize("kind", ["names", "text"])
    def test_names_are_normalized(self, faces, tmp_path, load, check_form, names, clean, kind):
        numbers = [number % 3 for number in range(12)]
        if kind == "names":
            train = self._labeled(faces, numbers, datasets.ClassLabel(names=names))
        else:
            train = self._labeled(faces, [names[number] for number in numbers], datasets.Value("string"))
        # In another split, the same names may be spelled in another way.
        test = self._labeled(faces, numbers, datasets.ClassLabel(names=clean))
        dataset = load(dataset_name=self._saved(tmp_path, train=train, test=test), train_val_split=0)
        check_form(dataset)
        given = dataset["train"].features["label"].names
        assert given == (clean if kind == "names" else sorted(clean, key=natural_key))
        for split in dataset.values():
            assert [given[number] for number in split["label"]] == [clean[number] for number in numbers]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["café", "cafe\u0301", "a"],
                r"class .café. of train .* two ways, 'caf\\xe9' and 'cafe\\u0301'",
            ),
            (["cat", "a", "cat "], r"class \"cat\" of train is spelled in two ways, 'cat' and 'cat '"),
            (["a", "\u00a0b", "b"], r"class \"b\" of train is spelled in two ways, '\\xa0b' and 'b'"),
            (["a", "b", " "], r"A label of train is blank: ' '"),
        ],
    )
    @pytest.mark.parametrize("kind", ["names", "text"])
    def test_names_that_look_the_same(self, faces, tmp_path, load, names, message, kind):
        labels, feature = [number % 3 for number in range(12)], datasets.ClassLabel(names=names)
        if kind == "text":
            labels, feature = [names[number] for number in labels], datasets.Value("string")
        with pytest.raises(BadDataError, match=message):
            load(dataset_name=self._saved(tmp_path, train=self._labeled(faces, labels, feature)))

    def test_what_datasets_refuses(self, faces, tmp_path, load):
        (tmp_path / "copy").mkdir()
        faces.to_parquet(tmp_path / "copy" / "train.parquet")
        with pytest.raises(UserError, match=r"The data set .*copy cannot be loaded: .*'other'"):
            load(dataset_name=str(tmp_path / "copy"), dataset_config_name="other")

    def test_several_classes_of_one_name(self, faces, tmp_path, load):
        path = self._saved(tmp_path, train=faces)
        (info,) = (tmp_path / "copy").rglob("dataset_info.json")
        for names in (["a", "b", "a"], ["a"] * 3, ["", "", "a"]):
            content = json.loads(info.read_text())
            content["features"]["label"]["names"] = names
            info.write_text(json.dumps(content))
            with pytest.raises(BadDataError, match=r"copy has several classes of one name, .*: rename them in"):
                load(dataset_name=path)

    def _saved(self, tmp_path, **splits):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "copy")
        return str(tmp_path / "copy")

    def _labeled(self, faces, labels, feature):
        return faces.remove_columns("label").add_column("label", labels, feature=feature)

    def test_wrong_columns_are_offered(self, faces, tmp_path, check_form, load):
        path = self._saved(tmp_path, train=faces.rename_columns({"image": "img", "label": "fine_label"}))
        with pytest.raises(ValueError, match='has no column "image": set --image_column_name to img'):
            load(dataset_name=path)
        with pytest.raises(ValueError, match='has no column "label": set --label_column_name to fine_label'):
            load(dataset_name=path, image_column_name="img")
        with pytest.raises(ValueError, match=r'"fine_label" .* holds no images.*Images are in img'):
            load(dataset_name=path, image_column_name="fine_label", label_column_name="img")
        check_form(load(dataset_name=path, image_column_name="img", label_column_name="fine_label"))

    def test_a_chosen_column_beside_one_of_the_usual_name(self, faces, tmp_path, load):
        path = self._saved(tmp_path, train=faces.add_column("fine", [n % 2 for n in range(12)]))
        dataset = load(dataset_name=path, label_column_name="fine", train_val_split=0)
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
    def test_kinds_of_labels(self, faces, tmp_path, feature, labels, names, load):
        path = self._saved(tmp_path, train=self._labeled(faces, labels * 4, feature))
        dataset = load(dataset_name=path, train_val_split=0)
        assert dataset["train"].features["label"].names == names
        found = [names[label] for label in labels_of(dataset["train"]).tolist()]
        assert found == [str(int(label) if isinstance(label, float) else label) for label in labels * 4]

    def test_binary_images(self, faces, tmp_path, check_form, load):
        data = [row["image"]["bytes"] for row in faces.cast_column("image", IMAGE)]
        binary = faces.remove_columns("image").add_column("image", data, feature=datasets.Value("binary"))
        dataset = load(dataset_name=self._saved(tmp_path, train=binary), train_val_split=0)
        check_form(dataset)
        assert [row["image"]["bytes"] for row in dataset["train"]] == data

    @pytest.mark.parametrize(
        ("feature", "none"),
        [
            (datasets.ClassLabel(names=["c", "a", "b"]), -1),
            (datasets.Value("int64"), -1),
            (datasets.Value("string"), None),
        ],
    )
    def test_a_test_split_without_labels_is_left_out(self, faces, tmp_path, feature, none, caplog, load):
        labels = [str(n % 3) if feature == datasets.Value("string") else n % 3 for n in range(12)]
        train, test = (self._labeled(faces, given, feature) for given in (labels, [none] * 12))
        dataset = load(dataset_name=self._saved(tmp_path, train=train, test=test))
        assert list(dataset) == ["train", "validation"]
        assert "test split has no labels: left out" in caplog.text
        with pytest.raises(BadDataError, match="1 of the 12 images of train have no label, the first in row 0"):
            load(dataset_name=self._saved(tmp_path, train=self._labeled(faces, [none, *labels[1:]], feature)))

    def test_names_count_and_not_numbers(self, faces, tmp_path, load):
        other = self._labeled(faces, [0, 1, 2] * 4, datasets.ClassLabel(names=["a", "b", "c"]))
        dataset = load(dataset_name=self._saved(tmp_path, train=faces, validation=other))
        names = dataset["validation"].features["label"].int2str(labels_of(dataset["validation"]))
        assert names == ["a", "b", "c"] * 4

    def test_a_name_that_no_training_image_has(self, faces, tmp_path, load):
        train = faces.filter(lambda row: row["label"] != 2)
        dataset = load(dataset_name=self._saved(tmp_path, train=train))
        assert dataset["train"].features["label"].names == ["c", "a", "b"]
        with pytest.raises(BadDataError, match="test split has labels that train does not have: b"):
            load(dataset_name=self._saved(tmp_path, train=train, test=faces))

    def test_splits_of_other_names(self, faces, tmp_path, caplog, load):
        assert len(load(dataset_name=self._saved(tmp_path, full=faces), train_val_split=0)["train"]) == 12
        dataset = load(dataset_name=self._saved(tmp_path, train=faces, dev=faces, extra=faces))
        assert list(dataset) == ["train", "validation"]
        assert "extra" in caplog.text
        with pytest.raises(BadDataError, match="no training split, only test"):
            load(dataset_name=self._saved(tmp_path, test=faces))
        with pytest.raises(BadDataError, match="more than one split for validation: valid, dev"):
            load(dataset_name=self._saved(tmp_path, train=faces, valid=faces, dev=faces))

    @pytest.mark.skipif(datasets.__version__ < "5", reason="save_to_disk fails with an empty split")
    def test_an_empty_split(self, faces, tmp_path, load):
        with pytest.raises(BadDataError, match="one of its splits has no images"):
            load(dataset_name=self._saved(tmp_path, train=faces, test=faces.select([])))

    def test_boxes_are_kept_where_they_are_asked_for(self, faces, tmp_path, load):
        boxed = faces.add_column("box", [[0.0, 0.0, 4.0, 4.0]] * 12, feature=BOX)
        path = self._saved(tmp_path, train=boxed)
        assert "box" not in load(dataset_name=path)["train"].column_names
        for split in load(dataset_name=path, crop_to_boxes=True).values():
            assert split[0]["box"] == [0.0, 0.0, 4.0, 4.0]
        with pytest.raises(ValueError, match="--crop_to_boxes needs a box"):
            load(dataset_name=self._saved(tmp_path, train=faces), crop_to_boxes=True)


class TestFormats:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_published_layouts(self, name, tmp_path, check_form, load, rows_of):
        made = make_published(name, tmp_path, num_classes=3, images_per_class=9)
        dataset = load(dataset_format=name, dataset_dir=str(made))
        check_form(dataset)
        published = LAYOUTS[name](made)
        assert {"train", "validation", "test"} == set(dataset)
        assert rows_of(dataset["test"]) == rows_of(published["test"])
        both = [row for split in ("train", "validation") for row in rows_of(dataset[split])]
        assert sorted(both) == sorted(
            row for split in ("train", "validation") if split in published for row in rows_of(published[split])
        )

    def test_packaged(self, faces, monkeypatch, check_form, load):
        calls = []

        def load_packaged(*args):
            calls.append(args)
            return datasets.DatasetDict({"train": faces.cast_column("image", IMAGE)})

        name = next(iter(catalog.PACKAGED))
        monkeypatch.setattr(catalog, "load", load_packaged)
        dataset = load(3, dataset_format=name, dataset_config_name="full")
        check_form(dataset)
        assert calls == [(name, "full", 3)]

    def test_an_empty_split(self, faces, monkeypatch, load):
        train = faces.cast_column("image", IMAGE)
        splits = datasets.DatasetDict({"train": train, "test": train.select([])})
        monkeypatch.setattr(catalog, "load", lambda *args: splits)
        with pytest.raises(BadDataError, match="The test split has no images"):
            load(dataset_format=next(iter(catalog.PACKAGED)))

    def test_faults(self, tmp_path, load):
        with pytest.raises(ValueError, match="no --dataset_format cub: choose cub_200_2011, "):
            load(dataset_format="cub")
        with pytest.raises(ValueError, match="needs --dataset_dir"):
            load(dataset_format="cub_200_2011")
        with pytest.raises(ValueError, match="leave --dataset_config_name out"):
            load(dataset_format="cub_200_2011", dataset_dir=str(tmp_path), dataset_config_name="x")
        with pytest.raises(ValueError, match="leave --dataset_dir out"):
            load(dataset_format=next(iter(catalog.PACKAGED)), dataset_dir=str(tmp_path))
