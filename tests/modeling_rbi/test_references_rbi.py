# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The reference bank: how it is chosen and read, what attention makes of it, and that it goes with the model."""

import copy
import itertools
import json
import logging
import math
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoModelForImageClassification, ResNetConfig, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import (
    MAX_REFERENCES,
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    bank_rbi,
    choose_references,
    references_rbi,
)
from training.data.image_dataset import ImageDataset


FEATURE_SIZE = 24
NUM_LABELS = 5
NUM_REFERENCES = 9
# Of the references: all classes, one of them once, and two that are not known.
LABELS = torch.tensor([0, 1, -100, 2, 2, 3, 4, -100, 4])
CLASS_NAMES = {label: f"class {label}" for label in range(NUM_LABELS)}
IMAGENET_MEAN, IMAGENET_STD = (
    torch.tensor(values, dtype=torch.float64)[:, None, None]
    for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


def make_images(number, size=32, seed=1):
    """Different smooth images, (number, 3, size, size), normalized with ImageNet's mean and std."""
    images = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear").double()
    return ((images - IMAGENET_MEAN) / IMAGENET_STD).float()


def make_items(number, labels=None, **kwargs):
    """A data set of dicts, by default with labels in turn; -100 leaves the label out."""
    labels = [index % NUM_LABELS for index in range(number)] if labels is None else labels
    images = make_images(number, **kwargs)
    return [
        {"pixel_values": image} | ({} if label == -100 else {"labels": label})
        for image, label in zip(images, labels, strict=True)
    ]


def randomize_(module, std=0.4):
    """Weights far from their start, where nothing is zero and no two terms are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def make_model(config, reference_features=None, reference_pixels=None):
    """A model in evaluation whose head has random weights, with a bank if there are features for it."""
    model = RBIForImageClassification(config)
    for part in (model.rbi.rra, model.classifier):
        randomize_(part)
    if model.rbi.rra.relation_gain is not None:
        nn.init.normal_(model.rbi.rra.relation_gain, mean=0.1, std=0.02)
    model.eval()
    if reference_features is not None:
        model.set_reference_features(reference_features, reference_pixels)
    return model


@pytest.fixture
def reference_features():
    return torch.randn(NUM_REFERENCES, FEATURE_SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def reference_pixels():
    return make_images(NUM_REFERENCES, seed=2)


@pytest.fixture
def bare_model(config):
    """Both presets, without a bank."""
    return make_model(config)


@pytest.fixture
def model(bare_model):
    """Both presets, with a bank of images that went through the backbone."""
    # Features that differ as those of a trained backbone do.
    for name, parameter in bare_model.rbi.backbone.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif "layer_scale" in name:
            nn.init.ones_(parameter)
    bare_model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    return bare_model


@pytest.fixture
def resnet_model():
    """It takes images of any size, and has batch normalization."""
    backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return make_model(RBIConfig.paper(backbone_config=backbone_config, feature_size=12, num_labels=NUM_LABELS))


@pytest.fixture
def features(pixel_values):
    return torch.randn(len(pixel_values), FEATURE_SIZE)


def logits_of(model, pixel_values=None, **kwargs):
    with torch.no_grad():
        return model(pixel_values, **kwargs).logits


def state_of(model):
    """All that a failed call must leave as it was."""
    state = {name: value.clone() for name, value in itertools.chain(model.named_parameters(), model.named_buffers())}
    return model.config.to_dict(), [module.training for module in model.modules()], state


def assert_same_state(state, other):
    assert state[:2] == other[:2]
    assert state[2].keys() == other[2].keys()
    for name, value in state[2].items():
        assert torch.equal(value, other[2][name]), name


def moved_(module, scale=1.0):
    """Other weights than before."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


# --- An image's answer, and the company of the batch ----------------------------------------------------------------


def companies(number):
    yield make_images(number, seed=11)
    yield torch.zeros(number, 3, 32, 32)
    yield 1e4 * torch.randn(number, 3, 32, 32)
    for bad in (math.nan, math.inf, -math.inf):
        yield torch.full((number, 3, 32, 32), bad)
        images = make_images(number, seed=12)
        images[:, 1, 5, 7] = bad
        yield images


@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_answer_is_bitwise_the_same_in_any_company(model, pixel_values, place):
    alone = pixel_values[[place] * 7]
    expected = logits_of(model, alone)[place]
    assert expected.isfinite().all()
    for company in companies(7):
        company[place] = pixel_values[place]
        assert torch.equal(logits_of(model, company)[place], expected)
    # Which scope "batch" does not promise.
    assert not torch.equal(
        logits_of(model, alone, relation_scope="batch")[place],
        logits_of(model, pixel_values, relation_scope="batch")[place],
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_reach_nobody_else(model, pixel_values, features, bad):
    expected = logits_of(model, pixel_values, image_features=features)
    features[2, 5] = bad
    logits = logits_of(model, pixel_values, image_features=features)
    others = torch.arange(7) != 2
    assert torch.equal(logits[others], expected[others])
    assert logits[2].isnan().all()


def test_an_image_that_is_not_finite_has_no_answer_and_no_gradient_through_others(model, pixel_values, features):
    pixel_values[4, 0, 0, 0] = math.nan
    features.requires_grad_()
    logits = model.train()(pixel_values, image_features=features, relation_scope="reference").logits
    assert logits[4].isnan().all()
    logits[torch.arange(7) != 4].sum().backward()
    assert features.grad.isfinite().all() and (features.grad[4] == 0).all()
    gradients = {name: value.grad for name, value in model.rbi.rra.named_parameters() if value.grad is not None}
    assert {"query.weight", "key.weight", "value.weight"} <= gradients.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_jacobian_across_images_is_zero(model, pixel_values, is_training):
    model.train(is_training)
    jacobian = torch.autograd.functional.jacobian(
        lambda pixels: model(pixels, relation_scope="reference").logits, pixel_values[:3]
    )
    # (image, label, image of the pixel, ...)
    across = jacobian.abs().amax((1, 3, 4, 5))
    itself = torch.eye(3, dtype=torch.bool)
    assert (across[itself] > 1e-6).all()
    assert torch.equal(across[~itself], torch.zeros(6))


def test_the_answer_does_not_depend_on_the_batch_size(model):
    pixel_values = make_images(256, seed=3)
    whole = logits_of(model, pixel_values)
    assert whole.std(0).min() > 0.01
    for batch_size in (1, 2, 3, 7, 32, 100, 255):
        parts = torch.cat([logits_of(model, part) for part in pixel_values.split(batch_size)])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_any_batch_size_of_the_head_gives_the_same(model):
    pixel_values, features = make_images(256, seed=3), torch.randn(256, FEATURE_SIZE)
    whole = logits_of(model, pixel_values, image_features=features)
    for batch_size in range(1, 257, 3):
        part = logits_of(model, pixel_values[:batch_size], image_features=features[:batch_size])
        torch.testing.assert_close(part, whole[:batch_size], atol=1e-5, rtol=1e-5)


def test_the_answers_follow_a_permutation(model, pixel_values):
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    logits = logits_of(model, pixel_values)
    torch.testing.assert_close(logits_of(model, pixel_values[order]), logits[order], atol=1e-5, rtol=1e-5)


def test_the_order_of_the_references_is_of_no_account(config, pixel_values, features, reference_features):
    reference_pixels, order = make_images(NUM_REFERENCES), torch.randperm(NUM_REFERENCES)
    model = make_model(config, reference_features, reference_pixels)
    expected = logits_of(model, pixel_values, image_features=features)
    model.set_reference_features(reference_features[order], reference_pixels[order])
    logits = logits_of(model, pixel_values, image_features=features)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_masks_and_splits_of_the_batch_do_not_enter(model, pixel_values):
    expected = logits_of(model, pixel_values)
    for kwargs in ({"relation_mask": torch.tensor([1, 0, 0, 1, 1, 0, 1])}, {"relation_batch_size": 2}):
        assert torch.equal(logits_of(model, pixel_values, **kwargs), expected)


def test_the_references_count(model, pixel_values):
    logits = {scope: logits_of(model, pixel_values, relation_scope=scope) for scope in ("self", "batch", "reference")}
    for first, second in itertools.combinations(logits.values(), 2):
        assert (first - second).abs().max() > 0.01


def test_the_scope_with_a_bank(model, pixel_values):
    assert model.config.relation_scope == "reference"
    default, asked = logits_of(model, pixel_values), logits_of(model, pixel_values, relation_scope="reference")
    assert torch.equal(default, asked)
    model.train()
    torch.testing.assert_close(
        logits_of(model, pixel_values), logits_of(model, pixel_values, relation_scope="batch"), atol=0, rtol=0
    )


def test_a_model_without_a_bank_says_how_to_make_one(bare_model, pixel_values):
    with pytest.raises(ValueError, match=r"no reference bank to attend to.*`set_references`"):
        bare_model(pixel_values, relation_scope="reference")
    with pytest.raises(ValueError, match=r"no reference bank to add to.*`set_references`"):
        bare_model.add_references(make_items(5))
    with pytest.raises(ValueError, match=r"no reference bank to describe.*`set_references`"):
        bare_model.describe_references()


# --- The answer against the formula ---------------------------------------------------------------------------------


def block_means(images, size):
    """Images, (n, C, H, W), averaged down by a whole factor."""
    factor = images.shape[-1] // size
    return images.reshape(*images.shape[:2], size, factor, size, factor).mean((3, 5))


def oracle(model, features, pixel_values, reference_features, reference_pixels, mask=None):
    """
    Features after integration, attention and votes, image by image, head by head, in float64, from the model's config.
    """
    config, rra = model.config, model.rbi.rra
    weights = {name: value.double() for name, value in rra.named_parameters()}
    size = config.psnr_image_size or 32
    unit = [
        block_means(pixels.double() * IMAGENET_STD + IMAGENET_MEAN, min(size, pixels.shape[-1]))
        for pixels in (pixel_values, reference_pixels)
    ]
    kept = (unit[1].clamp(0, 1) * 255).round() / 255
    features, references = features.double(), reference_features.double()
    is_cosine, head_size = config.attention_type == "cosine", FEATURE_SIZE // config.num_attention_heads
    mean = references.mean(0) if is_cosine else torch.zeros(FEATURE_SIZE, dtype=torch.float64)
    mask = torch.ones(len(features), len(references), dtype=torch.bool) if mask is None else mask

    def project(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    labels = model.rbi.references.labels

    outputs, attentions, votes = [], [], []
    for image, own, allowed in zip(unit[0], features, mask, strict=True):
        psnr = -10 * (kept - image).square().mean((1, 2, 3)).log10()
        relations = psnr.clamp(0, config.psnr_max) / config.psnr_max
        own_relation = relations.new_ones(())
        if config.self_relation == "nearest" and allowed.any():
            own_relation = relations[allowed].max()
        relations = torch.cat([own_relation[None], relations])
        rows = torch.cat([own[None], references])
        visible = torch.cat([torch.tensor([True]), allowed])
        query, keys, values = project("query", own - mean), project("key", rows - mean), project("value", rows)
        messages, shares, ballots = [], [], []
        for head in range(config.num_attention_heads):
            part = slice(head * head_size, (head + 1) * head_size)
            q, k, v = query[part], keys[:, part], values[:, part]
            if is_cosine:
                q, k = q / q.norm(), k / k.norm(dim=1, keepdim=True)
            if config.relation_position_encoding in ("key", "key_value"):
                relation = relations[:, None] * weights["relation.weight"][part, 0]
                k = k + relation
                v = v + relation if config.relation_position_encoding == "key_value" else v

            def scores_of(temperature, gain, products=k @ q, head=head, relations=relations, visible=visible):
                if not is_cosine:
                    scores = products / math.sqrt(head_size)
                elif temperature is None:
                    scores = products * weights["logit_scale"][head].exp()
                else:
                    scores = products / temperature
                if config.relation_position_encoding == "bias":
                    gain = weights["relation_gain"][head] if gain is None else gain
                    scores = scores + gain * relations * config.psnr_max
                return torch.where(visible, scores, -math.inf)

            scores = scores_of(config.reference_temperature, config.reference_gain)
            if config.num_reference_neighbors is not None:
                ranked = scores[1:].argsort(descending=True)
                scores = scores.index_fill(0, 1 + ranked[config.num_reference_neighbors :], -math.inf)
            if config.reference_share is None:
                share = scores.exp() / scores.exp().sum()
            elif allowed.any():
                others = scores[1:].exp() / scores[1:].exp().sum() * config.reference_share
                share = torch.cat([others.new_tensor([1 - config.reference_share]), others])
            else:
                share = visible.double()
            messages.append(share @ v)
            shares.append(share)

            drawn = scores_of(None, None)[1:].exp()
            means = [
                drawn[labels == label].mean() if (labels == label).any() else drawn.new_zeros(())
                for label in range(config.num_labels)
            ]
            total = torch.stack(means).sum()
            ballots.append(torch.stack(means) / total if total > 0 else torch.stack(means))
        message = torch.cat(messages)
        residual = message if config.residual_gate == "none" else project("residual", own)
        if config.residual_gate == "learned":
            joined = torch.cat([message, residual, message - residual])
            beta = 1 / (1 + torch.exp(-joined @ weights["gate.weight"][0]))
            message = beta * residual + (1 - beta) * message
        elif config.residual_gate == "sum":
            message = residual + message
        outputs.append(message)
        attentions.append(torch.stack(shares))
        votes.append(torch.stack(ballots).mean(0))
    return torch.stack(outputs), torch.stack(attentions), torch.stack(votes)


def some_references_masked(number=7):
    """Each image leaves out other references: none, some, all but one, all."""
    mask = torch.rand(number, NUM_REFERENCES, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0], mask[1], mask[2] = True, False, torch.arange(NUM_REFERENCES) == 4
    return mask


@pytest.mark.parametrize("num_neighbors", [None, 1, 3])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("residual_gate", ["learned", "sum", "none"])
@pytest.mark.parametrize("attention_type", ["dot_product", "cosine"])
@pytest.mark.parametrize("relation_position_encoding", ["key_value", "key", "bias", "none"])
def test_the_answer_is_its_formula(
    backbone_config,
    pixel_values,
    features,
    reference_features,
    reference_pixels,
    relation_position_encoding,
    attention_type,
    residual_gate,
    num_heads,
    num_neighbors,
):
    config = RBIConfig(
        backbone_config=backbone_config,
        feature_size=FEATURE_SIZE,
        num_labels=NUM_LABELS,
        num_attention_heads=num_heads,
        attention_type=attention_type,
        residual_gate=residual_gate,
        relation_position_encoding=relation_position_encoding,
        num_reference_neighbors=num_neighbors,
        psnr_image_size=16,
        self_relation="nearest" if num_heads == 1 else "one",
    )
    model = make_model(config, reference_features, reference_pixels)
    model.rbi.references.labels.copy_(LABELS)
    for mask, share in itertools.product((None, some_references_masked()), (None, 0.3)):
        # It can be changed after the model was built.
        config.reference_share = share
        config.reference_temperature, config.reference_gain = (None, None) if share is None else (0.4, 0.15)
        with torch.no_grad():
            outputs = model.rbi(pixel_values, image_features=features, reference_mask=mask, output_relations=True)
            expected, attention, votes = oracle(
                model, features, pixel_values, reference_features, reference_pixels, mask
            )
        torch.testing.assert_close(outputs.relation_attentions.double(), attention, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs.pooler_output.double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.reference_votes.double(), votes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [32, 64])
def test_the_presets_are_their_formula(config, reference_features, size):
    """Through the backbone, and with PSNR of full size at 32 px."""
    pixel_values, reference_pixels = make_images(5, size, seed=4), make_images(NUM_REFERENCES, size, seed=5)
    model = make_model(config, reference_features, reference_pixels)
    with torch.no_grad():
        features, _ = model.rbi.extract_features(pixel_values)
        outputs = model(pixel_values, output_relations=True)
        expected, attention, _ = oracle(model, features, pixel_values, reference_features, reference_pixels)
        logits = expected @ model.classifier.weight.double().T + model.classifier.bias.double()
    torch.testing.assert_close(outputs.relation_attentions.double(), attention, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.logits.double(), logits, atol=1e-4, rtol=1e-4)


def test_gradients_in_training_are_those_of_the_formula(
    config, pixel_values, features, reference_features, reference_pixels
):
    """Also those by way of the references' keys and values."""
    model = make_model(config, reference_features, reference_pixels).train()
    mask = some_references_masked()
    direction = torch.randn(7, FEATURE_SIZE)
    output = model.rbi(
        pixel_values, image_features=features, reference_mask=mask, relation_scope="reference"
    ).pooler_output
    expected, *_ = oracle(model, features, pixel_values, reference_features, reference_pixels, mask)
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)
    # A temperature and a gain of the references' own stand for the learned ones.
    is_fixed = {"logit_scale", "relation_gain"} if config.reference_temperature is not None else set()
    parameters = {name: value for name, value in model.rbi.rra.named_parameters() if name not in is_fixed}
    gradients = torch.autograd.grad((output * direction).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((expected * direction).sum(), list(parameters.values()))
    for name, gradient, expected_gradient in zip(parameters, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-3, msg=name)
        assert name == "key.bias" or gradient.abs().max() > 0


def test_the_untrained_kernel_gives_a_quarter_to_the_nearest(backbone_config, pixel_values, features):
    """The kernel preset as it starts: softmax of cosine over 0.3 and PSNR in dB, over the 8 nearest references."""
    model = RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config)).eval()
    references, pixels = torch.randn(12, FEATURE_SIZE), make_images(12, seed=2)
    model.set_reference_features(references, pixels)
    mean = references.mean(0)
    cosines = torch.cosine_similarity(features[:, None] - mean, references - mean, dim=-1)
    images, kept = (block_means(each * IMAGENET_STD + IMAGENET_MEAN, 16).float() for each in (pixel_values, pixels))
    psnr = -10 * (images[:, None] - kept).square().mean((2, 3, 4)).log10()
    scores = cosines / 0.3 + psnr
    attention = scores.masked_fill(scores.argsort(descending=True).argsort() >= 8, -math.inf).softmax(-1)
    with torch.no_grad():
        outputs = model.rbi(pixel_values, image_features=features, output_relations=True)
    # The bank keeps 8 bits of its images.
    torch.testing.assert_close(outputs.relation_attentions[:, 0, 1:], attention / 4, atol=1e-3, rtol=5e-3)
    torch.testing.assert_close(outputs.relation_attentions[:, 0, 0], torch.full((7,), 0.75))
    expected = 0.75 * features + 0.25 * attention @ references
    torch.testing.assert_close(outputs.pooler_output, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_share_of_the_references_does_not_depend_on_their_number(config, pixel_values, share):
    config.reference_share = share
    model = make_model(config)
    for number in (1, 5, 50):
        model.set_references(make_items(number, seed=2), strategy="random")
        with torch.no_grad():
            attention = model(pixel_values, output_relations=True).relation_attentions
        torch.testing.assert_close(attention[..., 1:].sum(-1), torch.full((7, 1), share))
        torch.testing.assert_close(attention[..., 0], torch.full((7, 1), 1 - share))
        mask = torch.zeros(7, number, dtype=torch.bool)
        with torch.no_grad():
            attention = model(pixel_values, reference_mask=mask, output_relations=True).relation_attentions
        assert torch.equal(attention[..., 0], torch.ones(7, 1)) and (attention[..., 1:] == 0).all()


def test_relations_on_request(model, pixel_values):
    with torch.no_grad():
        outputs = model(pixel_values, output_relations=True)
    attention, relations = outputs.relation_attentions, outputs.relation_similarities
    assert attention.shape == (7, 1, 1 + NUM_REFERENCES) and relations.shape == (7, 1 + NUM_REFERENCES)
    torch.testing.assert_close(attention.sum(-1), torch.ones(7, 1))
    own, others = relations[:, 0], relations[:, 1:]
    assert (others > 0).all() and (others < 1).all()
    expected = torch.ones(7) if model.config.self_relation == "one" else others.amax(1)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("num_neighbors", [1, 4, NUM_REFERENCES, 100])
def test_only_the_nearest_references_are_attended_to(model, pixel_values, num_neighbors):
    attentions = []
    for number in (None, num_neighbors):
        model.config.num_reference_neighbors = number
        with torch.no_grad():
            attentions.append(model(pixel_values, output_relations=True).relation_attentions[:, 0, 1:])
    every, few = attentions
    kept = few > 0
    assert (kept.sum(-1) == min(num_neighbors, NUM_REFERENCES)).all()
    # They are those of the highest attention, which keeps its proportions.
    expected = torch.where(kept, every, 0.0)
    expected = expected / expected.sum(-1, keepdim=True) * few.sum(-1, keepdim=True)
    torch.testing.assert_close(few, expected, atol=1e-6, rtol=1e-4)
    least, left_out = every[kept].view(7, -1).amin(1), torch.where(kept, 0.0, every).amax(1)
    assert (least >= left_out).all()


def test_an_image_of_the_bank_has_the_relation_1_to_itself(model):
    pixel_values = torch.stack([item["pixel_values"] for item in make_items(NUM_REFERENCES, seed=2)])
    with torch.no_grad():
        relations = model(pixel_values, output_relations=True).relation_similarities[:, 1:]
    assert torch.equal(relations.diagonal(), torch.ones(NUM_REFERENCES))
    assert relations[~torch.eye(NUM_REFERENCES, dtype=torch.bool)].max() < 0.8


# --- Votes and new classes ------------------------------------------------------------------------------------------


@pytest.fixture
def voting_model(config, reference_features, reference_pixels):
    """Both presets, with labels of some references."""
    model = make_model(config)
    model.set_reference_features(reference_features, reference_pixels, LABELS)
    return model


def votes_of(model, pixel_values, features, **kwargs):
    with torch.no_grad():
        return model.rbi(pixel_values, image_features=features, **kwargs).reference_votes


def test_votes_are_shares_of_the_classes(voting_model, pixel_values, features):
    votes = votes_of(voting_model, pixel_values, features)
    assert (votes >= 0).all()
    torch.testing.assert_close(votes.sum(-1), torch.ones(7))
    for scope in ("self", "batch"):
        assert votes_of(voting_model, pixel_values, features, relation_scope=scope) is None


def test_a_class_does_not_gain_by_more_references(
    backbone_config, pixel_values, features, reference_features, reference_pixels
):
    """Each one twice of one class: the mean attention to it stays (with cosines, the mean that they are off moves)."""
    model = make_model(RBIConfig.paper(backbone_config=backbone_config, num_labels=NUM_LABELS))
    votes = []
    for rows in (torch.arange(NUM_REFERENCES), torch.tensor([*range(NUM_REFERENCES), 6, 8])):
        model.set_reference_features(reference_features[rows], reference_pixels[rows], LABELS[rows])
        votes.append(votes_of(model, pixel_values, features))
    assert LABELS[6] == LABELS[8] and LABELS.tolist().count(LABELS[8]) == 2
    torch.testing.assert_close(*votes, atol=1e-5, rtol=1e-4)


def test_references_without_a_label_do_not_vote(voting_model, pixel_values, features):
    expected = votes_of(voting_model, pixel_values, features)
    mask = (LABELS != -100).expand(7, -1)
    if voting_model.config.self_relation == "one":
        torch.testing.assert_close(votes_of(voting_model, pixel_values, features, reference_mask=mask), expected)
    none = ~mask
    assert (votes_of(voting_model, pixel_values, features, reference_mask=none) == 0).all()
    voting_model.rbi.references.labels.fill_(-100)
    assert (votes_of(voting_model, pixel_values, features) == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_votes_have_their_weight_in_the_answer(voting_model, pixel_values, features, weight):
    logits = logits_of(voting_model, pixel_values, image_features=features)
    votes = votes_of(voting_model, pixel_values, features)
    voting_model.config.reference_vote_weight = weight
    mixed = logits_of(voting_model, pixel_values, image_features=features)
    if weight == 0:
        assert torch.equal(mixed, logits)
    expected = (1 - weight) * logits.softmax(-1) + weight * votes
    torch.testing.assert_close(mixed.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    # The other scopes have none.
    for scope in ("self", "batch"):
        logits = logits_of(voting_model, pixel_values, image_features=features, relation_scope=scope)
        voting_model.config.reference_vote_weight = 0.0
        same = logits_of(voting_model, pixel_values, image_features=features, relation_scope=scope)
        assert torch.equal(logits, same)
        voting_model.config.reference_vote_weight = weight


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_votes_hide_no_row_that_is_not_finite(voting_model, pixel_values, features, bad):
    voting_model.config.reference_vote_weight = 0.5
    expected = logits_of(voting_model, pixel_values, image_features=features)
    features[2, 3] = bad
    logits = logits_of(voting_model, pixel_values, image_features=features)
    assert logits[2].isnan().all()
    others = torch.arange(7) != 2
    assert torch.equal(logits[others], expected[others])


def test_gradients_of_votes(voting_model, pixel_values, features):
    """They train the temperature and the gain that the references' attention leaves alone."""
    voting_model.config.reference_vote_weight = 0.5
    mask = some_references_masked()
    voting_model.train()(
        pixel_values,
        labels=torch.arange(7) % NUM_LABELS,
        image_features=features,
        reference_mask=mask,
        relation_scope="reference",
    ).loss.backward()
    for name, parameter in voting_model.rbi.rra.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert name == "key.bias" or parameter.grad.abs().max() > 0, name


def new_images(number=4, labels=None):
    return make_items(number, [index % 2 for index in range(number)] if labels is None else labels, seed=21)


def test_classes_are_added(voting_model, pixel_values):
    model, state = voting_model, voting_model.classifier.state_dict()
    before = {scope: logits_of(model, pixel_values, relation_scope=scope) for scope in ("self", "batch")}
    model.add_classes(["owl", "crow"], new_images())
    config = model.config
    assert config.num_labels == model.num_labels == 7 and config.num_added_classes == 2
    assert (config.id2label[5], config.id2label[6]) == ("owl", "crow")
    assert config.label2id == {name: label for label, name in config.id2label.items()}
    assert model.rbi.references.labels.tolist() == [*LABELS.tolist(), 5, 6, 5, 6]
    assert config.references["num_references"] == NUM_REFERENCES + 4
    assert torch.equal(model.classifier.weight[:5], state["weight"])
    assert not model.classifier.training and model.classifier.weight.requires_grad
    # In the other scopes the old classes are answered as before, the new ones never.
    for scope, logits in before.items():
        after = logits_of(model, pixel_values, relation_scope=scope)
        assert torch.equal(after[:, :5], logits) and (after.softmax(-1)[:, 5:] == 0).all()
    # In "reference" votes decide, and the classifier orders the classes that it knows.
    with torch.no_grad():
        outputs = model.rbi(pixel_values)
        known = model.classifier(outputs.pooler_output)[:, :5].softmax(-1)
    expected = outputs.reference_votes.clone()
    expected[:, :5] *= (known / known.amax(-1, keepdim=True)).sqrt()
    expected = expected / expected.sum(-1, keepdim=True)
    logits = logits_of(model, pixel_values)
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(7))


def test_images_of_a_new_class_are_known_again(backbone_config):
    """By an untrained kernel, whose votes go by likeness."""
    model = RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config, num_labels=NUM_LABELS)).eval()
    items = new_images()
    model.set_references(make_items(20, seed=2))
    model.add_classes(["owl", "crow"], items)
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    noisy = pixel_values + 0.05 * torch.randn_like(pixel_values)
    assert logits_of(model, noisy).argmax(-1).tolist() == [5, 6, 5, 6]


def test_a_frozen_classifier_stays_so(voting_model):
    voting_model.classifier.requires_grad_(False)
    voting_model.add_classes(["owl", "crow"], new_images())
    assert not any(parameter.requires_grad for parameter in voting_model.classifier.parameters())


def test_classes_are_added_again_and_saved(voting_model, pixel_values, tmp_path):
    voting_model.add_classes(["owl"], new_images(2, [0, 0]))
    voting_model.add_classes(["crow"], new_images(3, [0, 0, 0]))
    assert voting_model.config.num_added_classes == 2 and voting_model.config.id2label[6] == "crow"
    logits = logits_of(voting_model, pixel_values)
    voting_model.save_pretrained(tmp_path)
    loaded = RBIForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.num_added_classes == 2 and loaded.config.id2label == voting_model.config.id2label
    assert torch.equal(logits_of(loaded, pixel_values), logits)
    assert loaded.describe_references()["references_per_class"]["crow"] == 3


@pytest.mark.parametrize(
    ("names", "make_arguments", "message"),
    [
        ([], new_images, "must be new and differ"),
        (["owl", "owl"], new_images, "must be new and differ"),
        (["LABEL_3", "owl"], new_images, "must be new and differ"),
        (["owl", "crow"], lambda: new_images(3, [0, 0, 0]), "'crow'"),
        (["owl"], lambda: new_images(3, [0, 0, 1]), r"label 1, but the model's classes are 0\.\.0"),
        (["owl"], lambda: new_images(3, [0, 0, -100]), "1 have none"),
        (["owl"], lambda: new_images(3, [-100] * 3), "needs labels"),
        (["owl"], lambda: [], "no images"),
    ],
)
def test_classes_that_cannot_be_added_are_refused(voting_model, names, make_arguments, message):
    before, bank, classifier = state_of(voting_model), voting_model.rbi.references, voting_model.classifier
    with pytest.raises(ValueError, match=message):
        voting_model.add_classes(names, make_arguments())
    assert_same_state(state_of(voting_model), before)
    assert voting_model.rbi.references is bank and voting_model.classifier is classifier


def test_classes_are_not_added_to_a_bank_without_labels_of_the_others(voting_model, reference_features):
    voting_model.rbi.references.labels[LABELS == 3] = -100
    with pytest.raises(ValueError, match="1 classes have none in the bank, for instance 'LABEL_3'"):
        voting_model.add_classes(["owl"], new_images(2, [0, 0]))
    voting_model.remove_references()
    with pytest.raises(ValueError, match=r"no reference bank to add classes to.*`set_references`"):
        voting_model.add_classes(["owl"], new_images(2, [0, 0]))


# --- Images in 8 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_8_bits_keep_psnr(config, size):
    """At most half a gray level of 256 off by the triangle inequality, and in dB what rounding noise makes of it."""
    images = make_images(20, size, seed=6)
    decibels = torch.linspace(5, 50, 46)
    noise = torch.randn(46, *images.shape, generator=torch.Generator().manual_seed(0))
    scale = (10 ** (-decibels / 20))[:, None, None, None, None] / IMAGENET_STD
    # Noise in blocks, which averaging down leaves.
    noise = nn.functional.interpolate(noise.flatten(0, 2)[:, None, :16, :16], size=(size, size)).view_as(noise)
    noisy = (images + noise * scale).flatten(0, 1).float()
    model = make_model(config, torch.randn(20, FEATURE_SIZE), images)
    with torch.no_grad():
        relations = model.rbi.rpe.relate_to_references(noisy, model.rbi.references, len(noisy))[0][:, 1:]
    small = min(size, config.psnr_image_size or 32)
    exact, references = (
        block_means(pixels.double() * IMAGENET_STD + IMAGENET_MEAN, small) for pixels in (noisy, images)
    )
    for reference in range(20):
        error = (exact - references[reference]).square().mean((1, 2, 3))
        psnr = -10 * error.log10()
        kept = relations[:, reference].double() * 50
        off = (10 ** (-kept / 20) - error.sqrt()).abs()
        assert off[psnr < 49].max() <= 0.5 / 255 + 1e-6
        difference = (kept - psnr).abs()
        assert difference[psnr < 35].max() < 0.1 and difference[psnr < 35].mean() < 0.02
        assert difference[psnr < 45].max() < 0.4
        assert (psnr < 45).sum() > 100 and ((psnr > 35) & (psnr < 45)).any()


def test_small_images_are_the_averaged_ones(config):
    pixel_values = make_images(6, 64)
    model = make_model(config, torch.randn(6, FEATURE_SIZE), pixel_values)
    size = config.psnr_image_size or 32
    expected = block_means(pixel_values.double() * IMAGENET_STD + IMAGENET_MEAN, size)
    images = model.rbi.references.images
    assert images.dtype == torch.uint8 and images.shape == (6, 3, size, size)
    assert (images.double() - expected * 255).abs().max() <= 0.5 + 1e-3


def test_images_beyond_8_bits_are_cut(config):
    pixel_values = torch.stack([torch.full((3, 32, 32), value) for value in (-100.0, 100.0)])
    model = make_model(config, torch.randn(2, FEATURE_SIZE), pixel_values)
    assert (model.rbi.references.images[0] == 0).all() and (model.rbi.references.images[1] == 255).all()


def test_images_that_are_averaged_down_already(config):
    """Those of cached features: averaging commutes with the normalization."""
    pixel_values, features = make_images(6, 64), torch.randn(6, FEATURE_SIZE)
    small = nn.functional.adaptive_avg_pool2d(pixel_values, config.psnr_image_size or 32)
    models = [make_model(copy.deepcopy(config), features, pixels) for pixels in (pixel_values, small)]
    images, other_images = (model.rbi.references.images.int() for model in models)
    assert (images - other_images).abs().max() <= 1 and (images == other_images).float().mean() > 0.99


# --- Which references an image attends to ---------------------------------------------------------------------------


def test_masked_references_get_no_attention(model, pixel_values):
    mask = some_references_masked()
    model.config.num_reference_neighbors = None
    with torch.no_grad():
        outputs = model(pixel_values, reference_mask=mask, output_relations=True)
    attention = outputs.relation_attentions[:, 0]
    assert torch.equal(attention[:, 1:] > 0, mask)
    torch.testing.assert_close(attention.sum(-1), torch.ones(7))
    assert torch.equal(logits_of(model, pixel_values, reference_mask=mask.int()), outputs.logits)


def test_masked_references_do_not_enter(bare_model, pixel_values, features, reference_features, reference_pixels):
    """Neither by their images nor, but for the mean that cosines are taken off, by their features."""
    mask = torch.ones(7, NUM_REFERENCES, dtype=torch.bool)
    mask[:, [2, 5]] = False
    others, other_pixels = reference_features.clone(), reference_pixels.clone()
    # The mean stays.
    others[2] += 3
    others[5] -= 3
    other_pixels[[2, 5]] = pixel_values[:2]
    logits = []
    for bank in ((reference_features, reference_pixels), (others, other_pixels)):
        bare_model.set_reference_features(*bank)
        logits.append(logits_of(bare_model, pixel_values, image_features=features, reference_mask=mask))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    unmasked = logits_of(bare_model, pixel_values, image_features=features)
    assert (unmasked - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("num_neighbors", [None, 3])
def test_without_any_reference_an_image_is_by_itself(config, pixel_values, num_neighbors):
    config.num_reference_neighbors = num_neighbors
    model = make_model(config)
    model.set_references(make_items(NUM_REFERENCES), strategy="random")
    nobody = torch.zeros(7, NUM_REFERENCES, dtype=torch.bool)
    alone = logits_of(model, pixel_values, relation_scope="self")
    torch.testing.assert_close(logits_of(model, pixel_values, reference_mask=nobody), alone, atol=1e-5, rtol=1e-5)
    # Row by row.
    nobody[3] = True
    logits = logits_of(model, pixel_values, reference_mask=nobody)
    others = torch.arange(7) != 3
    torch.testing.assert_close(logits[others], alone[others], atol=1e-5, rtol=1e-5)
    assert (logits[3] - alone[3]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(NUM_REFERENCES,), (7, NUM_REFERENCES + 1), (NUM_REFERENCES, 7), (1, 1)])
def test_a_mask_of_another_shape_is_refused(model, pixel_values, shape):
    with pytest.raises(ValueError, match=rf"`reference_mask` must have the shape \(7, {NUM_REFERENCES}\)"):
        model(pixel_values, reference_mask=torch.ones(shape))


def test_images_are_needed_for_psnr(model, features):
    with pytest.raises(ValueError, match=r"`pixel_values` are needed for PSNR with `relation_scope=\"reference\"`"):
        model(image_features=features)


# --- Keys and values of the references ------------------------------------------------------------------------------


@contextmanager
def counted_rows(model):
    """How many rows each call of the projections to keys and values has."""
    rows = []
    handles = [
        projection.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        for projection in (model.rbi.rra.key, model.rbi.rra.value)
    ]
    yield rows
    for handle in handles:
        handle.remove()


def test_keys_and_values_are_computed_once(bare_model, pixel_values):
    with counted_rows(bare_model) as rows:
        bare_model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
        assert rows == [NUM_REFERENCES] * 2
        rows.clear()
        for batch_size in (7, 3, 1, 7):
            logits_of(bare_model, pixel_values[:batch_size])
        # Their own alone.
        assert rows == [7, 7, 3, 3, 1, 1, 7, 7]
        rows.clear()
        bare_model.train()
        bare_model.rbi.self_loss_weight = 0.0
        bare_model(pixel_values, relation_scope="reference")
        assert sorted(rows) == [7, 7, NUM_REFERENCES, NUM_REFERENCES]


def assert_bank_is_fresh(model, pixel_values):
    """In training keys and values are those of the weights as they are: evaluation must agree."""
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(pixel_values, relation_scope="reference").logits
    torch.testing.assert_close(logits_of(model, pixel_values, relation_scope="reference"), expected)
    mean, keys, values = model.rbi.rra.project_references(model.rbi.references)
    for name, value in (("mean", mean), ("keys", keys), ("values", values)):
        torch.testing.assert_close(getattr(model.rbi.references, name), value, msg=name)


def test_keys_and_values_are_fresh_after_training(model, pixel_values):
    before = model.rbi.references.keys.clone()
    model.train()
    optimizer = torch.optim.AdamW(model.rbi.rra.parameters(), lr=0.1)
    loss = model(pixel_values, labels=torch.arange(7) % NUM_LABELS, relation_scope="reference").loss
    loss.backward()
    optimizer.step()
    model.eval()
    assert (model.rbi.references.keys - before).abs().max() > 1e-3
    assert_bank_is_fresh(model, pixel_values)


@pytest.mark.parametrize("part", ["model", "base"])
def test_keys_and_values_are_fresh_after_load_state_dict(model, pixel_values, part):
    other = copy.deepcopy(model)
    moved_(other.rbi.rra)
    other.eval()
    expected = logits_of(other, pixel_values)
    source, target = (other, model) if part == "model" else (other.rbi, model.rbi)
    target.load_state_dict(source.state_dict())
    if part == "model":
        assert torch.equal(logits_of(model, pixel_values), expected)
    assert_bank_is_fresh(model, pixel_values)


def test_keys_and_values_are_fresh_after_from_pretrained(model, pixel_values, tmp_path):
    moved_(model.rbi.rra)
    model.save_pretrained(tmp_path)
    loaded = RBIForImageClassification.from_pretrained(tmp_path)
    assert_bank_is_fresh(loaded, pixel_values)
    assert torch.equal(logits_of(loaded, pixel_values), logits_of(model.eval(), pixel_values))


def test_references_have_no_gradient_and_are_no_parameters(model, pixel_values):
    assert not [name for name, _ in model.named_parameters() if "references" in name]
    assert all(not buffer.requires_grad for buffer in model.rbi.references.buffers())
    saved = {name for name in model.state_dict() if "references" in name}
    assert saved == {f"rbi.references.{name}" for name in ("features", "labels", "images", "probe")}


def test_attention_dropout_acts_in_training_alone(config, pixel_values, reference_features, reference_pixels):
    config.attention_dropout = 0.5
    model = make_model(config, reference_features, reference_pixels)
    assert torch.equal(logits_of(model, pixel_values), logits_of(model, pixel_values))
    with torch.no_grad():
        attention = model.train()(pixel_values, relation_scope="reference", output_relations=True).relation_attentions
    assert 0.2 < (attention == 0).float().mean() < 0.8


# --- A bank without images ----------------------------------------------------------------------------------------


def test_without_images_no_pixels_are_needed(bare_model, pixel_values):
    bare_model.set_references(make_items(NUM_REFERENCES), strategy="random", keep_images=False)
    assert bare_model.rbi.references.images is None and bare_model.config.references["image_shape"] is None
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixel_values)
    expected = logits_of(bare_model, pixel_values)
    assert torch.equal(logits_of(bare_model, image_features=features), expected)
    # Pixels have no part in it.
    other = logits_of(bare_model, pixel_values.flip(0), image_features=features)
    assert torch.equal(other, expected)
    with pytest.raises(ValueError, match="keeps no images"):
        bare_model.rbi.references.unit_range_images()


