"""A small data set in a published layout and the arguments of a training that takes seconds."""

import json

import numpy as np
import pytest
from PIL import Image

from model_cards.card import CardArguments
from training.data.tiny import make_published


TINY_CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "image_size": 32,
}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """4 classes, 10 training and 10 test images of each, in the layout of CUB-200-2011."""
    return make_published("cub_200_2011", tmp_path_factory.mktemp("published"), num_classes=4, images_per_class=20)


@pytest.fixture(scope="session")
def unlabeled_dir(tmp_path_factory):
    """A folder of 15 images without labels."""
    folder, rng = tmp_path_factory.mktemp("unlabeled"), np.random.default_rng(1)
    for number in range(15):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64)).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture
def arguments(published, tmp_path_factory, monkeypatch):
    """Gives the command line of a training on the small data set; keywords are further arguments."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    def make(output_dir, **more):
        values = {
            "dataset_format": "cub_200_2011",
            "dataset_dir": published,
            "backbone_config": json.dumps(TINY_CONVNEXT),
            "image_size": 32,
            "output_dir": output_dir,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
            "use_cpu": True,
        } | more
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="session")
def given():
    """What a card says beside the records, complete."""
    return CardArguments(
        license="apache-2.0",
        description="Tells birds apart.",
        dataset_title="Made-up birds",
        data_license="Made up, free for all.",
        data_bias="Four kinds of birds, none of them real.",
    )
