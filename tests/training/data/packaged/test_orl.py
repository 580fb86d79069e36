"""The ORL faces as the package has them, and what is said of PSNR on them."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from modeling_rbi import RBIConfig, RelationshipPositionEncoding
from training.data.decode import decode_image
from training.data.packaged.orl import ORL_SHOTS, load_orl_faces, load_orl_splits


def test_the_published_set():
    faces = load_orl_faces()
    assert torch.tensor(faces["label"]).bincount().tolist() == [10] * 40
    assert faces.features["label"].names[9] == "person_10"
    images = list(faces["image"])
    assert {(image.mode, image.size) for image in images} == {("RGB", (92, 112))}
    assert len({image.tobytes() for image in images}) == 400


STATISTICS = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


@pytest.fixture(scope="module")
def psnr_of_pairs():
    """Gives, for a config, the relation of each pair of 100 faces at 224 x 224."""
    images = [image.resize((224, 224)) for image in load_orl_faces().select(range(0, 400, 4))["image"]]
    pixel_values = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
    pairs = torch.ones(100, 100).triu(1).bool()
    return lambda config: RelationshipPositionEncoding(config)(pixel_values)[0][pairs].double()


@pytest.fixture(scope="module")
def full(psnr_of_pairs):
    """Of images in full size."""
    return psnr_of_pairs(RBIConfig(psnr_image_size=None, **STATISTICS))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "kernel", "default"])
def test_psnr_of_small_images_ranks_pairs_as_full_size_does(preset, psnr_of_pairs, full):
    config = RBIConfig(**STATISTICS) if preset == "default" else getattr(RBIConfig, preset)(**STATISTICS)
    small = psnr_of_pairs(config)
    assert spearmanr(small, full).statistic >= 0.98
    if config.psnr_image_size is not None:
        assert not torch.equal(small, full)


@pytest.mark.parametrize("config_name", ORL_SHOTS)
def test_splits_have_so_many_photographs_of_each_person(config_name):
    splits = load_orl_splits(config_name, 0)
    num_train = int(config_name.split("-")[0])
    for part, number in (("train", num_train), ("validation", 1), ("test", 9 - num_train)):
        assert torch.tensor(splits[part]["label"][:]).bincount().tolist() == [number] * 40
    paths = [image["path"] for split in splits.values() for image in split["image"]]
    assert len(set(paths)) == len(paths) == 400


@pytest.mark.slow
def test_splits_hold_the_images_of_the_set():
    faces = load_orl_faces()
    labels = {image.tobytes(): label for image, label in zip(faces["image"], faces["label"], strict=True)}
    for split in load_orl_splits("2-shot", 0).values():
        assert [labels[decode_image(image).tobytes()] for image in split["image"]] == split["label"][:]