def test_without_images_the_kernel_attends_by_features_alone(backbone_config, features, reference_features):
    models = []
    for encoding in ("bias", "none"):
        torch.manual_seed(0)
        config = RBIConfig.kernel(backbone_config=backbone_config, relation_position_encoding=encoding)
        model = RBIModel(config).eval()
        model.set_reference_features(reference_features)
        models.append(model)
    models[1].rra.load_state_dict(randomize_(models[0].rra).state_dict(), strict=False)
    with torch.no_grad():
        related, unrelated = (model.eval()(image_features=features, output_relations=True) for model in models)
    torch.testing.assert_close(related.relation_attentions, unrelated.relation_attentions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(related.pooler_output, unrelated.pooler_output, atol=1e-5, rtol=1e-5)
    assert unrelated.relation_similarities is None
    assert (related.relation_similarities.amax(1) == related.relation_similarities.amin(1)).all()


def test_without_images_all_relations_are_the_mean_one(bare_model, pixel_values):
    items = make_items(NUM_REFERENCES)
    bare_model.set_references(items, strategy="random")
    expected = bare_model.config.references["mean_similarity"]
    assert expected < 0.9
    bare_model.set_references(items, strategy="random", keep_images=False)
    assert bare_model.config.references["mean_similarity"] == expected
    with torch.no_grad():
        relations = bare_model(pixel_values, output_relations=True).relation_similarities
    torch.testing.assert_close(relations[:, 1:], torch.full((7, NUM_REFERENCES), expected))
    bare_model.add_references(items[:2], strategy="random")
    assert bare_model.config.references["mean_similarity"] == expected


def test_the_mean_relation_of_a_large_bank_is_close(monkeypatch, bare_model):
    images, features = make_images(300), torch.randn(300, FEATURE_SIZE)
    bare_model.set_reference_features(features, images)
    exact = bare_model.config.references["mean_similarity"]
    monkeypatch.setattr(references_rbi, "NUM_MEAN_REFERENCES", 60)
    bare_model.set_reference_features(features, images)
    assert bare_model.config.references["mean_similarity"] == pytest.approx(exact, abs=0.01)
    assert bare_model.config.references["mean_similarity"] != exact


def test_the_mean_relation_is_that_of_the_images(bare_model):
    images = make_images(NUM_REFERENCES)
    bare_model.set_reference_features(torch.randn(NUM_REFERENCES, FEATURE_SIZE), images)
    size = bare_model.config.psnr_image_size or 32
    small_images = block_means(images.double() * IMAGENET_STD + IMAGENET_MEAN, size)
    relations = [
        -10 * (first - second).square().mean().log10() / 50
        for first, second in itertools.combinations(small_images, 2)
    ]
    expected = torch.stack(relations).mean().item()
    assert bare_model.config.references["mean_similarity"] == pytest.approx(expected, abs=1e-3)


# --- Which images are chosen --------------------------------------------------------------------------------------


def numbers_of_each(chosen, labels):
    return torch.bincount(labels[chosen], minlength=NUM_LABELS).tolist()


def uneven_labels():
    return torch.tensor([0] * 20 + [1] * 7 + [2] * 2 + [3] * 11 + [4] * 5)[torch.randperm(45)]


@pytest.mark.parametrize("strategy", ["balanced", "herding"])
@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [
        ({"per_class": 1}, [1, 1, 1, 1, 1]),
        ({"per_class": 5}, [5, 5, 2, 5, 5]),
        ({"per_class": 100}, [20, 7, 2, 11, 5]),
        ({"num_references": 10}, [2, 2, 2, 2, 2]),
        ({"num_references": 22}, [5, 5, 2, 5, 5]),
        ({"num_references": 34}, [10, 7, 2, 10, 5]),
        ({"num_references": 1000}, [20, 7, 2, 11, 5]),
        ({}, [20, 7, 2, 11, 5]),
    ],
)
def test_classes_are_balanced(strategy, kwargs, numbers):
    labels = uneven_labels()
    features = torch.randn(45, 6)
    for seed in range(3):
        chosen = choose_references(labels, CLASS_NAMES, strategy=strategy, seed=seed, features=features, **kwargs)
        assert numbers_of_each(chosen, labels) == numbers
        assert (chosen.diff() > 0).all() and chosen.dtype == torch.int64


