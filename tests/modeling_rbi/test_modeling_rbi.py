# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The whole model: the properties that its scopes promise, its outputs, and its checkpoints."""

import itertools
import json
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ResNetConfig,
)

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    ResidualRelationshipAttention,
    UserError,
)
from tests.modeling_rbi.processes import gather, run_processes
from tests.modeling_rbi.shared import (
    FEATURE_SIZE,
    assert_same_answers,
    decibels,
    line_drawings,
    natural_images,
    normalize,
    randomize_,
)


@pytest.fixture
def model(config):
    """Both presets, with a head of random weights."""
    model = RBIForImageClassification(config)
    for part in (model.rbi.rra, model.classifier):
        randomize_(part)
    return model.eval()


# --- The start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("residual_gate", ["learned", "none"])
@pytest.mark.parametrize("relation_position_encoding", ["key_value", "key", "bias", "none"])
def test_identity_start_keeps_the_features(backbone_config, preset, residual_gate, relation_position_encoding):
    config = getattr(RBIConfig, preset)(
        backbone_config=backbone_config,
        head_initialization="identity",
        residual_gate=residual_gate,
        relation_position_encoding=relation_position_encoding,
        num_attention_heads=2,
    )
    model = RBIModel(config).eval()
    features = torch.randn(5, FEATURE_SIZE)
    pooled = model(image_features=features, relation_scope="self").pooler_output
    torch.testing.assert_close(pooled, features, atol=0, rtol=1e-6)


def test_standard_start(backbone_config):
    rra = RBIModel(RBIConfig.paper(backbone_config=backbone_config)).rra
    for name, layer in rra.named_children():
        bound = layer.in_features**-0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound, name
        assert abs(layer.weight.std() / (bound / 3**0.5) - 1) < 0.25, name
        assert layer.bias is None or not layer.bias.any()


def test_untrained_kernel_is_the_kernel(backbone_config):
    """Attention is softmax(cos / tau + g PSNR) of the images at 16 px, in float64 by other means."""
    model = RBIModel(RBIConfig.kernel(backbone_config=backbone_config)).eval()
    images = torch.cat([natural_images(4, size=32), line_drawings(3, size=32)])
    # Of two kinds, so that not every image looks at itself alone, and far from the origin.
    features = torch.randn(2, FEATURE_SIZE)[torch.arange(7) % 2] + 0.2 * torch.randn(7, FEATURE_SIZE) + 3
    pixel_values = normalize(images).float()
    outputs = model(pixel_values, image_features=features, relation_scope="batch", output_relations=True)

    blocks = images.numpy().reshape(7, 3, 16, 2, 16, 2).mean((3, 5))
    psnr = decibels(torch.from_numpy(np.mean(np.square(blocks[:, None] - blocks[None]), (2, 3, 4)))).clamp(max=50)
    psnr.fill_diagonal_(0).diagonal().copy_(psnr.amax(1))
    centered = (features - features.mean(0)).double().numpy()
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    expected = (torch.from_numpy(centered @ centered.T) / 0.2 + 0.5 * psnr).softmax(-1)
    assert expected.diagonal().min() < 0.6
    torch.testing.assert_close(outputs.relation_attentions[:, 0].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.pooler_output.double(), expected @ features.double(), atol=1e-4, rtol=0)


# --- Scopes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model, pixel_values, scope="batch", **kwargs):
    return model(pixel_values, relation_scope=scope, **kwargs).logits


def test_scope_batch_follows_a_permutation(model, pixel_values, features):
    order = torch.randperm(7)
    logits = logits_of(model, pixel_values, image_features=features)
    permuted = logits_of(model, pixel_values[order], image_features=features[order])
    torch.testing.assert_close(permuted, logits[order], atol=1e-5, rtol=1e-5)
    assert (logits - logits_of(model, pixel_values, scope="self", image_features=features)).abs().max() > 0.01


