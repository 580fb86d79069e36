# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""RPE and RRA against independent computations: PSNR in float64, PyTorch Geometric, and the equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import TransformerConv

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RelationshipPositionEncoding,
    ResidualRelationshipAttention,
)
from modeling_rbi.relations_rbi import pairwise_mean_squared_error
from tests.modeling_rbi.shared import (
    FEATURE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LABELS,
    NUM_LABELS,
    NUM_REFERENCES,
    assert_same_answers,
    block_means,
    decibels,
    line_drawings,
    logits_of,
    make_images,
    make_items,
    make_model,
    natural_images,
    normalize,
    randomize_,
    some_references_masked,
)


# --- Relationship Position Encoding ----------------------------------------------------------------------------------


def with_noise(images, decibels):
    """Near-duplicates whose PSNR to the images is known."""
    noise = torch.randn_like(images)
    return images + noise * 10 ** (-decibels / 20) / noise.square().mean((1, 2, 3), keepdim=True).sqrt()


def brightened(images, decibels):
    """Near-duplicates off by the same in every pixel, where rounding errors add up instead of cancelling."""
    return images + 10 ** (-decibels / 20)


def oracle_errors(pixel_values, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Mean squared errors in float64, pair by pair, of the pixels as they were rounded."""
    images = (pixel_values.double() * std + mean).numpy()
    return torch.tensor([[np.mean(np.square(first - second)) for second in images] for first in images])


def make_rpe(**kwargs):
    return RelationshipPositionEncoding(RBIConfig(**({"psnr_image_size": None} | kwargs)))


class RoundedFactors(TorchDispatchMode):
    """Matrix products as tensor cores do them: float32 factors rounded to fewer bits of mantissa, 10 for TF32."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.products += 1
            args = [self._round(factor) if factor.dtype == torch.float32 else factor for factor in args]
        return func(*args, **(kwargs or {}))

    def _round(self, factor):
        mantissa, exponent = torch.frexp(factor)
        return torch.ldexp((mantissa * 2 ** (self.bits + 1)).round() / 2 ** (self.bits + 1), exponent)


@pytest.fixture(params=["highest", "medium"])
def matmul_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_images", [natural_images, line_drawings])
@pytest.mark.parametrize("make_duplicates", [with_noise, brightened])
def test_psnr_is_that_of_float64(dtype, make_images, make_duplicates, matmul_precision):
    images = make_images(3)
    levels = [5, 10, 20, 30, 40, 45]
    duplicates = torch.cat([images, *(make_duplicates(images, level) for level in levels)])
    pixel_values = normalize(duplicates).to(dtype)
    expected = decibels(oracle_errors(pixel_values)).clamp(0, 50)
    if dtype == torch.float32:
        # The test is of the levels that it speaks of.
        known = torch.tensor([5, 10, 20, 30, 40, 45], dtype=torch.float64).repeat_interleave(3)
        own = torch.arange(3).repeat(6)
        torch.testing.assert_close(expected[own, torch.arange(3, 21)], known, atol=1e-3, rtol=0)

    similarities, is_finite = make_rpe(psnr_max=50.0)(pixel_values)
    assert similarities.dtype == torch.float32 and is_finite.all()
    compared = expected <= 45.001
    assert compared.sum() > 300
    torch.testing.assert_close(similarities.double()[compared] * 50, expected[compared], atol=0.01, rtol=0)
    torch.testing.assert_close(similarities.double() * 50, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("psnr_max", [50.0, 120.0])
@pytest.mark.parametrize("make_duplicates", [with_noise, brightened])
def test_psnr_is_monotone_and_finite_beyond(dtype, psnr_max, make_duplicates):
    images = torch.cat([natural_images(2), line_drawings(2)])
    levels = range(50, 101, 5)
    pixel_values = normalize(torch.cat([images, *(make_duplicates(images, level) for level in levels)])).to(dtype)
    errors = oracle_errors(pixel_values)
    similarities, _ = make_rpe(psnr_max=psnr_max)(pixel_values)
    assert similarities.isfinite().all() and similarities.min() >= 0 and similarities.max() <= 1
    for row_errors, row in zip(errors, similarities, strict=True):
        # But for a hundredth of a dB, where two errors are all but the same.
        assert row[row_errors.argsort(descending=True)].diff().min() * psnr_max > -0.01
    if dtype == torch.float32 and psnr_max > 100:
        # Strictly so: every step of 5 dB is seen.
        for image in range(4):
            assert similarities[image, image::4][1:].diff().min() > 0


def test_psnr_below_0_counts_as_0():
    drawing = (line_drawings(1) > 0).double()
    similarities, _ = make_rpe()(normalize(torch.cat([drawing, 1.5 * (1 - drawing)])).float())
    assert torch.equal(similarities, torch.eye(2))


@pytest.mark.parametrize("bits", [10, 7], ids=["tf32", "bf16"])
def test_psnr_withstands_tensor_cores(bits):
    images = line_drawings(4)
    pixel_values = normalize(torch.cat([images, *(brightened(images, level) for level in (20, 30, 40, 45))]))
    pixel_values = pixel_values.float()
    expected = decibels(oracle_errors(pixel_values))
    compared = expected <= 45.001

    with RoundedFactors(bits) as mode:
        similarities, _ = make_rpe()(pixel_values)
    assert mode.products > 0
    torch.testing.assert_close(similarities.double()[compared] * 50, expected[compared], atol=0.01, rtol=0)

    # The plain formula in float32 does not.
    rows = (pixel_values * IMAGENET_STD.float() + IMAGENET_MEAN.float()).flatten(1)
    rows = rows - rows.mean(0)
    with RoundedFactors(bits):
        gram = rows @ rows.T
    plain = decibels((gram.diagonal()[:, None] + gram.diagonal() - 2 * gram) / rows.shape[1])
    assert (plain - expected)[compared].abs().max() > 0.01


@pytest.mark.parametrize("num_pixels", [1, 3, 1000])
def test_errors_are_symmetric_with_zeros_on_the_diagonal(num_pixels):
    images = torch.randn(9, num_pixels) * torch.logspace(-6, 3, 9)[:, None]
    images[4] = images[7]
    errors = pairwise_mean_squared_error(images)
    assert errors.dtype == torch.float32
    assert torch.equal(errors.diagonal(), torch.zeros(9))
    assert errors[4, 7] < 1e-12 * images[4].square().mean(), "the same image twice"
    assert torch.equal(errors, errors.T)
    expected = torch.cdist(images.double(), images.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(errors.double(), expected / num_pixels, rtol=1e-5, atol=1e-12)


def test_psnr_has_no_gradient(bare_model, pixel_values, features):
    pixel_values.requires_grad_()
    similarities, is_finite = bare_model.rbi.rpe(pixel_values)
    assert not similarities.requires_grad and not is_finite.requires_grad
    features.requires_grad_()
    bare_model(pixel_values, image_features=features, relation_scope="batch").logits.sum().backward()
    assert pixel_values.grad is None and features.grad.abs().max() > 0


def test_psnr_is_in_float32_under_autocast(pixel_values):
    rpe = make_rpe()
    expected, _ = rpe(pixel_values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (pixel_values[:, 0, 0] @ pixel_values[:, 0, 0].T).dtype == torch.bfloat16
        similarities, _ = rpe(pixel_values)
    assert similarities.dtype == torch.float32 and torch.equal(similarities, expected)


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), ([0.0, 0.0, 0.0], [1 / 255] * 3), ([0.1, 0.5, 2], [3, 1, 0.2])],
)
def test_normalisation_is_undone(mean, std):
    images = with_noise(natural_images(5), 15)
    expected, _ = make_rpe()(normalize(images).float())
    other = normalize(images, *(torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std)))
    similarities, _ = make_rpe(image_mean=mean, image_std=std)(other.float())
    torch.testing.assert_close(similarities, expected, atol=1e-5, rtol=0)
    # Statistics of another processor give another answer.
    wrong, _ = make_rpe()(other.float())
    assert (wrong - expected).abs().max() > 0.01


