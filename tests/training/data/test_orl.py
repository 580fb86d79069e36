"""The ORL faces as the package has them."""

import torch

from training.data.orl import load_orl_faces


def test_the_published_set():
    faces = load_orl_faces()
    assert torch.tensor(faces["label"]).bincount().tolist() == [10] * 40
    assert faces.features["label"].names[9] == "person_10"
    images = list(faces["image"])
    assert {(image.mode, image.size) for image in images} == {("RGB", (92, 112))}
    assert len({image.tobytes() for image in images}) == 400