@pytest.mark.parametrize("strategy", ["balanced", "herding"])
@pytest.mark.parametrize("number", [1, 3, 7, 13, 29])
def test_numbers_differ_by_one_where_they_do_not_divide(strategy, number):
    labels = torch.arange(50) % NUM_LABELS
    features = torch.randn(50, 6)
    chosen = choose_references(labels, CLASS_NAMES, num_references=number, strategy=strategy, features=features)
    numbers = numbers_of_each(chosen, labels)
    assert sum(numbers) == number and max(numbers) - min(numbers) <= 1


def test_balanced_is_the_choice_where_labels_are_known():
    labels = uneven_labels()
    kwargs = {"num_references": 15, "seed": 3}
    by_default = choose_references(labels, CLASS_NAMES, **kwargs)
    assert torch.equal(by_default, choose_references(labels, CLASS_NAMES, strategy="balanced", **kwargs))
    labels[4] = -100
    by_default = choose_references(labels, CLASS_NAMES, **kwargs)
    assert torch.equal(by_default, choose_references(labels, CLASS_NAMES, strategy="random", **kwargs))


@pytest.mark.parametrize("strategy", ["balanced", "random"])
def test_the_seed_makes_the_choice(strategy):
    labels = torch.arange(60) % NUM_LABELS
    choices = [
        choose_references(labels, CLASS_NAMES, num_references=10, strategy=strategy, seed=seed).tolist()
        for seed in (0, 0, 1, 2)
    ]
    assert choices[0] == choices[1]
    assert len({tuple(choice) for choice in choices}) == 3
    # And it alone.
    torch.manual_seed(1234)
    again = choose_references(labels, CLASS_NAMES, num_references=10, strategy=strategy, seed=0)
    assert again.tolist() == choices[0]


