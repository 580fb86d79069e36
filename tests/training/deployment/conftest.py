# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A trained model with its assessment, and publications of it, each made once."""

import shutil

import pytest

from modeling_rbi import RBIForImageClassification
from training.assess import main as assess
from training.deployment.publication import PublicationArguments, make_folder
from training.train import main as train


@pytest.fixture(scope="session")
def trained(published, tmp_path_factory):
    """A model with references that `training.train` made, and its assessment."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(folder / "cache"))
        data = ["--dataset_format", "cub_200_2011", "--dataset_dir", str(published), "--use_cpu"]
        backbone = '{"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}'
        model = [
            "--backbone_config",
            backbone,
            "--image_size",
            "32",
            "--preset",
            "kernel",
            "--references_per_class",
            "3",
        ]
        run = ["--num_train_epochs", "1", "--disable_tqdm", "True", "--output_dir", str(folder / "model")]
        assert train([*data, *model, *run]) == 0
        measured = ["--model", str(folder / "model"), "--output_dir", str(folder / "assessment"), "--resamples", "100"]
        assert assess([*data, *measured, "--batch_sizes", "8", "--disable_tqdm"]) == 0
    return folder


@pytest.fixture(scope="session")
def arguments(trained, image_files):
    """Gives the arguments of a publication without problems; keywords change them."""

    def make(**changes):
        values = {
            "model": str(trained / "model"),
            "repo_id": "alice/birds",
            "assessment": str(trained / "assessment"),
            "examples": [str(path) for path in image_files[:3]],
            "share_images": True,
        }
        return PublicationArguments(**values | changes)

    return make


@pytest.fixture(scope="session")
def made(arguments, given, tmp_path_factory):
    """A publication."""
    return make_folder(arguments(), given, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def made_in_half(arguments, given, trained, tmp_path_factory):
    """A publication in float16, with weights in several files and without `label2id`."""
    folder = tmp_path_factory.mktemp("made_in_half")
    source = shutil.copytree(trained / "model", folder / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    model = RBIForImageClassification.from_pretrained(source).half()
    model.config.label2id = None
    model.save_pretrained(source)
    (folder / "folder").mkdir()
    changes = {"model": str(source), "assessment": None, "max_shard_size": "20kB"}
    return make_folder(arguments(**changes), given, folder / "folder")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the model's folder that a test may change."""
    return shutil.copytree(trained / "model", tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