@pytest.mark.parametrize("scope", ["self", "batch"])
def test_jacobian_across_images(model, pixel_values, scope):
    jacobian = torch.autograd.functional.jacobian(
        lambda pixels: model(pixels, relation_scope=scope).logits, pixel_values[:3]
    )
    # (image, label, image of the pixel, ...)
    across = jacobian.abs().amax((1, 3, 4, 5))
    itself = torch.eye(3, dtype=torch.bool)
    assert (across[itself] > 1e-6).all()
    if scope == "self":
        assert torch.equal(across[~itself], torch.zeros(6))
    else:
        assert (across[~itself] > 1e-6).all()


@pytest.mark.slow
def test_scope_self_does_not_depend_on_the_batch_size(model):
    pixel_values = normalize(natural_images(64, size=32)).float()
    whole = logits_of(model, pixel_values, scope="self")
    assert whole.std(0).min() > 0.01
    for batch_size in (1, 2, 7, 64):
        parts = [logits_of(model, part, scope="self") for part in pixel_values.split(batch_size)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    # The scope is what makes it so.
    parts = [logits_of(model, part, scope="batch") for part in pixel_values.split(7)]
    assert (torch.cat(parts) - logits_of(model, pixel_values, scope="batch")).abs().max() > 1e-3


@pytest.mark.parametrize("self_relation", ["one", "nearest"])
def test_a_batch_of_one_is_scope_self(config, pixel_values, self_relation):
    config.self_relation = self_relation
    model = RBIForImageClassification(config).eval()
    randomize_(model.rbi.rra)
    alone = logits_of(model, pixel_values[:1], scope="batch")
    assert alone.isfinite().all()
    torch.testing.assert_close(alone, logits_of(model, pixel_values[:1], scope="self"), atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_trains(model, pixel_values):
    model.train()(pixel_values[:1], labels=torch.tensor([2])).loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.rbi.rra.value.weight.grad.abs().max() > 0


@pytest.mark.parametrize("configured", ["batch", "self"])
def test_the_scope_by_default(model, pixel_values, features, configured):
    model.config.relation_scope = configured
    by_scope = {scope: logits_of(model, pixel_values, scope, image_features=features) for scope in ("batch", "self")}
    assert (by_scope["batch"] - by_scope["self"]).abs().max() > 0.01
    for training, default in ((True, "batch"), (False, configured)):
        model.train(training)
        assert torch.equal(logits_of(model, pixel_values, None, image_features=features), by_scope[default])
        for scope, expected in by_scope.items():
            assert torch.equal(logits_of(model, pixel_values, scope, image_features=features), expected)


@pytest.mark.parametrize("scope", ["references", "none", ""])
def test_an_unknown_scope_is_refused(model, pixel_values, scope):
    with pytest.raises(ValueError, match=f"`relation_scope` must be .*'{scope}'"):
        model(pixel_values, relation_scope=scope)


# --- Masks, and rows that are not finite -----------------------------------------------------------------------------


MASK = torch.tensor([True, False, True, True, False, True, True])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_masked_rows_have_no_effect_on_the_others(model, pixel_values, features, dtype):
    mask = MASK.to(dtype)
    logits = logits_of(model, pixel_values, image_features=features, relation_mask=mask)
    assert logits.isfinite().all()
    without = logits_of(model, pixel_values[MASK], image_features=features[MASK])
    torch.testing.assert_close(logits[MASK], without, atol=1e-5, rtol=1e-5)

    changed_pixels, changed_features = pixel_values.clone(), features.clone()
    changed_pixels[~MASK], changed_features[~MASK] = torch.randn(2, 3, 32, 32), 10 * torch.randn(2, FEATURE_SIZE)
    changed = logits_of(model, changed_pixels, image_features=changed_features, relation_mask=mask)
    torch.testing.assert_close(changed[MASK], logits[MASK], atol=1e-5, rtol=1e-5)
    assert (changed - logits)[~MASK].abs().amax(1).min() > 1e-3
    # Unmasked they have.
    assert (logits_of(model, pixel_values, image_features=features) - logits)[MASK].abs().max() > 1e-3


def test_masked_rows_have_no_effect_through_the_backbone(model, pixel_values):
    logits = logits_of(model, pixel_values, relation_mask=MASK)
    torch.testing.assert_close(logits[MASK], logits_of(model, pixel_values[MASK]), atol=1e-5, rtol=1e-5)


def test_a_masked_row_attends_to_itself_and_the_neighbors(model, pixel_values, features):
    outputs = model(
        pixel_values, image_features=features, relation_scope="batch", relation_mask=MASK, output_relations=True
    )
    expected = (MASK[None, :] | torch.eye(7, dtype=torch.bool))[:, None]
    assert torch.equal(outputs.relation_attentions > 0, expected.expand_as(outputs.relation_attentions))


def test_with_all_rows_masked_each_attends_to_itself(model, pixel_values, features):
    mask = torch.zeros(7, dtype=torch.bool)
    outputs = model(
        pixel_values, image_features=features, relation_scope="batch", relation_mask=mask, output_relations=True
    )
    assert torch.equal(outputs.relation_attentions[:, 0], torch.eye(7))
    alone = logits_of(model, pixel_values, scope="self", image_features=features)
    torch.testing.assert_close(outputs.logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [torch.ones(6), torch.ones(7, 1), torch.ones(6, 7)], ids=lambda mask: str(mask.shape))
def test_a_mask_of_another_shape_is_refused(model, pixel_values, mask):
    with pytest.raises(ValueError, match=r"`relation_mask` must have the shape \(7,\).* or \(7, 7\)"):
        model(pixel_values, relation_mask=mask, relation_scope="batch")


def test_a_pairwise_mask_of_equal_rows_is_the_mask_of_images(model, pixel_values, features):
    expected = logits_of(model, pixel_values, image_features=features, relation_mask=MASK)
    logits = logits_of(model, pixel_values, image_features=features, relation_mask=MASK.expand(7, 7))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_pairwise_mask_says_who_attends_to_whom(model, pixel_values, features):
    mask = torch.rand(7, 7) < 0.5
    outputs = model(
        pixel_values, image_features=features, relation_scope="batch", relation_mask=mask, output_relations=True
    )
    expected = (mask | torch.eye(7, dtype=torch.bool))[:, None]
    assert torch.equal(outputs.relation_attentions > 0, expected.expand_as(outputs.relation_attentions))


# --- Neighborhoods smaller than the batch ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "groups"), [(7, [7]), (10, [7]), (4, [3, 4]), (3, [2, 2, 3]), (1, [1] * 7)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_a_batch_is_split_into_equal_neighborhoods(model, pixel_values, features, size, groups, mask):
    outputs = model(
        pixel_values,
        image_features=features,
        relation_scope="batch",
        relation_mask=mask,
        relation_batch_size=size,
        output_relations=True,
    )
    attentions = torch.zeros_like(outputs.relation_attentions)
    similarities = torch.zeros_like(outputs.relation_similarities)
    for rows in torch.arange(7).split(groups):
        alone = model(
            pixel_values[rows],
            image_features=features[rows],
            relation_scope="batch",
            relation_mask=None if mask is None else mask[rows],
            output_relations=True,
        )
        torch.testing.assert_close(outputs.logits[rows], alone.logits, atol=1e-5, rtol=1e-5)
        attentions[rows[0] : rows[-1] + 1, :, rows] = alone.relation_attentions
        similarities[rows[0] : rows[-1] + 1, rows] = alone.relation_similarities
    torch.testing.assert_close(outputs.relation_attentions, attentions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.relation_similarities, similarities, atol=1e-5, rtol=1e-5)


def test_a_pairwise_mask_is_split_with_the_batch(model, pixel_values, features):
    mask = torch.rand(7, 7) < 0.5
    logits = logits_of(model, pixel_values, image_features=features, relation_mask=mask, relation_batch_size=4)
    for rows in (slice(0, 3), slice(3, 7)):
        alone = logits_of(model, pixel_values[rows], image_features=features[rows], relation_mask=mask[rows, rows])
        torch.testing.assert_close(logits[rows], alone, atol=1e-5, rtol=1e-5)


def test_splits_that_make_no_sense_are_refused(model, pixel_values):
    with pytest.raises(ValueError, match="`relation_batch_size` must be at least 1, got 0"):
        model(pixel_values, relation_scope="batch", relation_batch_size=0)
    model.rbi.gather_across_processes = True
    with pytest.raises(ValueError, match="use one of them"):
        model(pixel_values, relation_scope="batch", relation_batch_size=4)


# --- Neighborhoods of several processes ------------------------------------------------------------------------------


def test_gathering_in_one_process_changes_nothing(model, pixel_values):
    expected = logits_of(model, pixel_values)
    model.rbi.gather_across_processes = True
    assert torch.equal(logits_of(model, pixel_values), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "mask_kind"), [(2, "none"), (3, "images"), (3, "pairs")])
def test_gathering_across_processes_is_one_batch(model, pixel_values, tmp_path, world_size, mask_kind):
    model.save_pretrained(tmp_path / "model")
    parts = torch.arange(7).tensor_split(world_size)
    pairs = torch.ones(7, 7, dtype=torch.bool)
    pairs[5, 6] = pairs[6, 5] = pairs[0, 1] = False  # a process can only mask pairs of its own images
    labels = torch.arange(7) % 5
    batch = {"pixel_values": pixel_values, "labels": labels, "mask": MASK, "pairs": pairs}
    save_file(batch, tmp_path / "batch.safetensors")
    run_processes(gather, world_size, tmp_path, mask_kind)

    mask = {"none": None, "images": MASK, "pairs": pairs}[mask_kind]
    outputs = model.train()(pixel_values, relation_mask=mask, output_relations=True)
    torch.nn.functional.cross_entropy(outputs.logits, labels).backward()
    expected = {
        "logits": outputs.logits,
        "attentions": outputs.relation_attentions,
        "similarities": outputs.relation_similarities,
    }
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for rank, rows in enumerate(parts):
        results = load_file(tmp_path / f"results.{rank}")
        wanted = {name: value[rows].detach() for name, value in expected.items()}
        torch.testing.assert_close(results, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(load_file(tmp_path / f"gradients.{rank}"), gradients, atol=1e-5, rtol=1e-4)


BAD_ROW = 2


OTHERS = torch.arange(7) != BAD_ROW


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["pixels", "features"])
def test_a_row_that_is_not_finite_does_not_poison_the_others(model, pixel_values, features, where, bad):
    expected = logits_of(model, pixel_values[OTHERS], image_features=features[OTHERS])
    (pixel_values[BAD_ROW, 0] if where == "pixels" else features[BAD_ROW])[3] = bad
    for mask in (None, OTHERS, torch.ones(7)):
        logits = logits_of(model, pixel_values, image_features=features, relation_mask=mask)
        assert logits[BAD_ROW].isnan().all()
        torch.testing.assert_close(logits[OTHERS], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scope", ["self", "batch"])
def test_an_image_that_is_not_finite_does_not_poison_the_others(model, pixel_values, scope, bad):
    expected = logits_of(model, pixel_values[OTHERS], scope)
    pixel_values[BAD_ROW, 1, 4, 4] = bad
    logits = logits_of(model, pixel_values, scope)
    assert logits[BAD_ROW].isnan().all()
    torch.testing.assert_close(logits[OTHERS], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["pixels", "features"])
@pytest.mark.parametrize("left_out_by", ["rows", "label"])
def test_a_row_that_is_not_finite_does_not_poison_the_gradients(model, pixel_values, features, where, left_out_by):
    labels = torch.arange(7) % 5

    def gradients(pixel_values, features, labels, rows=slice(None)):
        model.zero_grad()
        if left_out_by == "label":
            loss = model(pixel_values, labels=labels, image_features=features, relation_scope="batch").loss
        else:
            logits = model(pixel_values, image_features=features, relation_scope="batch").logits
            loss = nn.functional.cross_entropy(logits[rows], labels[rows])
        loss.backward()
        head = (model.rbi.rra, model.classifier)
        return [parameter.grad.clone() for part in head for parameter in part.parameters()]

    expected = gradients(pixel_values[OTHERS], features[OTHERS], labels[OTHERS])
    (pixel_values[BAD_ROW, 0] if where == "pixels" else features[BAD_ROW])[3] = math.nan
    if left_out_by == "label":
        labels[BAD_ROW] = -100
    for ours, theirs in zip(gradients(pixel_values, features, labels, OTHERS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# --- Outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 3])
def test_relations_on_request(config, pixel_values, num_heads):
    config.num_attention_heads = num_heads
    model = RBIForImageClassification(config).eval()
    outputs = model(pixel_values, relation_scope="batch", output_relations=True)
    assert outputs.relation_attentions.shape == (7, num_heads, 7) and outputs.relation_similarities.shape == (7, 7)
    torch.testing.assert_close(outputs.relation_attentions.sum(-1), torch.ones(7, num_heads), atol=1e-6, rtol=0)
    assert torch.equal(outputs.relation_similarities, model.rbi.rpe(pixel_values)[0])

    outputs = model(pixel_values, relation_scope="self", output_relations=True)
    assert torch.equal(outputs.relation_attentions, torch.eye(7)[:, None].expand(-1, num_heads, -1))
    assert torch.equal(outputs.relation_similarities, torch.eye(7))

    for scope, asked in itertools.product(("batch", "self"), (None, False)):
        outputs = model(pixel_values, relation_scope=scope, output_relations=asked)
        assert outputs.relation_attentions is None and outputs.relation_similarities is None
        assert list(outputs.keys()) == ["logits"]


@pytest.mark.parametrize("scope", ["self", "batch"])
def test_without_relations_there_are_no_similarities(config, pixel_values, scope):
    config.relation_position_encoding = "none"
    model = RBIForImageClassification(config).eval()
    outputs = model(pixel_values, relation_scope=scope, output_relations=True)
    assert outputs.relation_similarities is None and outputs.relation_attentions.shape == (7, 1, 7)


@pytest.mark.parametrize("scope", ["self", "batch"])
def test_outputs_as_tuples(model, pixel_values, scope):
    labels = torch.arange(7) % 5
    kwargs = {"relation_scope": scope, "output_relations": True, "output_hidden_states": True}
    by_name = model(pixel_values, labels=labels, **kwargs)
    assert list(by_name.keys()) == ["loss", "logits", "hidden_states", "relation_attentions", "relation_similarities"]
    as_tuple = model(pixel_values, labels=labels, return_dict=False, **kwargs)
    assert isinstance(as_tuple, tuple)
    for ours, expected in zip(as_tuple, by_name.values(), strict=True):
        torch.testing.assert_close(ours, expected)

    bare = model.rbi(pixel_values, relation_scope=scope, return_dict=False)
    assert isinstance(bare, tuple) and [part.shape for part in bare] == [(7, 24, 1, 1), (7, FEATURE_SIZE)]


def test_the_loss_is_cross_entropy(model, pixel_values):
    labels = torch.tensor([0, 1, 2, 3, 4, -100, 0])
    outputs = model(pixel_values, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(outputs.loss, expected)


CLASSES = torch.tensor([0, 1, 2, 3, 4, -100, 0])


def loss_and_gradients(model, pixel_values, **kwargs):
    model.zero_grad()
    loss = model(pixel_values, labels=CLASSES, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"relation_mask": torch.arange(7) != 2}, {"relation_batch_size": 3}], ids=str)
@pytest.mark.parametrize("weight", [0.25, 0.9])
def test_the_self_loss_is_that_of_the_other_scope(model, pixel_values, weight, options):
    """One forward has the loss and the gradients of two, weighted."""
    model.train()
    model.rbi.self_loss_weight = 0.0
    loss, gradients = loss_and_gradients(model, pixel_values, **options)
    self_loss, self_gradients = loss_and_gradients(model, pixel_values, relation_scope="self")
    assert (loss - self_loss).abs() > 1e-3
    model.rbi.self_loss_weight = weight
    actual_loss, actual = loss_and_gradients(model, pixel_values, **options)
    torch.testing.assert_close(actual_loss, (1 - weight) * loss + weight * self_loss)
    assert self_gradients.keys() <= gradients.keys() == actual.keys()
    for name, gradient in gradients.items():
        expected = (1 - weight) * gradient + weight * self_gradients.get(name, torch.zeros(()))
        torch.testing.assert_close(
            actual[name], expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text
        )


def test_in_training_there_are_answers_of_both_scopes(model, pixel_values, features):
    model.train()
    model.rbi.self_loss_weight = 0.5
    outputs = model(pixel_values, image_features=features)
    for scope, logits in (("batch", outputs.logits), ("self", outputs.self_logits)):
        torch.testing.assert_close(logits, logits_of(model, pixel_values, scope, image_features=features))
    pooled = model.rbi(pixel_values, image_features=features)
    alone = model.rbi(pixel_values, image_features=features, relation_scope="self")
    torch.testing.assert_close(pooled.self_pooler_output, alone.pooler_output)
    assert alone.self_pooler_output is None, "they are the answers"


@pytest.mark.parametrize(
    ("is_training", "weight", "scope"),
    [(False, 0.5, "batch"), (False, 0.5, None), (True, 0.0, None), (True, 0.5, "self")],
)
def test_without_a_self_loss_nothing_is_added(model, pixel_values, is_training, weight, scope):
    model.train(is_training)
    model.rbi.self_loss_weight = weight
    outputs = model(pixel_values, labels=CLASSES, relation_scope=scope)
    assert outputs.self_logits is None
    expected = nn.functional.cross_entropy(outputs.logits, CLASSES, ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected)
    assert model.rbi(pixel_values, relation_scope=scope).self_pooler_output is None


def test_the_self_loss_keeps_rows_that_are_not_finite_apart(model, pixel_values, features):
    model.train()
    model.rbi.self_loss_weight = 0.5
    features[5, 0] = torch.inf
    outputs = model(pixel_values, image_features=features, labels=CLASSES)  # its label is -100
    assert outputs.self_logits[5].isnan().all() and outputs.self_logits[CLASSES >= 0].isfinite().all()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("scope", ["self", "batch"])
def test_image_features_stand_for_the_backbone(model, pixel_values, scope):
    features, outputs = model.rbi.extract_features(pixel_values)
    assert features.shape == (7, FEATURE_SIZE) and outputs.last_hidden_state.shape == (7, 24, 1, 1)
    expected = model(pixel_values, relation_scope=scope).logits
    calls = []
    model.rbi.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert_same_answers(model(pixel_values, relation_scope=scope, image_features=features).logits, expected)
    assert not calls
    if scope == "self":
        assert_same_answers(model(relation_scope=scope, image_features=features).logits, expected)


def test_pixels_are_not_needed_without_relations(config, features):
    config.relation_position_encoding = "none"
    model = RBIForImageClassification(config).eval()
    assert logits_of(model, None, image_features=features).isfinite().all()


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_features_without_pixels_are_refused_in_scope_batch(model, features):
    with pytest.raises(ValueError, match=r"`pixel_values` are needed for PSNR.*pass them too"):
        model(image_features=features, relation_scope="batch")


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([0, 1, 2, 3, 4, 5, 0], r"`labels` hold 5, but must be in 0\.\.4.*`num_labels`"),
        ([0, 1, 2, 3, 4, -1, 0], r"`labels` hold -1, but must be in 0\.\.4.*-100"),
        ([0, 1, 2], r"`labels` are for 3 images, but the batch holds 7"),
    ],
    ids=["above", "below", "number"],
)
def test_bad_labels_are_refused(model, pixel_values, labels, named):
    with pytest.raises(ValueError, match=named):
        model(pixel_values, labels=torch.tensor(labels))


@pytest.mark.parametrize(
    ("num_labels", "labels", "oracle"),
    [
        (1, torch.randn(7), nn.functional.mse_loss),
        (5, torch.rand(7, 5).round(), nn.functional.binary_cross_entropy_with_logits),
    ],
    ids=["regression", "multi_label"],
)
def test_labels_of_other_problems_are_taken(config, pixel_values, num_labels, labels, oracle):
    config.num_labels = num_labels
    outputs = RBIForImageClassification(config).eval()(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, oracle(outputs.logits.squeeze(), labels))


CLASSES_OF_SEVEN = torch.tensor([0, 1, 2, 3, 4, 0, -100])


@pytest.mark.parametrize(
    "labels", [CLASSES_OF_SEVEN.int(), CLASSES_OF_SEVEN.to(torch.int16), CLASSES_OF_SEVEN[:, None]]
)
def test_class_numbers_of_any_integer_type_are_taken(model, pixel_values, labels):
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, CLASSES_OF_SEVEN))
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "named"),
    [
        (None, 5, torch.eye(5, dtype=torch.int64)[[0] * 7], r"torch\.int64 of shape \(7, 5\).*`argmax\(-1\)`"),
        (None, 5, torch.zeros(7), r"torch\.float32 of shape \(7,\).*whole numbers of shape \(7,\)"),
        (None, 5, torch.zeros(7, 3), r"\(7, 3\), but must have the shape \(7, 5\)"),
        ("single_label_classification", 5, torch.eye(5)[[0] * 7], r"torch\.float32 .*`argmax\(-1\)`"),
        ("single_label_classification", 5, torch.zeros(7), r"torch\.float32 of shape \(7,\).*one class number"),
        ("single_label_classification", 5, torch.zeros(7, dtype=torch.bool), r"torch\.bool .*one class number"),
        ("multi_label_classification", 5, torch.zeros(7, dtype=torch.int64), r"must have the shape \(7, 5\)"),
        ("multi_label_classification", 5, torch.full((7, 5), 2), r"`labels` hold 2.0, but must be in \[0, 1\]"),
        ("multi_label_classification", 5, torch.full((7, 5), math.nan), r"`labels` hold nan"),
        (None, 1, torch.zeros(7, 2), r"\(7, 2\), but must have the shape \(7, 1\)"),
    ],
)
def test_labels_of_the_wrong_kind_are_named(config, pixel_values, problem_type, num_labels, labels, named):
    config.num_labels, config.problem_type = num_labels, problem_type
    with pytest.raises(UserError, match=named):
        RBIForImageClassification(config).eval()(pixel_values, labels=labels)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("multi_label_classification", 5, torch.eye(5, dtype=torch.int64)[[0, 1, 2, 3, 4, 0, 1]]),
        (None, 5, torch.eye(5, dtype=torch.bool)[[0, 1, 2, 3, 4, 0, 1]]),
        ("regression", 1, torch.arange(7)),
        ("regression", 5, torch.ones(7, 5, dtype=torch.float64)),
    ],
)
def test_labels_of_other_types_get_that_of_the_logits(config, pixel_values, problem_type, num_labels, labels):
    config.num_labels, config.problem_type = num_labels, problem_type
    model = RBIForImageClassification(config).eval()
    loss = model(pixel_values, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(model(pixel_values, labels=labels.float()).loss, loss)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "rbi")
    return tmp_path / "rbi"