@pytest.mark.parametrize("kwargs", [{"num_references": 12, "strategy": "random"}, {"per_class": 4}])
def test_every_image_has_the_same_chance(kwargs):
    """By Hoeffding's inequality the bound fails for one of 15 images once in 10^8."""
    labels = torch.arange(15) % NUM_LABELS if "strategy" in kwargs else torch.arange(30) % NUM_LABELS
    share = {15: 12 / 15, 30: 4 / 6}[len(labels)]
    chosen = torch.cat([choose_references(labels, CLASS_NAMES, seed=seed, **kwargs) for seed in range(1000)])
    frequency = torch.bincount(chosen, minlength=len(labels)) / 1000
    assert (frequency - share).abs().max() < 0.1


def test_random_pays_no_heed_to_classes():
    labels = torch.tensor([0] * 90 + [-100] * 10)
    chosen = choose_references(labels, CLASS_NAMES, num_references=50, strategy="random")
    assert len(chosen) == len(set(chosen.tolist())) == 50
    assert torch.equal(choose_references(labels, CLASS_NAMES, strategy="random"), torch.arange(100))


def greedy_herding(features):
    """The order of iCaRL's construction of an exemplar set, by trying each image, in float64."""
    features = features.double().numpy()
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, order = features.mean(0), []
    while len(order) < len(features):
        left = [row for row in range(len(features)) if row not in order]
        distances = [np.linalg.norm(mean - features[[*order, row]].mean(0)) for row in left]
        order.append(left[int(np.argmin(distances))])
    return order


