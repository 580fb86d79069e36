"""Heads on cached features."""

from dataclasses import replace

import pytest
import torch

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.ablation.batchformer import BatchFormerForImageClassification
from training.ablation.heads import Budget, random_batches, train_head, train_plain, untrained_head
from training.evaluation.classifiers import predict_from
from training.evaluation.features import CachedImages
from training.fine_tuning.divergence import DivergedError


# Of logits around 1 after 60 steps of training, in which rounding errors grow.
ROUNDING = {"atol": 1e-3, "rtol": 1e-3}
BUDGET = Budget(steps=60, batch_size=15, learning_rate=1e-2, head_learning_rate=1e-3)


@pytest.fixture
def images(backbone_config):
    """45 images of 3 classes, 24 features that tell them apart."""
    labels = torch.arange(3).repeat(15)
    features = torch.randn(3, 24)[labels] + 0.1 * torch.randn(45, 24)
    return CachedImages(torch.randn(45, 3, 32, 32), features, labels)


def _config(preset, backbone_config):
    return getattr(RBIConfig, preset)(backbone_config=backbone_config, feature_size=24, num_labels=3)


def _accuracy(head, images, scope="batch"):
    return (head.predict(torch.arange(45), scope).argmax(-1) == images.labels).float().mean().item()


def test_cached_features_give_the_logits_of_the_images(backbone_config):
    model = RBIForImageClassification(_config("kernel", backbone_config)).eval()
    pixel_values = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        features = model.rbi.extract_features(pixel_values)[0]
    images = CachedImages(pixel_values, features, torch.zeros(7, dtype=torch.long))
    for scope in ("self", "batch"):
        with torch.no_grad():
            logits = model(pixel_values, relation_scope=scope).logits
        torch.testing.assert_close(predict_from(model, images, exclude_self=False)(torch.arange(7), scope), logits)


@pytest.mark.slow
def test_every_head_learns(images, config):
    config.feature_size, config.num_labels = 24, 3
    rows = torch.arange(45)
    heads = [
        train_plain(images, rows, 3, BUDGET, seed=0),
        train_head(images, rows, config, BUDGET, seed=0),
        train_head(images, rows, config, BUDGET, seed=0, relation_scope="self"),
    ]
    assert [_accuracy(head, images) for head in heads] == [1, 1, 1]
    assert heads[0].num_parameters == 24 * 3 + 3
    assert heads[1].num_parameters == heads[2].num_parameters > heads[0].num_parameters


def test_a_head_that_diverges_says_at_which_step(images, backbone_config):
    budget = replace(BUDGET, learning_rate=1e38, head_learning_rate=1e38)
    with pytest.raises(DivergedError, match=r"head at step 2 is (nan|inf).*lower --frozen_learning_rate"):
        train_head(images, torch.arange(45), _config("paper", backbone_config), budget, seed=0)


@pytest.mark.slow
def test_training_is_repeatable(images, backbone_config):
    rows = torch.arange(45)
    first, again, other = (
        train_head(images, rows, _config("paper", backbone_config), BUDGET, seed).predict(rows, "batch")
        for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, again, **ROUNDING)
    assert not torch.allclose(first, other, **ROUNDING)


def test_the_self_control_never_looks_at_others(images, backbone_config):
    head = train_head(
        images, torch.arange(45), _config("kernel", backbone_config), BUDGET, seed=0, relation_scope="self"
    )
    torch.testing.assert_close(head.predict(torch.arange(45), "batch"), head.predict(torch.arange(45), "self"))


def test_the_untrained_kernel_head_keeps_the_classifier_it_is_given(images, backbone_config):
    plain = train_plain(images, torch.arange(45), 3, BUDGET, seed=0)
    head = untrained_head(images, plain, _config("kernel", backbone_config))
    rows = torch.arange(45)
    torch.testing.assert_close(head.predict(rows, "self"), plain.predict(rows, "self"))
    assert not torch.allclose(head.predict(rows, "batch"), plain.predict(rows, "batch"), atol=1e-3)


def test_the_given_config_is_not_changed(images, backbone_config):
    config = _config("paper", backbone_config)
    before = config.to_dict()
    train_head(images, torch.arange(45), config, Budget(steps=1), seed=0)
    assert config.to_dict() == before


def _spy(monkeypatch):
    """Notes what the model is asked in training."""
    calls = []
    original = RBIForImageClassification.forward

    def forward(self, *args, **kwargs):
        if self.training:
            calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RBIForImageClassification, "forward", forward)
    return calls


def test_without_training_the_attention_it_is_a_linear_classifier(images, backbone_config):
    config = _config("kernel", backbone_config)
    head = train_head(images, torch.arange(45), config, BUDGET, 0, "self", trains_attention=False)
    classifier = head.model.classifier
    expected = torch.nn.functional.linear(images.features, classifier.weight, classifier.bias)
    torch.testing.assert_close(head.predict(torch.arange(45), "batch"), expected)
    assert head.num_parameters == 24 * 3 + 3
    assert _accuracy(head, images) == 1