@pytest.mark.parametrize(("height", "width", "size"), [(48, 48, 16), (32, 48, 16), (48, 24, 12), (64, 16, 16)])
def test_psnr_image_size_averages_the_images_down(height, width, size):
    pixel_values = torch.randn(4, 3, height, width)
    blocks = pixel_values.double().numpy().reshape(4, 3, size, height // size, size, width // size).mean((3, 5))
    expected = decibels(oracle_errors(torch.from_numpy(blocks))).clamp(0, 50) / 50
    similarities, _ = make_rpe(psnr_image_size=size)(pixel_values)
    torch.testing.assert_close(similarities.double(), expected, atol=1e-5, rtol=0)
    full, _ = make_rpe()(pixel_values)
    assert (full - similarities)[~torch.eye(4, dtype=torch.bool)].abs().min() > 1e-3


@pytest.mark.parametrize("size", [33, 224])
def test_images_smaller_than_psnr_image_size_are_left_as_they_are(size):
    pixel_values = torch.randn(4, 3, 32, 20)
    assert_same_answers(make_rpe(psnr_image_size=size)(pixel_values)[0], make_rpe()(pixel_values)[0])


def test_images_smaller_than_psnr_image_size_in_one_direction():
    pixel_values = torch.randn(4, 3, 8, 64)
    blocks = pixel_values.double().numpy().reshape(4, 3, 8, 16, 4).mean(4)
    expected = decibels(oracle_errors(torch.from_numpy(blocks))).clamp(0, 50) / 50
    torch.testing.assert_close(make_rpe(psnr_image_size=16)(pixel_values)[0].double(), expected, atol=1e-5, rtol=0)


def test_self_relation(pixel_values):
    one, _ = make_rpe(self_relation="one")(pixel_values)
    nearest, _ = make_rpe(self_relation="nearest")(pixel_values)
    itself = torch.eye(len(pixel_values), dtype=torch.bool)
    assert torch.equal(one.diagonal(), torch.ones(len(pixel_values)))
    assert torch.equal(nearest.diagonal(), one.masked_fill(itself, 0).amax(1))
    assert torch.equal(nearest[~itself], one[~itself])
    assert nearest.diagonal().max() < 1


def test_nearest_self_relation_passes_over_masked_images(pixel_values):
    pixel_values[0] = pixel_values[1]
    rpe = make_rpe(self_relation="nearest")
    similarities, _ = rpe(pixel_values)
    torch.testing.assert_close(similarities.diagonal()[:2], torch.ones(2))
    mask = torch.tensor([True, False, True, True, True, True, True])
    similarities, _ = rpe(pixel_values, mask)
    assert similarities[0, 0] == similarities[0, 2:].max() < 1
    assert similarities[1, 1] == 1
    similarities, _ = rpe(pixel_values, torch.arange(7) == 3)
    assert similarities[3, 3] == 1 and similarities[0, 0] == similarities[0, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_have_no_relations(pixel_values, bad):
    expected, _ = make_rpe()(pixel_values[1:])
    pixel_values[0, 1, 5, 5] = bad
    similarities, is_finite = make_rpe()(pixel_values)
    assert is_finite.tolist() == [False] + [True] * 6
    assert similarities[0, 1:].abs().max() == 0 == similarities[1:, 0].abs().max()
    torch.testing.assert_close(similarities[1:, 1:], expected, atol=1e-6, rtol=0)


# --- Residual Relationship Attention ---------------------------------------------------------------------------------


def make_rra(**kwargs):
    return randomize_(ResidualRelationshipAttention(RBIConfig(feature_size=FEATURE_SIZE, **kwargs)))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_rra_is_transformer_conv_on_the_complete_graph(num_heads):
    """Forward and gradients, with relations that differ in the two directions."""
    batch_size = 6
    rra = randomize_(make_rra(num_attention_heads=num_heads), std=0.2)
    conv = TransformerConv(
        FEATURE_SIZE, FEATURE_SIZE // num_heads, heads=num_heads, concat=True, beta=True, edge_dim=1
    )
    pairs = {
        "query": conv.lin_query,
        "key": conv.lin_key,
        "value": conv.lin_value,
        "residual": conv.lin_skip,
        "gate": conv.lin_beta,
        "relation": conv.lin_edge,
    }
    assert {name for name, _ in rra.named_children()} == pairs.keys()
    for name, theirs in pairs.items():
        theirs.load_state_dict(getattr(rra, name).state_dict())

    # In an edge (j, i) the message goes from j to i: j is attended to.
    source, target = (index.flatten() for index in torch.meshgrid(*[torch.arange(batch_size)] * 2, indexing="ij"))
    similarities = torch.rand(batch_size, batch_size)
    features = torch.randn(batch_size, FEATURE_SIZE)
    ours_in, theirs_in = features.clone().requires_grad_(), features.clone().requires_grad_()
    ours, *_ = rra(ours_in, similarities, torch.ones(batch_size, dtype=torch.bool))
    theirs = conv(theirs_in, torch.stack([source, target]), edge_attr=similarities[target, source][:, None])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    gradients = {"features": (ours_in.grad, theirs_in.grad)}
    for name, layer in pairs.items():
        for part, parameter in layer.named_parameters():
            gradients[f"{name}.{part}"] = (getattr(rra, name).get_parameter(part).grad, parameter.grad)
    assert len(gradients) == 1 + sum(1 for _ in rra.parameters())
    for name, (ours, theirs) in gradients.items():
        if name != "key.bias":  # The same for each neighbor, so that the softmax takes it away but for the rounding.
            assert theirs.abs().max() > 1e-3, name
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def oracle_rra(rra, config, features, similarities, is_neighbor):
    """The equations as they are written, in float64, with all tensors of shape (heads, batch, batch, d_head)."""
    weights = {name: value.detach().double() for name, value in rra.state_dict().items()}
    features, similarities = features.double(), similarities.double()
    num_heads, batch_size = config.num_attention_heads, len(features)

    def project(name, inputs):
        projected = torch.einsum("bi,oi->bo", inputs, weights[f"{name}.weight"]) + weights[f"{name}.bias"]
        return projected.reshape(batch_size, num_heads, -1).permute(1, 0, 2)

    is_cosine = config.attention_type == "cosine"
    compared = features - features[is_neighbor].mean(0) if is_cosine and is_neighbor.any() else features
    query, key, value = project("query", compared), project("key", compared), project("value", features)
    if is_cosine:
        query, key = (vectors / vectors.norm(dim=-1, keepdim=True) for vectors in (query, key))
    keys, values = (vectors[:, None].repeat(1, batch_size, 1, 1) for vectors in (key, value))
    if config.relation_position_encoding in ("key", "key_value"):
        relation = weights["relation.weight"].reshape(num_heads, -1)
        relation = torch.einsum("ij,hd->hijd", similarities, relation)
        keys = keys + relation
        values = values + relation if config.relation_position_encoding == "key_value" else values
    scores = torch.einsum("hid,hijd->hij", query, keys)
    scores *= weights["logit_scale"].exp()[:, None, None] if is_cosine else (FEATURE_SIZE / num_heads) ** -0.5
    if config.relation_position_encoding == "bias":
        scores = scores + weights["relation_gain"][:, None, None] * config.psnr_max * similarities

    allowed = is_neighbor[None, :] | torch.eye(batch_size, dtype=torch.bool)
    attention = torch.where(allowed, scores, -math.inf).softmax(-1)
    message = torch.einsum("hij,hijd->ihd", attention, values).reshape(batch_size, -1)
    if config.residual_gate == "none":
        return message, attention
    residual = project("residual", features).permute(1, 0, 2).reshape(batch_size, -1)
    if config.residual_gate == "sum":
        return residual + message, attention
    beta = torch.cat([message, residual, message - residual], -1) @ weights["gate.weight"][0]
    beta = 1 / (1 + torch.exp(-beta))[:, None]
    return beta * residual + (1 - beta) * message, attention


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("residual_gate", ["learned", "sum", "none"])
@pytest.mark.parametrize("attention_type", ["dot_product", "cosine"])
@pytest.mark.parametrize("relation_position_encoding", ["key_value", "key", "bias", "none"])
def test_rra_is_its_equations(relation_position_encoding, attention_type, residual_gate, num_heads):
    config = RBIConfig(
        feature_size=FEATURE_SIZE,
        num_attention_heads=num_heads,
        attention_type=attention_type,
        residual_gate=residual_gate,
        relation_position_encoding=relation_position_encoding,
    )
    rra = randomize_(ResidualRelationshipAttention(config))
    if rra.relation_gain is not None:
        nn.init.normal_(rra.relation_gain, std=0.05)
    features, similarities = torch.randn(6, FEATURE_SIZE), torch.rand(6, 6)
    for is_neighbor in (torch.ones(6, dtype=torch.bool), torch.tensor([True, True, False, True, False, True])):
        output, attention, _ = rra(features, similarities, is_neighbor)
        expected, expected_attention = oracle_rra(rra, config, features, similarities, is_neighbor)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attention.double(), expected_attention.transpose(0, 1), atol=1e-5, rtol=0)
    # Alone, an image attends to itself in whole, with the relation 1.
    alone, attention, _ = rra(features)
    assert attention is None
    expected, _ = oracle_rra(rra, config, features, torch.ones(6, 6), torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(alone.double(), expected, atol=1e-5, rtol=1e-5)


def test_cosine_attention_has_a_largest_scale(features, pixel_values):
    rra = make_rra(attention_type="cosine")
    similarities, is_neighbor = torch.zeros(7, 7), torch.ones(7, dtype=torch.bool)
    outputs = []
    for scale in (math.log(100.0), math.log(1000.0)):
        nn.init.constant_(rra.logit_scale, scale)
        outputs.append(rra(features, similarities, is_neighbor)[1])
    assert_same_answers(*outputs)


def test_attention_dropout_acts_in_training_alone(features):
    rra = make_rra(attention_dropout=0.5)
    arguments = (features, torch.rand(7, 7), torch.ones(7, dtype=torch.bool))
    dropped = rra.train()(*arguments)[1]
    kept = rra.eval()(*arguments)[1]
    assert (kept > 0).all() and (dropped == 0).any()
    torch.testing.assert_close(dropped[dropped > 0], 2 * kept[dropped > 0])


# --- Attention to references, against the formula --------------------------------------------------------------------


def oracle_of_references(model, features, pixel_values, reference_features, reference_pixels, mask=None):
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


# Each value of each field with each value of every other one.
PAIRS_OF_FIELDS = [
    ("key_value", "dot_product", "learned", 1, None),
    ("key_value", "cosine", "sum", 3, 1),
    ("key", "dot_product", "none", 3, 3),
    ("bias", "cosine", "learned", 1, 3),
    ("none", "dot_product", "sum", 1, 1),
    ("none", "cosine", "none", 3, None),
    ("key", "cosine", "learned", 1, 1),
    ("bias", "dot_product", "sum", 3, None),
    ("bias", "dot_product", "none", 1, 1),
    ("none", "dot_product", "learned", 3, 3),
    ("key_value", "dot_product", "sum", 1, 3),
    ("key", "dot_product", "sum", 1, None),
    ("key_value", "dot_product", "none", 1, None),
]


@pytest.mark.parametrize(
    ("relation_position_encoding", "attention_type", "residual_gate", "num_heads", "num_neighbors"), PAIRS_OF_FIELDS
)
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
            expected, attention, votes = oracle_of_references(
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
        expected, attention, _ = oracle_of_references(
            model, features, pixel_values, reference_features, reference_pixels
        )
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
    expected, *_ = oracle_of_references(model, features, pixel_values, reference_features, reference_pixels, mask)
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
    # They have the highest attention, which keeps its proportions.
    expected = torch.where(kept, every, 0.0)
    expected = expected / expected.sum(-1, keepdim=True) * few.sum(-1, keepdim=True)
    torch.testing.assert_close(few, expected, atol=1e-6, rtol=1e-4)
    least, left_out = every[kept].view(7, -1).amin(1), torch.where(kept, 0.0, every).amax(1)
    assert (least >= left_out).all()


def test_an_image_of_the_bank_has_the_relation_1_to_itself(model):
    pixel_values = torch.stack([item["pixel_values"] for item in make_items(NUM_REFERENCES, seed=2)])
    with torch.no_grad():
        relations = model(pixel_values, output_relations=True).relation_similarities[:, 1:]
    torch.testing.assert_close(relations.diagonal(), torch.ones(NUM_REFERENCES))
    assert relations[~torch.eye(NUM_REFERENCES, dtype=torch.bool)].max() < 0.8


# --- Which references an image attends to ----------------------------------------------------------------------------


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


def test_attention_dropout_to_references_acts_only_in_training(
    config, pixel_values, reference_features, reference_pixels
):
    config.attention_dropout = 0.5
    model = make_model(config, reference_features, reference_pixels)
    assert torch.equal(logits_of(model, pixel_values), logits_of(model, pixel_values))
    with torch.no_grad():
        attention = model.train()(pixel_values, relation_scope="reference", output_relations=True).relation_attentions
    assert 0.2 < (attention == 0).float().mean() < 0.8
