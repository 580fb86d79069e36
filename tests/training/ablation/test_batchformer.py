"""BatchFormer against an independent implementation; in evaluation it is a plain classifier."""

import copy
import math

import pytest
import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.ablation.batchformer import BatchFormer, BatchFormerForImageClassification, BatchFormerTrainer
from training.fine_tuning.arguments import Arguments
from training.fine_tuning.run import load_data, train


def by_the_formula(encoder, features):
    """The layer without dropout, (B, C) -> (B, C), computed from its weights."""
    attention, size = encoder.self_attn, features.shape[1]
    query, key, value = (features @ attention.in_proj_weight.T + attention.in_proj_bias).split(size, dim=1)
    messages = []
    for head in range(4):
        own = slice(head * size // 4, (head + 1) * size // 4)
        weights = (query[:, own] @ key[:, own].T / math.sqrt(size // 4)).softmax(-1)
        messages.append(weights @ value[:, own])
    message = torch.cat(messages, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
    hidden = nn.functional.layer_norm(features + message, (size,), encoder.norm1.weight, encoder.norm1.bias)
    between = (hidden @ encoder.linear1.weight.T + encoder.linear1.bias).relu()
    output = hidden + between @ encoder.linear2.weight.T + encoder.linear2.bias
    return nn.functional.layer_norm(output, (size,), encoder.norm2.weight, encoder.norm2.bias)


@pytest.fixture
def model(backbone_config):
    config = RBIConfig.kernel(backbone_config=backbone_config, num_labels=5)
    return BatchFormerForImageClassification(config).eval()


def test_the_layer_is_the_formula():
    batchformer = BatchFormer(24, dropout=0.0).train()
    for parameter in batchformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    features = torch.randn(7, 24)
    both = batchformer(features)
    assert torch.equal(both[:7], features)
    torch.testing.assert_close(both[7:], by_the_formula(batchformer.encoder, features))


def test_the_layer_is_the_authors():
    """4 heads, a feed-forward size of C, dropout 0.5 in all its places, normalization after the sums, relu."""
    encoder = BatchFormer(24).encoder
    assert encoder.self_attn.num_heads == 4 and encoder.linear1.weight.shape == encoder.linear2.weight.shape == (
        24,
        24,
    )
    dropouts = [encoder.self_attn.dropout, encoder.dropout.p, encoder.dropout1.p, encoder.dropout2.p]
    assert dropouts == [0.5] * 4
    assert not encoder.norm_first


def test_in_training_each_image_depends_on_the_batch_and_answers_twice(model, pixel_values):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.batchformer.encoder.self_attn.dropout = 0.0
    features = torch.randn(7, 24)
    logits = model(image_features=features, pixel_values=pixel_values).logits
    plain = features @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(logits[:7], plain)
    of_fewer = model(image_features=features[:6], pixel_values=pixel_values[:6]).logits
    torch.testing.assert_close(of_fewer[:6], plain[:6])
    assert not torch.allclose(of_fewer[6:], logits[7:13], atol=1e-4)


def test_at_test_it_is_a_plain_classifier(model, pixel_values, tmp_path):
    with torch.no_grad():
        features = model.rbi.extract_features(pixel_values)[0]
        expected = nn.functional.linear(features, model.classifier.weight, model.classifier.bias)
        for scope in ("self", "batch", None):
            torch.testing.assert_close(model(pixel_values, relation_scope=scope).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = RBIForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(pixel_values, relation_scope="self").logits, expected)


def test_from_a_model_it_keeps_the_weights(backbone_config, pixel_values):
    plain = RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config, num_labels=5)).eval()
    peer = BatchFormerForImageClassification.from_model(plain)
    with torch.no_grad():
        torch.testing.assert_close(peer(pixel_values).logits, plain(pixel_values, relation_scope="self").logits)


def test_the_loss_counts_the_labels_twice(model, pixel_values):
    labels = torch.arange(7) % 5
    output = model.train()(pixel_values, labels=labels)
    expected = nn.functional.cross_entropy(output.logits, torch.cat([labels, labels]))
    torch.testing.assert_close(output.loss, expected)


def test_heads_must_divide_the_features():
    with pytest.raises(ValueError, match="4 attention heads, which must divide the 26 features"):
        BatchFormer(26)


@pytest.mark.slow
def test_the_trainer_takes_the_mean_over_images_and_encoder(arguments, tmp_path):
    """The gradients of its first step are the gradients of the mean loss of 2B predictions."""
    steps = []

    class Spy(BatchFormerTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            state = torch.get_rng_state()
            twin = copy.deepcopy(model)
            logits = twin(inputs["pixel_values"]).logits
            nn.functional.cross_entropy(logits, inputs["labels"].repeat(2)).backward()
            torch.set_rng_state(state)
            loss = super().training_step(model, inputs, num_items_in_batch)
            own = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            expected = {
                name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None
            }
            steps.append((own, expected))
            return loss

    args = Arguments.parse(arguments(tmp_path / "out", preset="kernel", max_steps=1))
    train(
        args,
        *load_data(args),
        prepare_model=BatchFormerForImageClassification.from_model,
        trainer_class=Spy,
    )
    own, expected = steps[0]
    assert any(name.startswith("batchformer.") for name in own)
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, msg=name)
