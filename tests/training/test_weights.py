"""The pretrained MobileNetV2."""

import pytest
import torch
from transformers import MobileNetV2Model

from modeling_rbi import pixel_statistics
from training.data.orl import load_orl_faces
from training.weights import load_mobilenet_v2, mobilenet_v2_image_processor


def _nearest_mean_accuracy(model: MobileNetV2Model, pixel_values: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the last 5 pictures of each class that are nearest to the mean features of its first 5."""
    with torch.no_grad():
        features = torch.cat([model(batch).pooler_output.flatten(1) for batch in pixel_values.split(50)])
    features = torch.nn.functional.normalize(features - features.mean(0), dim=-1).view(-1, 10, features.shape[-1])
    means = features[:, :5].mean(1)
    return ((features[:, 5:] @ means.T).argmax(-1) == labels.view(-1, 10)[:, 5:]).float().mean().item()


def test_image_processor_normalises_as_the_weights_were_trained():
    mean, std = pixel_statistics(mobilenet_v2_image_processor(64))
    assert mean == pytest.approx([0.485, 0.456, 0.406], abs=1e-5)
    assert std == pytest.approx([0.229, 0.224, 0.225], abs=1e-5)


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
