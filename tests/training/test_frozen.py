"""Heads on cached features."""

import pytest
import torch

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel
from training.frozen import Budget, CachedPictures, predict_with, train_head, train_plain, untrained_head


BUDGET = Budget(steps=60, batch_size=15, learning_rate=1e-2, head_learning_rate=1e-3)


@pytest.fixture
def pictures(backbone_config):
    """45 pictures of 3 classes, 24 features that tell them apart."""
    labels = torch.arange(3).repeat(15)
    features = torch.randn(3, 24)[labels] + 0.1 * torch.randn(45, 24)
    return CachedPictures(torch.randn(45, 3, 32, 32), features, labels)


def _config(preset, backbone_config):
    return getattr(RBIConfig, preset)(backbone_config=backbone_config, feature_size=24, num_labels=3)


def _accuracy(head, pictures, scope="batch"):
    return (head.predict(torch.arange(45), scope).argmax(-1) == pictures.labels).float().mean().item()


def test_cached_features_give_the_logits_of_the_pictures(backbone_config):
    model = RBIForImageClassification(_config("kernel", backbone_config)).eval()
    pixel_values = torch.randn(7, 3, 32, 32)
    pictures = CachedPictures.from_backbone(model.rbi, pixel_values, torch.zeros(7, dtype=torch.long), batch_size=3)
    for scope in ("self", "batch"):
        with torch.no_grad():
            logits = model(pixel_values, relation_scope=scope).logits
        torch.testing.assert_close(predict_with(model, pictures)(torch.arange(7), scope), logits)


def test_every_head_learns(pictures, config):
    config.feature_size, config.num_labels = 24, 3
    rows = torch.arange(45)
    heads = [
        train_plain(pictures, rows, 3, BUDGET, seed=0),
        train_head(pictures, rows, config, BUDGET, seed=0),
        train_head(pictures, rows, config, BUDGET, seed=0, relation_scope="self"),
    ]
    assert [_accuracy(head, pictures) for head in heads] == [1, 1, 1]
    assert heads[0].num_parameters == 24 * 3 + 3
    assert heads[1].num_parameters == heads[2].num_parameters > heads[0].num_parameters


def test_training_is_repeatable(pictures, backbone_config):
    rows = torch.arange(45)
    first, again, other = (
        train_head(pictures, rows, _config("paper", backbone_config), BUDGET, seed).predict(rows, "batch")
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_self_control_never_looks_at_others(pictures, backbone_config):
    head = train_head(
        pictures, torch.arange(45), _config("kernel", backbone_config), BUDGET, seed=0, relation_scope="self"
    )
    assert torch.equal(head.predict(torch.arange(45), "batch"), head.predict(torch.arange(45), "self"))


def test_the_untrained_kernel_head_keeps_the_classifier_it_is_given(pictures, backbone_config):
    plain = train_plain(pictures, torch.arange(45), 3, BUDGET, seed=0)
    head = untrained_head(pictures, plain, _config("kernel", backbone_config))
    rows = torch.arange(45)
    torch.testing.assert_close(head.predict(rows, "self"), plain.predict(rows, "self"))
    assert not torch.allclose(head.predict(rows, "batch"), plain.predict(rows, "batch"), atol=1e-3)


def test_the_given_config_is_not_changed(pictures, backbone_config):
    config = _config("paper", backbone_config)
    before = config.to_dict()
    train_head(pictures, torch.arange(45), config, Budget(steps=1), seed=0)
    assert config.to_dict() == before


def test_from_backbone_runs_the_model(backbone_config):
    model = RBIModel(_config("paper", backbone_config)).eval()
    pixel_values = torch.randn(5, 3, 32, 32)
    pictures = CachedPictures.from_backbone(model, pixel_values, torch.arange(5), batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(pictures.features, model.extract_features(pixel_values)[0])