@pytest.mark.parametrize("per_class", [1, 2, 5, 9])
def test_herding_is_the_greedy_choice(per_class):
    labels = torch.arange(45)[torch.randperm(45)] % NUM_LABELS
    features = torch.randn(45, 8) + 2 * torch.randn(NUM_LABELS, 8)[labels]
    expected = []
    for label in range(NUM_LABELS):
        rows = (labels == label).nonzero().flatten()
        expected += rows[greedy_herding(features[rows])[:per_class]].tolist()
    for seed in (0, 1):
        chosen = choose_references(
            labels, CLASS_NAMES, per_class=per_class, strategy="herding", features=features, seed=seed
        )
        assert chosen.tolist() == sorted(expected)


def test_herding_without_labels_is_of_all_images():
    features = torch.randn(30, 8) + 1
    chosen = choose_references(
        torch.full((30,), -100), CLASS_NAMES, num_references=6, strategy="herding", features=features
    )
    assert chosen.tolist() == sorted(greedy_herding(features)[:6])


def test_herding_comes_closer_to_the_mean_than_chance():
    labels = torch.zeros(200, dtype=torch.int64)
    features = nn.functional.normalize(torch.randn(200, 16) + 0.5, dim=-1)

    def error(chosen):
        return (features[chosen].mean(0) - features.mean(0)).norm()

    def choose(strategy, seed):
        return choose_references(labels, {0: "all"}, 10, strategy=strategy, seed=seed, features=features)

    by_chance = [error(choose("balanced", seed)) for seed in range(50)]
    assert error(choose("herding", 0)) < min(by_chance) / 2


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([0, 1, 2, 3, 4], {"strategy": "nearest"}, "`strategy` must be one of balanced, herding, random.*'nearest'"),
        ([0, 1, 2, 3, 4], {"per_class": 1, "num_references": 5}, "`per_class` or `num_references`, not both"),
        ([0, 1, 2, 3, 4], {"per_class": 0}, "`per_class` must be at least 1, got 0"),
        ([0, 1, 2, 3, 4], {"num_references": -3}, "`num_references` must be at least 1, got -3"),
        ([], {}, "no images"),
        ([0, 1, 2, 3, 4, 5], {}, r"label 5, but the model's classes are 0\.\.4 \(-100: no label\)"),
        ([0, 1, 2, -1], {}, "label -1"),
        ([0, 1, -7, 9], {"strategy": "random"}, "label 9"),
        ([0, 1, 2, 3, 4], {"per_class": 1, "strategy": "random"}, "give `num_references` instead"),
        ([-100, -100], {"per_class": 1}, "give `num_references` instead"),
        ([0, 1, 2, 3, 4, -100], {"strategy": "balanced"}, "1 have none.*`add_references`"),
        ([0, 1, 2, 3, 4, -100, -100], {"strategy": "herding"}, "2 have none.*`add_references`"),
        ([-100, -100], {"strategy": "balanced"}, "needs labels, and no image has one"),
        ([0, 1, 4, 4], {}, "2 of the model's classes have no image, for instance 'class 2'"),
        ([0, 1, 2, 3, 4], {"strategy": "herding"}, "needs `features`"),
        ([0] * (MAX_REFERENCES + 1), {"strategy": "random"}, f"{MAX_REFERENCES + 1} references .*{MAX_REFERENCES}"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        choose_references(torch.tensor(labels, dtype=torch.int64), CLASS_NAMES, **kwargs)


def test_as_many_references_as_the_limit():
    labels = torch.arange(MAX_REFERENCES + 10) % NUM_LABELS
    assert len(choose_references(labels, CLASS_NAMES, num_references=MAX_REFERENCES)) == MAX_REFERENCES


@contextmanager
def transformers_log(caplog):
    """Transformers' warnings, which do not reach the root logger."""
    logger = logging.getLogger("transformers")
    package = logging.getLogger("modeling_rbi")
    for each in (logger, package):
        each.addHandler(caplog.handler)
    caplog.clear()
    try:
        yield caplog
    finally:
        for each in (logger, package):
            each.removeHandler(caplog.handler)


def test_small_classes_are_warned_of(caplog):
    with transformers_log(caplog):
        choose_references(uneven_labels(), CLASS_NAMES, per_class=6)
        assert "2 classes have fewer than 6 images" in caplog.text
    with transformers_log(caplog):
        choose_references(uneven_labels(), CLASS_NAMES, per_class=2)
        assert caplog.text == ""


# --- What images are read from ------------------------------------------------------------------------------------


NAMES = list(CLASS_NAMES.values())
PROCESSOR = ViTImageProcessorPil(
    size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)


class CountingDataset(Dataset):
    """Items of a list, with a note of those that were asked for."""

    def __init__(self, items, labels=None):
        self.items, self.read = items, []
        if labels is not None:
            self.labels = labels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        return self.items[index]


def collate(items):
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def pil_images(number, size=(40, 36)):
    pixels = np.random.default_rng(0).integers(0, 256, (number, 4, 4, 3)).astype("uint8")
    return [Image.fromarray(each).resize(size, Image.Resampling.BILINEAR) for each in pixels]


def pil_dataset(number, column="label"):
    columns = {"image": pil_images(number), column: [index % NUM_LABELS for index in range(number)]}
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict(columns, features=features)


def bank_of(model):
    """The bank's tensors, those that are saved."""
    return {name: value for name, value in model.rbi.references.state_dict().items() if name != "probe"}


def assert_same_bank(bank, other):
    assert bank.keys() == other.keys()
    torch.testing.assert_close(bank["features"], other["features"], atol=1e-5, rtol=1e-5)
    assert torch.equal(bank["labels"], other["labels"])
    assert torch.equal(bank["images"], other["images"])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("form", ["list", "dataset", "labeled dataset", "generator", "loader", "batches", "numpy"])
def test_images_come_in_several_forms(bare_model, form, batch_size):
    items = make_items(23)
    images = {
        "list": lambda: items,
        "dataset": lambda: CountingDataset(items),
        "labeled dataset": lambda: CountingDataset(items, [item["labels"] for item in items]),
        "generator": lambda: iter(items),
        "loader": lambda: DataLoader(CountingDataset(items), batch_size=5, collate_fn=collate),
        "batches": lambda: [collate(items[:20]), collate(items[20:])],
        "numpy": lambda: [
            {"pixel_values": each["pixel_values"].numpy(), "labels": np.int64(each["labels"])} for each in items
        ],
    }[form]()
    bare_model.set_references(images, batch_size=batch_size)
    bank = bank_of(bare_model)
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixel_values)
    torch.testing.assert_close(bank["features"], features, atol=1e-5, rtol=1e-5)
    assert bank["labels"].tolist() == [item["labels"] for item in items]
    assert torch.equal(bank["images"], bare_model.rbi.rpe.thumbnails(pixel_values))