def test_through_the_bank_no_image_attends_to_itself(images, backbone_config, monkeypatch):
    calls = _spy(monkeypatch)
    rows, bank = torch.arange(0, 30, 2), torch.arange(30).flip(0)
    config = _config("kernel", backbone_config)
    head = train_head(images, rows, config, replace(BUDGET, steps=5), 0, "reference", bank=bank)
    assert len(calls) == 5
    for call in calls:
        itself = call["image_features"][:, None].eq(images.features[bank]).all(-1)
        assert itself.sum() == len(itself)
        assert torch.equal(call["reference_mask"], ~itself)
        assert call["relation_scope"] == "reference"
    others = torch.arange(40, 45)
    alone, with_bank = (head.predict(others, scope) for scope in ("self", "reference"))
    assert not torch.allclose(alone, with_bank, atol=1e-3)
    torch.testing.assert_close(with_bank[:2], head.predict(others[:2], "reference"))


@pytest.mark.slow
def test_the_share_of_the_loss_without_relations(images, backbone_config):
    """With nearly all of it, the head is trained as that which has no relations."""
    rows, weights = torch.arange(45), {}
    for share, scope in ((0.0, "self"), (1 - 1e-7, "batch"), (0.0, "batch")):
        config = _config("kernel", backbone_config)
        options = {"trains_attention": False, "self_loss_weight": share}
        head = train_head(images, rows, config, BUDGET, 0, scope, **options)
        weights[share, scope] = head.model.classifier.weight
    torch.testing.assert_close(weights[1 - 1e-7, "batch"], weights[0.0, "self"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(weights[0.0, "batch"], weights[0.0, "self"], atol=1e-3)


def test_balanced_batches_have_so_many_images_of_a_class(images, backbone_config, monkeypatch):
    calls = _spy(monkeypatch)
    budget = replace(BUDGET, steps=12, batch_size=6, images_per_class=3)
    train_head(images, torch.arange(45), _config("kernel", backbone_config), budget, 0)
    seen = torch.zeros(45, dtype=torch.bool)
    for call in calls:
        same = call["image_features"][:, None].eq(images.features).all(-1)
        counts = images.labels[same.int().argmax(1)].bincount(minlength=3)
        assert sorted(counts.tolist()) == [0, 3, 3]
        seen |= same.any(0)
    assert seen.sum() > 30, "another epoch draws other images"


@pytest.mark.slow
def test_class_weights_and_label_smoothing(images, backbone_config):
    rows, config = torch.arange(45), _config("kernel", backbone_config)

    def probabilities(**kwargs):
        head = train_head(images, rows, config, replace(BUDGET, **kwargs), 0, "self", trains_attention=False)
        return head.predict(rows, "self").softmax(-1)

    usual = probabilities()
    assert probabilities(class_weights=torch.tensor([9.0, 1.0, 1.0]))[:, 0].mean() > usual[:, 0].mean()
    assert probabilities(label_smoothing=0.5).amax(-1).mean() < usual.amax(-1).mean() - 0.1


def test_batchformer_is_trained_and_dropped_at_test(images, backbone_config):
    config = _config("kernel", backbone_config)
    head = train_head(
        images,
        torch.arange(45),
        config,
        BUDGET,
        0,
        "self",
        trains_attention=False,
        model_class=BatchFormerForImageClassification,
    )
    start = BatchFormerForImageClassification(config).batchformer
    assert head.num_parameters == 24 * 3 + 3 + sum(parameter.numel() for parameter in start.parameters())
    classifier = head.model.classifier
    expected = torch.nn.functional.linear(images.features, classifier.weight, classifier.bias)
    torch.testing.assert_close(head.predict(torch.arange(45), "batch"), expected)
    plain = train_head(images, torch.arange(45), config, BUDGET, 0, "self", trains_attention=False)
    assert not torch.allclose(plain.model.classifier.weight, classifier.weight, atol=1e-3)
    assert _accuracy(head, images) == 1


def test_an_untrained_head_with_a_bank(images, backbone_config):
    plain = train_plain(images, torch.arange(20), 3, BUDGET, seed=0)
    config, bank = _config("kernel", backbone_config), torch.arange(20)
    head = untrained_head(images, plain, config, bank)
    rows = torch.arange(20, 45)
    torch.testing.assert_close(head.predict(rows, "self"), plain.predict(rows, "self"))
    with_bank = head.predict(rows, "reference")
    assert not torch.allclose(with_bank, plain.predict(rows, "self"), atol=1e-3)
    torch.testing.assert_close(with_bank[3:9], head.predict(rows[3:9], "reference"))


def testrandom_batches_are_an_epoch_each_image_once():
    rows = torch.arange(100, 117)
    batches = random_batches(rows, 5, seed=1)
    for _ in range(2):
        epoch = [next(batches) for _ in range(3)]
        assert sorted(len(batch) for batch in epoch) == [5, 6, 6]
        assert torch.equal(torch.cat(epoch).sort().values, rows)
