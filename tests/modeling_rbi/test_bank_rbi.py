# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a bank stores: thumbnails in 8 bits, and labels, whose votes and answers are their definition."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.modeling_rbi.shared import (
    FEATURE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LABELS,
    NUM_LABELS,
    assert_same_answers,
    block_means,
    logits_of,
    make_features,
    make_images,
    make_model,
    some_references_masked,
)


# --- Thumbnails in 8 bits --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_8_bits_keep_psnr(config, size):
    """At most half a gray level of 256 off by the triangle inequality, and in dB what rounding noise makes of it."""
    images = make_images(8, size, seed=6)
    decibels = torch.linspace(5, 50, 46)
    noise = torch.randn(46, *images.shape, generator=torch.Generator().manual_seed(0))
    scale = (10 ** (-decibels / 20))[:, None, None, None, None] / IMAGENET_STD
    # Noise in blocks, which averaging down leaves.
    noise = nn.functional.interpolate(noise.flatten(0, 2)[:, None, :16, :16], size=(size, size)).view_as(noise)
    noisy = (images + noise * scale).flatten(0, 1).float()
    model = make_model(config, torch.randn(8, FEATURE_SIZE), images)
    with torch.no_grad():
        relations = model.rbi.rpe.relate_to_references(noisy, model.rbi.references, len(noisy))[0][:, 1:]
    small = min(size, config.psnr_image_size or 32)
    exact, references = (
        block_means(pixels.double() * IMAGENET_STD + IMAGENET_MEAN, small) for pixels in (noisy, images)
    )
    for reference in range(8):
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


# --- Votes of the labels ---------------------------------------------------------------------------------------------


# Class 2 has no reference, class 4 one, and three are unknown.
# Class 2 has no reference, class 4 one, and three are not known.
VARIED_LABELS = torch.tensor([0, 1, -100, 3, 3, 1, 4, -100, 0, 3, -100])


@pytest.fixture
def model(varied_model):
    """Both presets, with one and with several heads, and a head and a backbone of random weights."""
    return varied_model


def with_bank(model, labels=VARIED_LABELS, rows=None, weight=0.0):
    """The model with references of these labels, or with some rows of them."""
    rows = torch.arange(len(labels)) if rows is None else rows
    model.set_reference_features(make_features(len(labels))[rows], make_images(len(labels))[rows], labels[rows])
    model.config.reference_vote_weight = weight
    return model


def votes_of(model, pixel_values, features, **kwargs):
    with torch.no_grad():
        return model.rbi(pixel_values, image_features=features, **kwargs).reference_votes


