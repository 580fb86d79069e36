"""Files that list images."""

import csv
import json
import os

import pytest

from training.data.form import BadDataError


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
    def test_paths_are_relative_to_the_file(self, folder, tmp_path, ending, monkeypatch, check_form, load, rows_of):
        rows = [(f"../train/{name}/{number}.png", name) for name in ("dog", "cat2") for number in range(3)]
        rows.append((str(folder / "dog" / "5.png"), "dog"))
        monkeypatch.chdir("/")
        file = self._write(tmp_path / "lists" / f"train.{ending}", rows)
        dataset = load(train_file=file, validation_file=file)
        check_form(dataset)
        for split in dataset.values():
            assert [row["image"]["path"] for row in split] == [
                os.path.normpath(tmp_path / "lists" / path) for path, _ in rows
            ]
            assert [name for _, name in rows_of(split)] == [name for _, name in rows]

    def test_labels_that_look_like_numbers_stay_as_written(self, folder, tmp_path, load, rows_of):
        labels = ["10", "9", "007", "1e3"]
        rows = [(f"train/cat10/{number}.png", labels[number % 4]) for number in range(8)]
        dataset = load(train_file=self._write(tmp_path / "a.csv", rows), train_val_split=0)
        assert dataset["train"].features["label"].names == ["1e3", "007", "9", "10"]
        assert [name for _, name in rows_of(dataset["train"])] == [label for _, label in rows]

    @pytest.mark.parametrize("ending", ["csv", "jsonl"])
    def test_names_that_look_the_same(self, folder, tmp_path, ending, load):
        labels = ["cat", "cafe\u0301 "]
        rows = [(f"train/cat10/{number}.png", labels[number % 2]) for number in range(8)]
        dataset = load(train_file=self._write(tmp_path / f"a.{ending}", rows))
        assert dataset["train"].features["label"].names == ["café", "cat"]
        file = self._write(tmp_path / f"a.{ending}", [*rows, ("train/cat10/8.png", "cat ")])
        with pytest.raises(BadDataError, match=r'class "cat" of train is spelled in two ways, .cat. and .cat .:'):
            load(train_file=file)

    @pytest.mark.parametrize("labels", [[10, 9], ["10", "9"], [10.0, 9.0]])
    def test_whole_numbers_of_json_are_classes(self, folder, tmp_path, labels, load):
        rows = [(f"train/cat10/{number}.png", labels[number % 2]) for number in range(8)]
        dataset = load(train_file=self._write(tmp_path / "a.jsonl", rows))
        assert dataset["train"].features["label"].names == ["9", "10"]

    def test_missing_files_are_named(self, folder, tmp_path, load):
        rows = [("train/dog/0.png", "dog"), ("train/dog/99.png", "dog"), ("0.png", "cat")]
        with pytest.raises(BadDataError, match=rf"2 of the 3 images .*{tmp_path}/train/dog/99.png, {tmp_path}/0.png"):
            load(train_file=self._write(tmp_path / "a.csv", rows))

    @pytest.mark.parametrize("ending", ["csv", "tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize(
        "header", [("image", "label"), ("label", "weight", "image"), ("image", "a,b;c", "label"), ("label", "image")]
    )
    def test_delimiters(self, folder, tmp_path, ending, delimiter, header, load, rows_of):
        file = tmp_path / f"a.{ending}"
        with file.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.writer(stream, delimiter=delimiter)
            writer.writerow(header)
            for number in range(6):
                row = {"image": f"train/dog/{number}.png", "label": ("a, b; c", "d|e")[number % 2], "weight": "0,5"}
                writer.writerow([row.get(name, "x") for name in header])
        found = rows_of(load(train_file=str(file), train_val_split=0)["train"])
        assert found == [(f"{number}.png", ("a, b; c", "d|e")[number % 2]) for number in range(6)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "file;species\ntrain/dog/0.png;a\ntrain/dog/1.png;b\n",
                "semicolons, has .*image_column_name to file, sp",
            ),
            ("file\tspecies\ntrain/dog/0.png\ta\ntrain/dog/1.png\tb\n", "tabs, has .*image_column_name to file, sp"),
            (
                "image;species\ntrain/dog/0.png;a, b\ntrain/dog/1.png;b\n",
                'semicolons, has no column "label": .* species',
            ),
            ("path\ntrain/dog/0.png\n", 'read as columns separated by commas, has no column "image": .*to path'),
        ],
    )
    def test_the_delimiter_is_named_where_columns_are_missing(self, folder, tmp_path, text, message, load):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(train_file=str(tmp_path / "a.csv"))

    def test_wrong_columns_are_offered_nearest_first(self, folder, tmp_path, load):
        file = tmp_path / "a.csv"
        file.write_text("id,species,img_path\n1,dog,train/dog/0.png\n")
        with pytest.raises(ValueError, match='has no column "image": set --image_column_name to img_path, '):
            load(train_file=str(file))
        with pytest.raises(ValueError, match='no column "label"'):
            load(train_file=str(file), image_column_name="img_path")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "image,label\n", "no rows"),
            ("a.csv", "image,label\ntrain/dog/0.png,dog\ntrain/dog/1.png,\n", "Line 3 .* no label"),
            ("a.csv", "image,label\ntrain/dog/0.png\n", "Line 2 .* no label"),
            ("a.csv", "image,label\n,dog\n", "Line 2 .* no path"),
            ("a.csv", "image,label\ntrain/dog/0.png,  \n", "Line 2 .* no label"),
            ("a.csv", "image,label\na, b.png,dog\n", "Line 2 .* more cells"),
            ("a.jsonl", '{"image": "a"\n', "Line 1 .* not JSON"),
            ("a.jsonl", '["a", "b"]\n', "Line 1 .* not a JSON object"),
            ("a.jsonl", '{"image": "train/dog/0.png", "label": ["a", "b"]}\n', r"line 1 .* is \['a', 'b'\]"),
            ("a.jsonl", '{"image": "train/dog/0.png", "label": 0.5}\n', "line 1 .* is 0.5"),
            ("a.txt", "", r"must be a \.csv, \.tsv, \.jsonl, \.ndjson file"),
        ],
    )
    def test_faults(self, folder, tmp_path, name, text, message, load):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load(train_file=str(tmp_path / name))

    def test_other_encodings(self, folder, tmp_path, load):
        (tmp_path / "a.csv").write_bytes("image,label\ntrain/dog/0.png,Bär\n".encode("latin-1"))
        with pytest.raises(BadDataError, match="cannot be read"):
            load(train_file=str(tmp_path / "a.csv"))

    def test_no_file(self, tmp_path, load):
        with pytest.raises(ValueError, match="There is no file"):
            load(train_file=str(tmp_path / "a.csv"))