def test_batches_are_as_large_as_asked_for(bare_model):
    sizes = []
    bare_model.rbi.backbone.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0])) if args else None
    )
    bare_model.set_references(make_items(23), batch_size=10)
    # The last is the pattern by which the backbone is known.
    assert sizes == [10, 10, 3, 1]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_images_of_a_hugging_face_data_set(bare_model, column):
    split = pil_dataset(20, column)
    bare_model.set_references(split, image_processor=PROCESSOR)
    bank = bank_of(bare_model)
    pixel_values = PROCESSOR(split["image"][:], return_tensors="pt")["pixel_values"]
    bare_model.set_references(
        [{"pixel_values": each, column: split[index][column]} for index, each in enumerate(pixel_values)]
    )
    assert_same_bank(bank, bank_of(bare_model))
    assert bank["labels"].tolist() == split[column][:]


def test_only_the_chosen_images_of_a_hugging_face_data_set_are_decoded(bare_model):
    decoded = []

    def transform(examples):
        decoded.extend(examples["label"])
        return {**PROCESSOR(examples["image"], return_tensors="pt"), "label": examples["label"]}

    split = pil_dataset(40)
    split.set_transform(transform)
    bare_model.set_references(split, per_class=2, seed=5)
    assert len(decoded) == 10
    rows = choose_references(torch.arange(40) % NUM_LABELS, CLASS_NAMES, per_class=2, seed=5)
    bank = bank_of(bare_model)
    bare_model.set_references([split[int(row)] for row in rows])
    assert_same_bank(bank, bank_of(bare_model))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, None], [None] * 6])
def test_unknown_labels_of_a_hugging_face_data_set(bare_model, labels):
    split = datasets.Dataset.from_dict(
        {"image": pil_images(6), "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    bare_model.set_references(split, image_processor=PROCESSOR)
    assert bare_model.rbi.references.labels.tolist() == [-100 if label is None else label for label in labels]


def test_images_of_a_stream(bare_model):
    split = pil_dataset(12)
    bare_model.set_references(split.to_iterable_dataset(), image_processor=PROCESSOR)
    bank = bank_of(bare_model)
    bare_model.set_references(split, image_processor=PROCESSOR)
    assert_same_bank(bank, bank_of(bare_model))


def test_an_attribute_labels_that_is_something_else_is_passed_over(bare_model):
    images = CountingDataset(make_items(20), labels=NAMES)
    bare_model.set_references(images, per_class=1)
    assert len(images.read) == 20 and len(bare_model.rbi.references) == 5


def test_images_of_the_training_package(bare_model):
    split = pil_dataset(30)
    images = ImageDataset(split, lambda image: PROCESSOR(image, return_tensors="pt")["pixel_values"][0])
    bare_model.set_references(images, per_class=2, seed=1)
    bank = bank_of(bare_model)
    bare_model.set_references(split, per_class=2, seed=1, image_processor=PROCESSOR)
    assert_same_bank(bank, bank_of(bare_model))


@pytest.mark.parametrize(
    "kwargs", [{"per_class": 2}, {"num_references": 7}, {"num_references": 7, "strategy": "random"}]
)
def test_only_the_chosen_images_are_read_where_labels_are_known(bare_model, kwargs):
    items = make_items(40)
    labels = torch.tensor([item["labels"] for item in items])
    images = CountingDataset(items, labels.tolist())
    bare_model.set_references(images, seed=3, **kwargs)
    expected = choose_references(labels, CLASS_NAMES, seed=3, **kwargs).tolist()
    assert images.read == expected
    bank = bank_of(bare_model)
    # Where they are not, all are read, and the choice is the same.
    unlabeled = CountingDataset(items)
    bare_model.set_references(unlabeled, seed=3, **kwargs)
    assert unlabeled.read == list(range(40))
    assert_same_bank(bank, bank_of(bare_model))


def test_herding_reads_all_and_keeps_the_greedy_choice(bare_model):
    items = make_items(40)
    labels = torch.tensor([item["labels"] for item in items])
    images = CountingDataset(items, labels.tolist())
    bare_model.set_references(images, per_class=3, strategy="herding")
    assert images.read == list(range(40))
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(torch.stack([item["pixel_values"] for item in items]))
    expected = choose_references(labels, CLASS_NAMES, 3, strategy="herding", features=features)
    torch.testing.assert_close(bank_of(bare_model)["features"], features[expected], atol=1e-5, rtol=1e-5)


def test_images_without_labels(bare_model, pixel_values):
    bare_model.set_references([{"pixel_values": image} for image in pixel_values])
    assert (bare_model.rbi.references.labels == -100).all()
    facts = bare_model.config.references
    assert (facts["num_references"], facts["num_labeled"], facts["strategy"]) == (7, 0, "random")
    bare_model.set_references(make_items(9, [0, 1, 2, -100, 3, -100, 4, 0, -100]))
    assert bare_model.config.references["num_labeled"] == 6
    bare_model.set_references([{"pixel_values": image, "label": None} for image in pixel_values])
    assert (bare_model.rbi.references.labels == -100).all()


def test_labels_have_no_part_in_the_answer(bare_model, pixel_values, features, reference_features, reference_pixels):
    logits = []
    for labels in (None, torch.arange(NUM_REFERENCES) % NUM_LABELS):
        bare_model.set_reference_features(reference_features, reference_pixels, labels)
        logits.append(logits_of(bare_model, pixel_values, image_features=features))
    assert torch.equal(*logits)


def test_the_bank_is_made_in_evaluation_mode(resnet_model):
    """Statistics of batch normalization are neither used by the batch nor changed."""
    model = resnet_model
    model.train()(make_images(8))
    before = state_of(model)
    model.set_references(make_items(10), batch_size=3)
    after = state_of(model)
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert model.training and all(module.training for module in model.modules())
    features = model.rbi.references.features
    with torch.no_grad():
        expected, _ = model.eval().rbi.extract_features(make_images(10))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_parts_that_are_frozen_in_evaluation_mode_stay_so(resnet_model, tmp_path):
    """As statistics of batch normalization are, when a pretrained backbone is fine-tuned on small batches."""
    model = resnet_model.train()
    frozen = [module for module in model.rbi.backbone.modules() if isinstance(module, nn.BatchNorm2d)][::2]
    for module in frozen:
        module.eval()
    modes = [module.training for module in model.modules()]
    model.set_references(make_items(10))
    model.rbi.references.train()
    assert [module.training for module in model.modules() if module is not model.rbi.references] == modes
    model.add_references(make_items(5))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        model.add_references(bad_images("not finite"))
    model.rbi.references.train()
    assert [module.training for module in model.modules() if module is not model.rbi.references] == modes


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strategy": "nearest"},
        {"per_class": 1, "num_references": 5},
        {"per_class": 0},
        {"num_references": 0},
        {"per_class": 1, "strategy": "random"},
    ],
)
def test_arguments_are_checked_before_anything_is_read(bare_model, kwargs):
    images = CountingDataset(make_items(10))
    with pytest.raises(ValueError, match=r"strategy|per_class|num_references"):
        bare_model.set_references(images, **kwargs)
    assert images.read == []


def raising(items):
    yield from items
    raise OSError("the disk is gone")