def oracle(model, pixel_values, features, labels=VARIED_LABELS):
    """
    Votes, (B, num_labels), in float64 from the definition: for each head, the mean of exp(score) over the references
    of each class, over the sum of these; then the mean over the heads. With gradient.
    """
    config = model.config
    weights = {name: value.double() for name, value in model.rbi.rra.named_parameters()}
    references, size = make_features(len(labels)).double(), config.psnr_image_size or 32
    own, kept = (
        nn.functional.avg_pool2d(pixels.double() * IMAGENET_STD + IMAGENET_MEAN, pixels.shape[-1] // size)
        for pixels in (pixel_values, make_images(len(labels)))
    )
    kept = (kept.clamp(0, 1) * 255).round() / 255
    psnr = -10 * (own[:, None] - kept[None]).square().mean((2, 3, 4)).log10().clamp(min=-config.psnr_max / 10)
    relation = psnr.clamp(min=0) / config.psnr_max
    is_cosine = config.attention_type == "cosine"
    mean = references.mean(0) if is_cosine else 0.0
    query, key = (
        (rows - mean) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        for name, rows in (("query", features.double()), ("key", references))
    )
    votes = []
    for head, (q, k) in enumerate(
        zip(query.chunk(config.num_attention_heads, 1), key.chunk(config.num_attention_heads, 1), strict=True)
    ):
        if is_cosine:
            scores = nn.functional.cosine_similarity(q[:, None], k[None], dim=-1) * weights["logit_scale"][head].exp()
            scores = scores + weights["relation_gain"][head] * relation * config.psnr_max
        else:
            w = weights["relation.weight"][:, 0].chunk(config.num_attention_heads)[head]
            scores = (q[:, None] * (k[None] + relation[..., None] * w)).sum(-1) / math.sqrt(q.shape[1])
        means = [
            scores[:, labels == label].exp().mean(1) if (labels == label).any() else torch.zeros_like(scores[:, 0])
            for label in range(config.num_labels)
        ]
        means = torch.stack(means, dim=1)
        votes.append(means / means.sum(1, keepdim=True))
    return torch.stack(votes).mean(0)


def test_votes_are_their_definition(model, pixel_values, features):
    votes = votes_of(with_bank(model), pixel_values, features)
    expected = oracle(model, pixel_values, features)
    torch.testing.assert_close(votes.double(), expected, atol=1e-6, rtol=1e-4)
    assert votes.std(0)[[0, 1, 3, 4]].min() > 1e-3 and (votes[:, 2] == 0).all()
    # Nothing that shapes attention to the references shapes the votes.
    changes = {"share": 0.9, "temperature": 0.05, "gain": 3.0}
    for name, value in changes.items():
        setattr(model.config, f"reference_{name}", value)
    model.config.num_reference_neighbors = 1
    assert torch.equal(votes_of(model, pixel_values, features), votes)


def test_the_answer_is_its_definition(model, pixel_values, features):
    plain = logits_of(with_bank(model), pixel_values, features).double().softmax(-1)
    votes = oracle(model, pixel_values, features)
    for weight in (0.1, 0.5, 0.9):
        model.config.reference_vote_weight = weight
        logits = logits_of(model, pixel_values, features).double()
        torch.testing.assert_close(logits, ((1 - weight) * plain + weight * votes).log(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(7).double(), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_definition(model, pixel_values, features):
    """By way of the features, the temperature and the gain; and of the projections, in training."""
    with_bank(model, weight=1 - 2**-20).train()
    features.requires_grad_()
    rra = model.rbi.rra
    names = ("logit_scale", "relation_gain") if model.config.attention_type == "cosine" else ("relation.weight",)
    inputs = [features, *(rra.get_parameter(name) for name in (*names, "query.weight", "key.weight"))]
    labels = torch.tensor([0, 1, 3, 4, 0, 1, 3])
    output = model(pixel_values, labels=labels, image_features=features, relation_scope="reference")
    expected_loss = -oracle(model, pixel_values, features)[torch.arange(7), labels].log().mean()
    torch.testing.assert_close(output.loss, expected_loss.float(), atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(output.loss, inputs)
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_loss, inputs), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("times", [2, 5])
def test_repeated_references_change_no_vote(model, pixel_values, features, times):
    expected = votes_of(with_bank(model), pixel_values, features)
    rows = torch.arange(len(VARIED_LABELS)).repeat(times)
    torch.testing.assert_close(votes_of(with_bank(model, rows=rows), pixel_values, features), expected)
    if model.config.attention_type == "dot_product":
        # Cosines subtract the mean of the bank, which would move if only the references of one class were repeated.
        rows = torch.cat([torch.arange(len(VARIED_LABELS)), (VARIED_LABELS == 3).nonzero().flatten().repeat(times)])
        torch.testing.assert_close(votes_of(with_bank(model, rows=rows), pixel_values, features), expected)


def test_the_order_of_references_changes_no_vote(model, pixel_values, features):
    expected = votes_of(with_bank(model), pixel_values, features)
    votes = votes_of(with_bank(model, rows=torch.randperm(len(VARIED_LABELS))), pixel_values, features)
    torch.testing.assert_close(votes, expected)


def sharpen_(model):
    """Scores far beyond what exp takes in float32."""
    with torch.no_grad():
        if model.rbi.rra.relation_gain is not None:
            model.rbi.rra.relation_gain.fill_(100)
        else:
            model.rbi.rra.query.weight.mul_(1e4)
    model.eval()


@pytest.mark.parametrize("is_sharp", [False, True])
def test_unlabeled_references_have_no_say(model, pixel_values, features, is_sharp):
    """However like an image they are."""
    if is_sharp:
        sharpen_(model)
    references, pixels = make_features(len(VARIED_LABELS)), make_images(len(VARIED_LABELS))
    is_known = VARIED_LABELS != -100
    model.set_reference_features(references[is_known], pixels[is_known], VARIED_LABELS[is_known])
    expected = votes_of(model, pixel_values, features)
    # In pairs around the mean, which cosines are taken off, so that it stays.
    mean = references[is_known].mean(0)
    more = torch.cat([features, 2 * mean - features])
    model.set_reference_features(
        torch.cat([references[is_known], more]),
        torch.cat([pixels[is_known], pixel_values, pixel_values]),
        torch.cat([VARIED_LABELS[is_known], torch.full((14,), -100)]),
    )
    votes = votes_of(model, pixel_values, features)
    torch.testing.assert_close(votes.sum(1), torch.ones(7))
    if is_sharp:
        # A rounding error in the mean is no small thing then.
        assert torch.equal(votes.round(), expected.round())
    else:
        torch.testing.assert_close(votes, expected, atol=1e-5, rtol=1e-4)


def test_a_class_without_references_keeps_its_answer(model, pixel_values, features):
    """Its share of the answer is that of the classifier, (1 - w)."""
    plain = logits_of(with_bank(model), pixel_values, features).log_softmax(-1)
    mixed = logits_of(with_bank(model, weight=0.75), pixel_values, features)
    torch.testing.assert_close(mixed[:, 2], plain[:, 2] + math.log(0.25))
    assert mixed.isfinite().all()


def test_images_without_labeled_references_answer_as_the_classifier(model, pixel_values, features):
    with_bank(model)
    mask = (VARIED_LABELS == -100).repeat(7, 1)
    mask[3:] = True
    expected = logits_of(model, pixel_values, features, reference_mask=mask).softmax(-1)
    model.config.reference_vote_weight = 0.5
    answers = logits_of(model, pixel_values, features, reference_mask=mask).softmax(-1)
    torch.testing.assert_close(answers[:3], expected[:3])
    assert (answers[3:] - expected[3:]).abs().amax(1).min() > 1e-3


def test_scores_of_any_size_give_votes(model, pixel_values, features):
    sharpen_(with_bank(model, weight=0.5))
    votes = votes_of(model, pixel_values, features)
    torch.testing.assert_close(votes.sum(1), torch.ones(7))
    assert logits_of(model, pixel_values, features).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_votes_in_low_precision(model, pixel_values, features, dtype):
    with_bank(model, weight=0.5)
    features = features.to(dtype).float()
    expected = logits_of(model, pixel_values, features)
    model.to(dtype).eval()
    logits = logits_of(model, pixel_values.to(dtype), features.to(dtype))
    torch.testing.assert_close(logits.float().exp(), expected.exp(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(logits.float().exp().sum(1), torch.ones(7), atol=0.02, rtol=0)


def test_votes_are_shares_of_the_classes(voting_model, pixel_values, features):
    votes = votes_of(voting_model, pixel_values, features)
    assert (votes >= 0).all()
    torch.testing.assert_close(votes.sum(-1), torch.ones(7))
    for scope in ("self", "batch"):
        assert votes_of(voting_model, pixel_values, features, relation_scope=scope) is None


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
    assert_same_answers(logits[others], expected[others])


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
