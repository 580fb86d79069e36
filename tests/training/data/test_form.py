"""The form of labeled images: labels, and the fingerprint."""

import shutil

import datasets
import pytest
import torch

from training.data.folders import read_unlabeled
from training.data.form import IMAGE, fingerprint, labels_of


class TestFingerprint:
    @pytest.fixture
    def of(self, load):
        """Gives the fingerprint of a folder."""

        def of(folder, **kwargs):
            return fingerprint(load(train_dir=str(folder), **kwargs))

        return of

    def test_counts(self, folder, of):
        assert of(folder, train_val_split=0.5)["splits"] == {
            "train": {"images": 10, "classes": 3, "min_per_class": 2, "max_per_class": 5},
            "validation": {"images": 10, "classes": 3, "min_per_class": 2, "max_per_class": 5},
        }

    def test_place_and_order_do_not_matter(self, folder, tmp_path, of, load):
        copy = shutil.copytree(folder, tmp_path / "other" / "deep" / "place")
        assert of(copy) == of(folder)
        dataset = load(train_dir=str(folder))
        shuffled = datasets.DatasetDict({name: split.shuffle(seed=1) for name, split in dataset.items()})
        assert fingerprint(shuffled) == fingerprint(dataset)

    @pytest.mark.parametrize("change", ["size", "name", "label", "split", "absent"])
    def test_changes_matter(self, folder, tmp_path, change, of):
        before = of(folder)
        image = folder / "dog" / "0.png"
        if change == "size":
            image.write_bytes(image.read_bytes() + b"0")
        elif change == "name":
            image.rename(folder / "dog" / "9.png")
        elif change == "label":
            image.rename(folder / "cat2" / "9.png")
        elif change == "absent":
            image.unlink()
        assert of(folder, train_val_split=0.3 if change == "split" else 0.15)["sha256"] != before["sha256"]

    def test_bytes_matter_where_the_data_set_holds_them(self, faces):
        split = faces.cast_column("image", IMAGE)
        other = split.map(lambda row: {"image": {"path": None, "bytes": row["image"]["bytes"] + b"0"}})
        digests = [fingerprint(datasets.DatasetDict({"train": data}))["sha256"] for data in (split, split, other)]
        assert digests[0] == digests[1] != digests[2]

    def test_unlabeled_images_count(self, folder, tmp_path, load, make_folder):
        labeled = load(train_dir=str(folder))
        others = make_folder(tmp_path / "others", {"x": 3, "y": 1})
        both = datasets.DatasetDict(dict(labeled) | {"unlabeled": read_unlabeled(others)})
        before = fingerprint(both)
        assert before["splits"]["unlabeled"]["images"] == 4
        assert {name: before["splits"][name] for name in labeled} == fingerprint(labeled)["splits"]
        (others / "x" / "0.png").rename(others / "x" / "9.png")
        after = fingerprint(datasets.DatasetDict(dict(labeled) | {"unlabeled": read_unlabeled(others)}))
        assert len({fingerprint(labeled)["sha256"], before["sha256"], after["sha256"]}) == 3


def test_labels_of(faces):
    assert torch.equal(labels_of(faces.cast_column("image", IMAGE).select([3, 1])), torch.tensor([0, 1]))