def bad_images(form):
    items = make_items(10)
    return {
        "no dicts": [item["pixel_values"] for item in items],
        "no pixels": [{"pixels": item["pixel_values"]} for item in items],
        "pil without processor": [{"image": image} for image in pil_images(3)],
        "two axes": [{"pixel_values": torch.zeros(32, 32)}],
        "five axes": [{"pixel_values": torch.zeros(1, 2, 3, 32, 32)}],
        "channels": [{"pixel_values": torch.zeros(1, 32, 32)}],
        "bytes": [{"pixel_values": torch.zeros(3, 32, 32, dtype=torch.uint8)}],
        "labels for one image": [{"pixel_values": torch.zeros(3, 32, 32), "labels": [0, 1]}],
        "labels for a batch": [{"pixel_values": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(3).long()}],
        "labels with a fraction": [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0.5}],
        "labels in words": [{"pixel_values": torch.zeros(3, 32, 32), "labels": "red"}],
        "labels of a column in words": datasets.Dataset.from_dict({"image": pil_images(2), "label": ["red", "blue"]}),
        "labels of an attribute with a fraction": CountingDataset(items, [0.5] * 10),
        "a batch": collate(items),
        "several splits": datasets.DatasetDict(train=pil_dataset(5)),
        "one after the other of several sizes": [*items, *make_items(5, size=24)],
        "label out of range": [*items, {"pixel_values": torch.zeros(3, 32, 32), "labels": 5}],
        "nothing": [],
        "nothing to come": iter(()),
        "not finite": [*items, {"pixel_values": torch.full((3, 32, 32), math.nan), "labels": 0}],
        "missing class": items[:4],
        "several sizes": [collate(make_items(5, size=32)), collate(make_items(5, size=24))],
        "broken": raising(items),
    }[form]


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("no dicts", ValueError, "must be dicts with `pixel_values`.*got a Tensor"),
        ("no pixels", ValueError, "must be dicts with `pixel_values`.*got the keys pixels"),
        ("pil without processor", ValueError, "pass the model's `image_processor`"),
        ("two axes", ValueError, r"must be \(C, H, W\).*got \(32, 32\)"),
        ("five axes", ValueError, r"batch \(B, C, H, W\), got \(1, 2, 3, 32, 32\)"),
        ("channels", ValueError, "have 1 channels, but the model takes 3"),
        ("bytes", ValueError, "torch.uint8, but must be float"),
        ("labels for one image", ValueError, r"one whole number for each image, got torch.int64 \(2,\)"),
        ("labels for a batch", ValueError, r"one whole number for each image, got torch.int64 \(3,\)"),
        ("labels with a fraction", ValueError, "one whole number for each image, got torch.float32"),
        ("labels in words", ValueError, "one whole number for each image, got 'red'"),
        ("labels of a column in words", ValueError, r"one whole number for each image, got \['red', 'blue'\]"),
        ("labels of an attribute with a fraction", ValueError, "one whole number for each image, got torch.float32"),
        ("a batch", ValueError, "keys pixel_values, labels: pass one of its data sets, or, if it is a batch, a list"),
        ("several splits", ValueError, "a DatasetDict with the keys train: pass one of its data sets"),
        ("one after the other of several sizes", ValueError, "several sizes: pass them through the model's image"),
        ("label out of range", ValueError, r"label 5, but the model's classes are 0\.\.4"),
        ("nothing", ValueError, "no images"),
        ("nothing to come", ValueError, "no images"),
        ("not finite", ValueError, "Image 10 has features that are not finite"),
        ("missing class", ValueError, "1 of the model's classes have no image, for instance 'LABEL_4'"),
        ("broken", OSError, "the disk is gone"),
    ],
)
@pytest.mark.parametrize(
    ("call", "has_bank"), [("set_references", False), ("set_references", True), ("add_references", True)]
)
def test_a_failed_call_leaves_the_model_as_it_was(bare_model, call, has_bank, form, error, message):
    if has_bank:
        bare_model.set_references(make_items(10, seed=3))
    bare_model.train(form in ("not finite", "broken", "missing class"))
    before, bank = state_of(bare_model), bare_model.rbi.references
    with pytest.raises(error, match=message):
        getattr(bare_model, call)(bad_images(form), batch_size=4)
    assert_same_state(state_of(bare_model), before)
    assert bare_model.rbi.references is bank
    assert bare_model.rbi.backbone.training == bare_model.training


def test_images_of_several_sizes_are_refused(resnet_model):
    model = resnet_model
    batches = [collate(make_items(5, size=size)) for size in (32, 24)]
    before = state_of(model)
    with pytest.raises(ValueError, match="have several sizes: pass them through the model's image processor"):
        model.set_references(batches)
    assert_same_state(state_of(model), before)


# --- The bank of a model --------------------------------------------------------------------------------------------


def test_the_config_lists_what_the_bank_holds(bare_model):
    bare_model.set_references(make_items(20), per_class=3, seed=4)
    size = bare_model.config.psnr_image_size or 32
    facts = dict(bare_model.config.references)
    assert 0 < facts.pop("mean_similarity") < 1
    assert facts == {
        "num_references": 15,
        "num_labeled": 15,
        "image_shape": [3, size, size],
        "strategy": "balanced",
        "per_class": 3,
        "seed": 4,
    }
    assert len(bare_model.rbi.references) == 15
    assert bare_model.config is bare_model.rbi.config
    json.dumps(bare_model.config.references)


def test_a_bank_takes_the_place_of_another(bare_model, pixel_values):
    bare_model.set_references(make_items(10, seed=3))
    bare_model.set_references(make_items(15, seed=4))
    logits = logits_of(bare_model, pixel_values)
    bare_model.remove_references()
    bare_model.set_references(make_items(15, seed=4))
    assert torch.equal(logits_of(bare_model, pixel_values), logits)
    assert len(bare_model.rbi.references) == 15


def test_references_are_removed(bare_model, pixel_values):
    before = state_of(bare_model)
    alone = logits_of(bare_model, pixel_values)
    bare_model.set_references(make_items(10))
    bare_model.remove_references()
    assert_same_state(state_of(bare_model), before)
    assert torch.equal(logits_of(bare_model, pixel_values), alone)
    bare_model.config.validate()
    # Another scope that was asked for stays.
    bare_model.set_references(make_items(10))
    bare_model.config.relation_scope = "batch"
    bare_model.remove_references()
    assert bare_model.config.relation_scope == "batch"


@pytest.mark.parametrize("keep_images", [True, False])
def test_references_are_added(bare_model, keep_images):
    first, second = make_items(10, seed=3), make_items(6, [-100] * 6, seed=4)
    bare_model.set_references(first, keep_images=keep_images, seed=8)
    bare_model.add_references(second, num_references=4, seed=2)
    labels = torch.full((6,), -100)
    rows = choose_references(labels, CLASS_NAMES, num_references=4, seed=2)
    facts = bare_model.config.references
    assert (facts["num_references"], facts["num_labeled"], facts["seed"]) == (14, 10, 8)
    bank = bank_of(bare_model)
    assert ("images" in bank) == keep_images
    bare_model.set_references([*first, *(second[row] for row in rows)], strategy="random", keep_images=keep_images)
    assert bank.keys() == bank_of(bare_model).keys()
    for name, value in bank_of(bare_model).items():
        torch.testing.assert_close(bank[name], value, msg=name)
    if keep_images:
        assert facts["mean_similarity"] == pytest.approx(bare_model.config.references["mean_similarity"])


def test_the_strategy_that_is_noted_is_the_one_that_chose(bare_model):
    """Images drawn at random may all have labels."""
    labels = [0, 1, 2, 3, 4] * 8 + [-100]
    bare_model.set_references(make_items(41, labels), num_references=2, seed=1)
    assert bare_model.config.references["num_labeled"] == 2
    assert bare_model.config.references["strategy"] == "random"


def test_nothing_is_added_to_references_of_another_backbone(bare_model):
    """The features of the new ones would be of another kind than those that are there."""
    bare_model.set_references(make_items(10))
    moved_(bare_model.rbi.backbone, 0.3)
    before = state_of(bare_model)
    for add in (bare_model.add_references, lambda images: bare_model.add_classes(["owl"], images)):
        with pytest.raises(ValueError, match=r"trained since the references were set.*`set_references`"):
            add(make_items(3, [0, 0, 0]))
    assert_same_state(state_of(bare_model), before)


def test_images_of_another_size_are_not_added(resnet_model):
    model = resnet_model
    model.set_references(make_items(5, size=32))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), but those to be added \(3, 24, 24\)"):
        model.add_references(make_items(5, size=24))
    assert_same_state(state_of(model), before)


def test_no_more_references_are_added_than_a_model_carries(monkeypatch, bare_model):
    monkeypatch.setattr(bank_rbi, "MAX_REFERENCES", 12)
    bare_model.set_references(make_items(10))
    before = state_of(bare_model)
    with pytest.raises(ValueError, match="15 references are more than a model carries"):
        bare_model.add_references(make_items(5))
    with pytest.raises(ValueError, match="13 references are more"):
        bare_model.set_reference_features(torch.randn(13, FEATURE_SIZE))
    assert_same_state(state_of(bare_model), before)


@pytest.mark.parametrize("keep_images", [True, False])
def test_the_bank_is_described(bare_model, keep_images, tmp_path):
    bare_model.save_pretrained(tmp_path / "without")
    bare_model.set_references(make_items(12, [0, 0, 1, 1, 1, 4, 2, 3, 4, 4, 4, 0]), keep_images=keep_images)
    bare_model.save_pretrained(tmp_path / "with")
    facts = bare_model.describe_references()
    assert facts.items() >= bare_model.config.references.items()
    assert facts["has_images"] == keep_images
    assert facts["references_per_class"] == {"LABEL_0": 3, "LABEL_1": 3, "LABEL_2": 1, "LABEL_3": 1, "LABEL_4": 4}
    without, with_bank = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("without", "with"))
    # Beside the header, which names the tensors.
    assert 0 < with_bank - without - facts["num_bytes"] < 1024
    json.dumps(facts)
    bare_model.bfloat16()
    assert bare_model.describe_references()["num_bytes"] < facts["num_bytes"]


def test_multiply_adds_are_those_of_the_tensors(bare_model):
    """The cost is linear in the references, and an image's own part does not depend on them."""
    costs = {}
    for number in (10, 20, 30):
        bare_model.set_references(make_items(number))
        costs[number] = bare_model.describe_references()["multiply_adds_per_image"]
    pixels = 3 * (bare_model.config.psnr_image_size or 32) ** 2
    assert costs[20] - costs[10] == costs[30] - costs[20] == 10 * (2 * FEATURE_SIZE + pixels)
    assert 2 * costs[10] - costs[20] == 3 * FEATURE_SIZE**2


def test_references_from_features(bare_model, pixel_values):
    items = make_items(NUM_REFERENCES)
    bare_model.set_references(items, strategy="random")
    expected, bank = logits_of(bare_model, pixel_values), bank_of(bare_model)
    pixels = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixels)
    labels = torch.tensor([item["labels"] for item in items])
    bare_model.remove_references()
    bare_model.set_reference_features(features.requires_grad_(), pixels, labels)
    assert_same_bank(bank_of(bare_model), bank)
    assert bare_model.config.relation_scope == "reference"
    torch.testing.assert_close(logits_of(bare_model, pixel_values), expected)