def replace_backbone(folder, backbone_config):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"backbone_config": backbone_config.to_dict(), "feature_size": None}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "other",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[16, FEATURE_SIZE], depths=[1, 1], layer_type="basic"),
        ConvNextConfig(hidden_sizes=[8, 12, 16, FEATURE_SIZE], depths=[1, 1, 3, 1], image_size=32),
    ],
    ids=["family", "depth"],
)
def test_a_checkpoint_of_another_backbone_is_refused(saved, other):
    replace_backbone(saved, other)
    named = rf"lacks \d+ weights of the {other.model_type} backbone .*`rbi\.backbone\..*another backbone"
    with pytest.raises(ValueError, match=named):
        RBIForImageClassification.from_pretrained(saved)


def test_a_checkpoint_of_a_backbone_of_another_width_is_refused(saved):
    replace_backbone(saved, ConvNextConfig(hidden_sizes=[8, 12, 20, FEATURE_SIZE], depths=[1, 1, 1, 1], image_size=32))
    named = r"\d+ weights .*`rbi\.backbone\.encoder\.stages\.2.* \(16,.* instead of \(20,.*another model"
    with pytest.raises(RuntimeError, match=named):
        RBIForImageClassification.from_pretrained(saved)


def test_a_checkpoint_of_another_number_of_classes(saved, model):
    with pytest.raises(
        RuntimeError, match=r"`classifier\.bias` \(5,\) instead of \(9,\).*`ignore_mismatched_sizes=True`"
    ):
        RBIForImageClassification.from_pretrained(saved, num_labels=9)
    loaded = RBIForImageClassification.from_pretrained(saved, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (9, FEATURE_SIZE) and loaded.classifier.weight.isfinite().all()
    assert torch.equal(loaded.rbi.rra.value.weight, model.rbi.rra.value.weight)


def test_a_bare_backbone_is_refused_with_the_fix(backbone_config, tmp_path):
    ConvNextModel(backbone_config).save_pretrained(tmp_path)
    config = RBIConfig(backbone_config=backbone_config)
    with pytest.raises(ValueError, match=r"bare backbone, which `RBIModel\.from_backbone_pretrained` takes"):
        RBIModel.from_pretrained(tmp_path, config=config)


def test_a_truncated_file_is_refused(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for length in (len(content) - 4, len(content) // 2, 100, 4):
        path.write_bytes(content[:length])
        with pytest.raises(OSError, match=r"weights of .*rbi cannot be read .*truncated or was altered.*again"):
            RBIForImageClassification.from_pretrained(saved)


@pytest.mark.parametrize("tamper", ["length", "offsets", "json", "shape"])
def test_a_file_with_an_altered_header_is_refused(saved, tamper):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header["classifier.weight"]
    if tamper == "offsets":
        entry["data_offsets"] = [entry["data_offsets"][0], len(data) + 64]
    elif tamper == "shape":
        entry["shape"] = [entry["shape"][0] + 1, entry["shape"][1]]
    encoded = json.dumps(header).encode()
    if tamper == "json":
        encoded = encoded.replace(b'"dtype"', b'"dtype', 1)
    claimed = 2**62 if tamper == "length" else len(encoded)
    path.write_bytes(struct.pack("<Q", claimed) + encoded + data)
    with pytest.raises(OSError, match=r"weights of .*rbi cannot be read .*truncated or was altered"):
        RBIForImageClassification.from_pretrained(saved)


@pytest.mark.parametrize("scope", ["self", "batch"])
def test_a_sharded_checkpoint_comes_back(model, pixel_values, scope, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded, info = RBIForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_answers(logits_of(loaded, pixel_values, scope), logits_of(model, pixel_values, scope))


def test_models_are_built_on_the_meta_device_to_load(saved, monkeypatch):
    devices = []

    def record(part, *args, original=ResidualRelationshipAttention.__init__, **kwargs):
        original(part, *args, **kwargs)
        devices.extend(parameter.device.type for parameter in part.parameters())

    monkeypatch.setattr(ResidualRelationshipAttention, "__init__", record)
    loaded = RBIForImageClassification.from_pretrained(saved)
    assert set(devices) == {"meta"}
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_weights_of_the_head_that_are_not_saved_get_their_start(saved, config):
    """As the config has it, and nothing that was left in memory."""
    path = saved / "config.json"
    fields = {
        "relation_position_encoding": "bias",
        "residual_gate": "learned",
        "attention_type": "cosine",
        "relation_gain": 0.75,
        "attention_temperature": 0.125,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    loaded, info = RBIForImageClassification.from_pretrained(saved, output_loading_info=True)
    rra, new = loaded.rbi.rra, {name.removeprefix("rbi.rra.") for name in info["missing_keys"]}
    if config.head_initialization == "standard":
        assert new == {"relation_gain", "logit_scale"}
        assert torch.equal(rra.relation_gain, torch.tensor([0.75]))
        torch.testing.assert_close(rra.logit_scale.exp(), torch.tensor([8.0]))
    else:
        assert new == {"residual.weight", "residual.bias", "gate.weight"}
        assert torch.equal(rra.residual.weight, torch.eye(FEATURE_SIZE))
        assert not rra.residual.bias.any() and not rra.gate.weight.any()


# --- Outputs ---------------------------------------------------------------------------------------------------------


def test_features_that_are_not_finite_do_not_poison_gradients_in_scope_self(model, pixel_values, features):
    features[BAD_ROW, 3] = math.nan
    labels = torch.arange(7) % 5
    labels[BAD_ROW] = -100
    model(pixel_values, labels=labels, image_features=features, relation_scope="self").loss.backward()
    assert model.rbi.rra.value.weight.grad.isfinite().all() and model.classifier.weight.grad.isfinite().all()
    assert model.rbi.rra.value.weight.grad.abs().max() > 0
