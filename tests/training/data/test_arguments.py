"""Which arguments name the data, and what is refused."""

import pytest
from transformers import HfArgumentParser

from training.data.arguments import DataArguments


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


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    """Records and cards must tell them apart, also where they are read from elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice" / "pets").mkdir(parents=True)
    assert DataArguments(dataset_name="alice/pets").dataset_name == str((tmp_path / "alice" / "pets").resolve())
    assert DataArguments(dataset_name="alice/others").dataset_name == "alice/others"