@pytest.mark.parametrize(
    ("make_arguments", "message"),
    [
        (lambda: (torch.randn(5, 7),), r"must have the shape \(N, 24\), N at least 1, got \(5, 7\)"),
        (lambda: (torch.randn(24),), r"must have the shape \(N, 24\)"),
        (lambda: (torch.randn(0, 24),), r"N at least 1, got \(0, 24\)"),
        (lambda: (torch.randn(5, 24).log(), make_images(5)), "features of reference 0 are not finite"),
        (lambda: (torch.randn(5, 24), make_images(4)), "hold 4 images, but `image_features` 5"),
        (lambda: (torch.randn(5, 24), make_images(5)[:, :1]), "have 1 channels, but the model takes 3"),
        (lambda: (torch.randn(3, 24), make_images(3)[0]), r"shape \(batch_size, num_channels, height, width\)"),
        (lambda: (torch.randn(5, 24), None, torch.zeros(4).long()), "`labels` are for 4 references, but .* hold 5"),
        (lambda: (torch.randn(5, 24), None, torch.full((5,), 9)), "label 9"),
    ],
)
def test_bad_reference_features_are_refused(bare_model, make_arguments, message):
    before = state_of(bare_model)
    with pytest.raises(ValueError, match=message):
        bare_model.set_reference_features(*make_arguments())
    assert_same_state(state_of(bare_model), before)


def test_the_base_model_has_a_bank_of_its_own(config, pixel_values):
    model = RBIModel(config).eval()
    randomize_(model.rra)
    model.set_references(make_items(10))
    with torch.no_grad():
        assert model(pixel_values, output_relations=True).relation_attentions.shape == (7, 1, 11)
    model.add_references(make_items(5, seed=9))
    assert model.describe_references()["num_references"] == 15
    model.remove_references()
    assert model.references is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_in_low_precision(model, pixel_values, dtype):
    pixel_values = pixel_values.to(dtype).float()
    expected = logits_of(model, pixel_values)
    model.to(dtype).eval()
    assert {value.dtype for value in model.rbi.references.buffers()} == {dtype, torch.int64, torch.uint8}
    logits = logits_of(model, pixel_values.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.15 * expected.std(0).max()
    # One that is made in that precision, too.
    model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    made = logits_of(model, pixel_values.to(dtype))
    assert (made.float() - expected).abs().max() < 0.15 * expected.std(0).max()


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_a_bank_under_autocast(model, pixel_values, is_training):
    expected = logits_of(model, pixel_values)
    model.train(is_training)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(
            pixel_values, labels=torch.arange(7) % NUM_LABELS, relation_scope="reference", output_relations=True
        )
    assert outputs.logits.dtype == torch.bfloat16 and outputs.relation_similarities.dtype == torch.float32
    assert (outputs.logits.float() - expected).abs().max() < 0.15 * expected.std(0).max()
    outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.rbi.rra.named_parameters() if value.grad is not None}
    assert "value.weight" in gradients and all(gradient.isfinite().all() for gradient in gradients.values())


# --- Saving and loading ---------------------------------------------------------------------------------------------


def vit_config():
    size = {"hidden_size": FEATURE_SIZE, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return ViTConfig(num_hidden_layers=1, num_attention_heads=2, **size)


@pytest.fixture(params=["convnext", "vit"])
def any_model(request, model):
    """A model with a bank; the names in ViT's files are not those of its modules."""
    if request.param == "convnext":
        return model
    config = copy.deepcopy(model.config)
    config.backbone_config, config.references, config.relation_scope = vit_config(), None, "self"
    model = make_model(config)
    model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("keep_images", [True, False])
def test_a_saved_bank_comes_back(any_model, pixel_values, keep_images, max_shard_size, tmp_path):
    model = any_model
    model.set_references(make_items(10), keep_images=keep_images)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".py"}
    expected = logits_of(model, pixel_values)
    loaded, info = RBIForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits_of(loaded, pixel_values), expected)
    assert loaded.config.references == model.config.references
    assert loaded.config.relation_scope == "reference"
    assert loaded.describe_references() == model.describe_references()
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [each(pixel_values).pooler_output for each in (base, model.rbi)]
    assert torch.equal(*outputs)
    # And once more, from the loaded one.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, pixel_values), expected)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["references"]["num_references"] == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_loads_in_low_precision(any_model, pixel_values, dtype, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = RBIForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    expected = any_model.to(dtype).eval()
    assert torch.equal(logits_of(loaded, pixel_values.to(dtype)), logits_of(expected, pixel_values.to(dtype)))
    # And back: what was saved so is the bank of the same backbone in full precision.
    loaded.save_pretrained(tmp_path / "low")
    RBIForImageClassification.from_pretrained(tmp_path / "low", dtype=torch.float32)


def test_a_bank_is_left_behind(any_model, pixel_values, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded, info = RBIForImageClassification.from_pretrained(
        tmp_path, references=None, relation_scope="self", output_loading_info=True
    )
    assert not info["unexpected_keys"] and loaded.rbi.references is None and loaded.config.references is None
    expected = logits_of(any_model, pixel_values, relation_scope="self")
    assert torch.equal(logits_of(loaded, pixel_values), expected)
    loaded.save_pretrained(tmp_path / "without")
    assert not [name for name in load_file(tmp_path / "without" / "model.safetensors") if "references" in name]
    assert RBIForImageClassification.from_pretrained(tmp_path / "without").config.references is None


@pytest.mark.parametrize("name", ["features", "images", "labels", "probe"])
def test_weights_without_the_bank_of_the_config_are_refused(any_model, name, tmp_path):
    any_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(key for key in weights if key.endswith(f"references.{name}"))]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"names {NUM_REFERENCES} references, but its weights hold none.*references=None"
    ):
        RBIForImageClassification.from_pretrained(tmp_path)


def test_a_bank_of_another_size_than_the_config_says_is_refused(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    changed = text.replace(f'"num_references": {NUM_REFERENCES}', '"num_references": 4')
    assert changed != text
    (tmp_path / "config.json").write_text(changed)
    with pytest.raises(RuntimeError, match=r"references\.\w+` \(9.* instead of \(4"):
        RBIForImageClassification.from_pretrained(tmp_path)


def test_references_do_not_start_anew(any_model, tmp_path):
    """As weights of other shapes do where that is asked for: they would be whatever is in memory."""
    any_model.save_pretrained(tmp_path)
    config = RBIConfig.from_pretrained(tmp_path)
    config.references = config.references | {"num_references": 4}
    with pytest.raises(RuntimeError, match=r"references\.\w+` \(9.* instead of \(4"):
        RBIForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    # Other weights can, with the references as they are.
    other = RBIForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert_same_bank(bank_of(other), bank_of(any_model))


def test_a_bank_of_another_backbone_is_warned_of_and_refused(any_model, caplog, tmp_path):
    with transformers_log(caplog):
        any_model.save_pretrained(tmp_path / "own")
        assert "references" not in caplog.text
    moved_(any_model.rbi.backbone, 0.3)
    with transformers_log(caplog):
        any_model.save_pretrained(tmp_path / "trained")
        assert "backbone has been trained since the references were set" in caplog.text
    for auto_class in (AutoModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match="computed by another backbone than its own, or before the"):
            auto_class.from_pretrained(tmp_path / "trained")
    loaded = RBIForImageClassification.from_pretrained(tmp_path / "trained", references=None, relation_scope="self")
    loaded.set_references(make_items(5))
    with transformers_log(caplog):
        loaded.save_pretrained(tmp_path / "anew")
        assert "references" not in caplog.text
    RBIForImageClassification.from_pretrained(tmp_path / "anew")


def test_training_the_head_leaves_the_bank_its_own(any_model, tmp_path):
    moved_(any_model.rbi.rra)
    moved_(any_model.classifier)
    any_model.train().save_pretrained(tmp_path)
    assert any_model.training and any_model.rbi.backbone.training
    RBIForImageClassification.from_pretrained(tmp_path)


def test_load_state_dict_takes_a_bank(any_model, pixel_values, tmp_path):
    expected = logits_of(any_model, pixel_values)
    any_model.save_pretrained(tmp_path)
    for state in (any_model.state_dict(), load_file(tmp_path / "model.safetensors")):
        other = copy.deepcopy(any_model)
        other.set_references(make_items(NUM_REFERENCES, seed=8), strategy="random")
        moved_(other)
        other.eval()
        assert (logits_of(other, pixel_values) - expected).abs().max() > 1e-3
        other.load_state_dict(state)
        assert torch.equal(logits_of(other, pixel_values), expected)


def test_load_state_dict_refuses_a_bank_of_another_size(model):
    state = model.state_dict()
    model.set_references(make_items(5))
    with pytest.raises(RuntimeError, match=r"size mismatch for rbi\.references\.features"):
        model.load_state_dict(state)
    model.remove_references()
    bare = model.state_dict()
    model.set_references(make_items(5))
    with pytest.raises(RuntimeError, match=r"Missing key.*rbi\.references\.features"):
        model.load_state_dict(bare)


def test_load_state_dict_does_not_drop_a_bank_silently(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    removed = copy.deepcopy(any_model)
    removed.remove_references()
    never_had = RBIForImageClassification(removed.config)
    states = (any_model.state_dict(), load_file(tmp_path / "model.safetensors"))
    for bare, state in itertools.product((removed, never_had), states):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*rbi\.references\.features"):
            bare.load_state_dict(state)
        outcome = bare.load_state_dict(state, strict=False)
        assert set(outcome.unexpected_keys) == {name for name in state if "references" in name}
        assert not outcome.missing_keys


def test_a_copy_has_a_bank_of_its_own(any_model, pixel_values):
    expected = logits_of(any_model, pixel_values)
    other = copy.deepcopy(any_model)
    any_model.set_references(make_items(5, seed=8))
    moved_(any_model)
    assert torch.equal(logits_of(other, pixel_values), expected)
    assert other.config.references["num_references"] == NUM_REFERENCES
    other.remove_references()
    assert any_model.config.references["num_references"] == 5


def test_the_pattern_tells_backbones_apart_and_not_precisions(any_model):
    base = any_model.rbi
    assert base.has_own_references()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert copy.deepcopy(base).to(dtype).has_own_references()
    assert references_rbi.PROBE_TOLERANCE <= 0.2
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(other.backbone.parameters()).fill_(math.nan)
    assert not other.has_own_references()
