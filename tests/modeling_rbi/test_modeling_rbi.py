"""The model's parts against independent computations, and the properties that the whole promises."""

import copy
import itertools
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import TransformerConv
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    BeitConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EfficientNetConfig,
    HieraConfig,
    MobileNetV2Config,
    PoolFormerConfig,
    PvtV2Config,
    ResNetConfig,
    SegformerConfig,
    SiglipConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    RelationshipPositionEncoding,
    ResidualRelationshipAttention,
)
from modeling_rbi.relations_rbi import pairwise_mean_squared_error


FEATURE_SIZE = 24
IMAGENET_MEAN, IMAGENET_STD = (
    torch.tensor(values, dtype=torch.float64)[:, None, None]
    for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


def randomize_(module, std=0.4):
    """Weights far from their start, where nothing is zero and no two terms are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


@pytest.fixture
def model(config):
    """Both presets, with a head of random weights."""
    model = RBIForImageClassification(config)
    for part in (model.rbi.rra, model.classifier):
        randomize_(part)
    return model.eval()


@pytest.fixture
def features(pixel_values):
    """Features of 7 images that differ much, which those of an untrained backbone do not."""
    return torch.randn(len(pixel_values), FEATURE_SIZE)


# --- Relationship Position Encoding ---------------------------------------------------------------------------------


def natural_images(number, size=48):
    """Images with the 1/f spectrum of photographs, (number, 3, size, size) in [0, 1], float64."""
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2).sqrt()
    spectrum = torch.fft.rfft2(torch.randn(number, 3, size, size)) / frequency.clamp(min=1 / size)
    images = torch.fft.irfft2(spectrum, s=(size, size)).double()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low)


def line_drawings(number, size=48):
    """Images of large areas, black or light: as much contrast as there is."""
    areas = (torch.rand(number, 1, 6, 6) > 0.5).double() * 0.8
    return nn.functional.interpolate(areas, size=(size, size)).expand(-1, 3, -1, -1)


def with_noise(images, decibels):
    """Near-duplicates whose PSNR to the images is known."""
    noise = torch.randn_like(images)
    return images + noise * 10 ** (-decibels / 20) / noise.square().mean((1, 2, 3), keepdim=True).sqrt()


def brightened(images, decibels):
    """Near-duplicates off by the same in every pixel, where rounding errors add up instead of cancelling."""
    return images + 10 ** (-decibels / 20)


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return (images - mean) / std


def oracle_errors(pixel_values, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Mean squared errors in float64, pair by pair, of the pixels as they were rounded."""
    images = (pixel_values.double() * std + mean).numpy()
    return torch.tensor([[np.mean(np.square(first - second)) for second in images] for first in images])


def decibels(errors):
    return -10 * errors.log10()


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
    assert torch.equal(errors.diagonal(), torch.zeros(9)) and errors[4, 7] == 0
    assert torch.equal(errors, errors.T)
    expected = torch.cdist(images.double(), images.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(errors.double(), expected / num_pixels, rtol=1e-5, atol=1e-12)


def test_psnr_has_no_gradient(model, pixel_values, features):
    pixel_values.requires_grad_()
    similarities, is_finite = model.rbi.rpe(pixel_values)
    assert not similarities.requires_grad and not is_finite.requires_grad
    features.requires_grad_()
    model(pixel_values, image_features=features, relation_scope="batch").logits.sum().backward()
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
    assert torch.equal(make_rpe(psnr_image_size=size)(pixel_values)[0], make_rpe()(pixel_values)[0])


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
    assert similarities[0, 0] == similarities[1, 1] == 1
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


# --- Residual Relationship Attention --------------------------------------------------------------------------------


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
    assert torch.equal(*outputs)


def test_attention_dropout_acts_in_training_alone(features):
    rra = make_rra(attention_dropout=0.5)
    arguments = (features, torch.rand(7, 7), torch.ones(7, dtype=torch.bool))
    dropped = rra.train()(*arguments)[1]
    kept = rra.eval()(*arguments)[1]
    assert (kept > 0).all() and (dropped == 0).any()
    torch.testing.assert_close(dropped[dropped > 0], 2 * kept[dropped > 0])


# --- The start ------------------------------------------------------------------------------------------------------


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
    assert torch.equal(model(image_features=features, relation_scope="self").pooler_output, features)


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


# --- Scopes ---------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(alone, logits_of(model, pixel_values[:1], scope="self"), atol=1e-6, rtol=1e-5)


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


# --- Masks, and rows that are not finite ----------------------------------------------------------------------------


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
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_a_pairwise_mask_says_who_attends_to_whom(model, pixel_values, features):
    mask = torch.rand(7, 7) < 0.5
    outputs = model(
        pixel_values, image_features=features, relation_scope="batch", relation_mask=mask, output_relations=True
    )
    expected = (mask | torch.eye(7, dtype=torch.bool))[:, None]
    assert torch.equal(outputs.relation_attentions > 0, expected.expand_as(outputs.relation_attentions))


# --- Neighborhoods smaller than the batch ---------------------------------------------------------------------------


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
        torch.testing.assert_close(outputs.logits[rows], alone.logits, atol=1e-6, rtol=1e-5)
        attentions[rows[0] : rows[-1] + 1, :, rows] = alone.relation_attentions
        similarities[rows[0] : rows[-1] + 1, rows] = alone.relation_similarities
    torch.testing.assert_close(outputs.relation_attentions, attentions, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outputs.relation_similarities, similarities, atol=1e-6, rtol=1e-5)


def test_a_pairwise_mask_is_split_with_the_batch(model, pixel_values, features):
    mask = torch.rand(7, 7) < 0.5
    logits = logits_of(model, pixel_values, image_features=features, relation_mask=mask, relation_batch_size=4)
    for rows in (slice(0, 3), slice(3, 7)):
        alone = logits_of(model, pixel_values[rows], image_features=features[rows], relation_mask=mask[rows, rows])
        torch.testing.assert_close(logits[rows], alone, atol=1e-6, rtol=1e-5)


def test_splits_that_make_no_sense_are_refused(model, pixel_values):
    with pytest.raises(ValueError, match="`relation_batch_size` must be at least 1, got 0"):
        model(pixel_values, relation_scope="batch", relation_batch_size=0)
    model.rbi.gather_across_processes = True
    with pytest.raises(ValueError, match="use one of them"):
        model(pixel_values, relation_scope="batch", relation_batch_size=4)


# --- Neighborhoods of several processes -----------------------------------------------------------------------------


def test_gathering_in_one_process_changes_nothing(model, pixel_values):
    expected = logits_of(model, pixel_values)
    model.rbi.gather_across_processes = True
    assert torch.equal(logits_of(model, pixel_values), expected)


GATHERED = """
import os
import sys

import torch
from safetensors.torch import load_file, save_file

from modeling_rbi import RBIForImageClassification

torch.set_num_threads(1)
rank, world_size, folder, mask_kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
)
model = RBIForImageClassification.from_pretrained(f"{folder}/model").train()
model.rbi.gather_across_processes = True
batch = load_file(f"{folder}/batch.safetensors")
rows = torch.arange(7).tensor_split(world_size)[rank]
mask = {"none": None, "images": batch["mask"][rows], "pairs": batch["pairs"][rows][:, rows]}[mask_kind]
outputs = model(batch["pixel_values"][rows], relation_mask=mask, output_relations=True)
loss = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"][rows], reduction="sum") / 7
loss.backward()
gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
for gradient in gradients.values():
    torch.distributed.all_reduce(gradient)
results = {"logits": outputs.logits.detach(), "attentions": outputs.relation_attentions.detach()}
results["similarities"] = outputs.relation_similarities.contiguous()
save_file(results, f"{folder}/results.{rank}")
save_file(gradients, f"{folder}/gradients.{rank}")
# All is written. gloo's threads can outlive the group and abort an orderly exit of the interpreter.
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "mask_kind"), [(2, "none"), (3, "images"), (3, "pairs")])
def test_gathering_across_processes_is_one_batch(model, pixel_values, tmp_path, world_size, mask_kind):
    model.save_pretrained(tmp_path / "model")  # apart from the script: it brings its own modeling_rbi.py
    parts = torch.arange(7).tensor_split(world_size)
    pairs = torch.ones(7, 7, dtype=torch.bool)
    pairs[5, 6] = pairs[6, 5] = pairs[0, 1] = False  # pairs of one process, the only ones that it can speak of
    labels = torch.arange(7) % 5
    batch = {"pixel_values": pixel_values, "labels": labels, "mask": MASK, "pairs": pairs}
    save_file(batch, tmp_path / "batch.safetensors")
    (tmp_path / "gathered.py").write_text(GATHERED)
    command = [sys.executable, str(tmp_path / "gathered.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(world_size), str(tmp_path), mask_kind])
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()

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


# --- Outputs --------------------------------------------------------------------------------------------------------


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
    assert torch.equal(model(pixel_values, relation_scope=scope, image_features=features).logits, expected)
    assert not calls
    if scope == "self":
        assert torch.equal(model(relation_scope=scope, image_features=features).logits, expected)


def test_pixels_are_not_needed_without_relations(config, features):
    config.relation_position_encoding = "none"
    model = RBIForImageClassification(config).eval()
    assert logits_of(model, None, image_features=features).isfinite().all()


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_pixels", "named"),
    [
        (lambda pixels: pixels[:, :1], r"1 channels, but the model takes 3: convert the images"),
        (lambda pixels: pixels.permute(0, 2, 3, 1), r"32 channels, but the model takes 3.*channels second"),
        (lambda pixels: pixels[0], r"shape \(batch_size, num_channels, height, width\).*`pixel_values\[None\]`"),
        (lambda pixels: pixels[None], r"shape \(batch_size, num_channels, height, width\).*\(1, 7, 3, 32, 32\)"),
        (lambda pixels: pixels[:0], r"empty batch: pass at least one image"),
        (lambda pixels: (pixels * 255).to(torch.uint8), r"torch\.uint8, but must be float.*image processor"),
        (lambda pixels: pixels.long(), r"torch\.int64, but must be float.*image processor"),
        (lambda pixels: None, r"You have to specify pixel_values"),
    ],
    ids=["gray", "channels_last", "rank_3", "rank_5", "empty", "uint8", "int64", "none"],
)
@pytest.mark.parametrize("scope", ["self", "batch"])
def test_bad_pixels_are_refused(model, pixel_values, make_pixels, named, scope):
    for part in (model, model.rbi):
        with pytest.raises(ValueError, match=named) as caught:
            part(make_pixels(pixel_values), relation_scope=scope)
        assert "pixel_values" in str(caught.value)


@pytest.mark.parametrize(
    ("make_features", "named"),
    [
        (lambda features: features[:, :-1], r"\(batch_size, 24\).*got \(7, 23\)"),
        (lambda features: features[0], r"\(batch_size, 24\).*got \(24,\)"),
        (lambda features: features[:0], r"batch size of at least 1"),
        (lambda features: features[:5], r"7 images, but `image_features` 5"),
    ],
    ids=["size", "rank", "empty", "number"],
)
def test_bad_features_are_refused(model, pixel_values, features, make_features, named):
    with pytest.raises(ValueError, match=named) as caught:
        model(pixel_values, image_features=make_features(features), relation_scope="batch")
    assert "`image_features`" in str(caught.value)


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


# --- Pooling --------------------------------------------------------------------------------------------------------


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}

# A backbone's config; what stands in front of its 16 patch tokens; what "auto" is.
POOLED = {
    "vit": (ViTConfig(**TRANSFORMER, intermediate_size=24), 1, "cls"),
    "deit": (DeiTConfig(**TRANSFORMER, intermediate_size=24), 2, "cls"),
    "dinov2": (Dinov2Config(**TRANSFORMER, mlp_ratio=2), 1, "cls_mean"),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(**TRANSFORMER, mlp_ratio=2, num_register_tokens=3),
        4,
        "cls_mean",
    ),
    "clip_vision": (CLIPVisionConfig(**TRANSFORMER, intermediate_size=24), 1, "pooler"),
    "swin": (SwinConfig(**WINDOWS), 0, "pooler"),
    "resnet": (ResNetConfig(**CONVOLUTIONS), 0, "pooler"),
}


@torch.no_grad()
def pooled_by_hand(outputs, pooling, num_prefix_tokens):
    hidden_state = outputs.last_hidden_state
    if pooling == "pooler":
        return outputs.pooler_output.reshape(len(hidden_state), -1)
    if hidden_state.ndim == 4:
        return hidden_state.mean((2, 3))
    mean = sum(hidden_state[:, index] for index in range(num_prefix_tokens, hidden_state.shape[1]))
    mean = mean / (hidden_state.shape[1] - num_prefix_tokens)
    first = hidden_state[:, 0]
    return {"cls": first, "mean": mean, "cls_mean": torch.cat([first, mean], 1)}[pooling]


@pytest.mark.parametrize("pooling", ["auto", "pooler", "cls", "mean", "cls_mean"])
@pytest.mark.parametrize("name", POOLED)
def test_pooling_is_that_by_hand(name, pooling, pixel_values):
    backbone_config, num_prefix_tokens, auto = POOLED[name]
    config = RBIConfig(backbone_config=backbone_config, pooling=pooling)
    if "cls" in pooling and not num_prefix_tokens:
        with pytest.raises(ValueError, match=f'`pooling="{pooling}"`, but {name} has no class token: use "mean"'):
            RBIModel(config)
        return
    model = randomize_(RBIModel(config).eval(), std=0.2)
    features, outputs = model.extract_features(pixel_values)
    if pooling in ("cls", "mean", "cls_mean") and num_prefix_tokens:
        assert outputs.last_hidden_state.shape[1] == num_prefix_tokens + 16
    expected = pooled_by_hand(outputs, auto if pooling == "auto" else pooling, num_prefix_tokens)
    assert features.shape == (7, model.config.feature_size)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "clip_vision"])
def test_prefix_tokens_are_left_out_of_the_mean_at_other_sizes(name):
    backbone_config, num_prefix_tokens, _ = POOLED[name]
    model = randomize_(RBIModel(RBIConfig(backbone_config=backbone_config, pooling="mean")).eval(), std=0.2)
    # Not square, and no multiple of the patches.
    features, outputs = model.extract_features(torch.randn(2, 3, 40, 59), interpolate_pos_encoding=True)
    assert outputs.last_hidden_state.shape[1] == num_prefix_tokens + 5 * 7
    torch.testing.assert_close(features, pooled_by_hand(outputs, "mean", num_prefix_tokens), atol=1e-5, rtol=1e-5)


def test_no_pooler_where_there_is_none():
    backbone_config = SegformerConfig(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION)
    with pytest.raises(ValueError, match=r'`pooling="pooler"`, but segformer gives no `pooler_output`: use "mean"'):
        RBIModel(RBIConfig(backbone_config=backbone_config, pooling="pooler"))


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("preset", ["paper", "kernel"])
def test_no_parameter_goes_without_gradient(name, preset, pixel_values):
    config = getattr(RBIConfig, preset)(backbone_config=POOLED[name][0], num_labels=5)
    model = RBIForImageClassification(config).train()
    model(pixel_values, labels=torch.arange(7) % 5).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Masked patches are for pretraining alone.
    assert {name for name in unused if not name.endswith("mask_token")} == set()


def test_the_pooler_that_is_asked_for_is_kept(pixel_values):
    config = RBIConfig(backbone_config=POOLED["vit"][0], pooling="pooler")
    assert RBIModel(config).backbone.pooler is not None
    config = RBIConfig(backbone_config=POOLED["vit"][0])
    assert RBIModel(config).backbone.pooler is None


# --- From pretrained weights ----------------------------------------------------------------------------------------


OVERLAPPING_PATCHES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
SPATIAL_REDUCTION = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 99}
INVERTED_BOTTLENECKS = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 4],
}
LABELS = {0: "sparrow", 1: "wren", 2: "robin", 3: "thrush"}

CLASSIFIERS = {
    "vit": ViTConfig(**TRANSFORMER, intermediate_size=24),
    "deit": DeiTConfig(**TRANSFORMER, intermediate_size=24),
    "swin": SwinConfig(**WINDOWS),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32),
    "dinov2": Dinov2Config(**TRANSFORMER, mlp_ratio=2),
    "beit": BeitConfig(**TRANSFORMER, intermediate_size=24),
    "resnet": ResNetConfig(**CONVOLUTIONS),
    "mobilenet_v2": MobileNetV2Config(depth_multiplier=0.25, finegrained_output=False, image_size=32),
    "efficientnet": EfficientNetConfig(image_size=32, width_coefficient=0.05, hidden_dim=64, **INVERTED_BOTTLENECKS),
    "pvt_v2": PvtV2Config(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION, image_size=32),
    "segformer": SegformerConfig(**OVERLAPPING_PATCHES, **SPATIAL_REDUCTION),
    "hiera": HieraConfig(image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_query_pool=1),
    "clip": CLIPConfig(vision_config={**TRANSFORMER, "intermediate_size": 24}, text_config=TEXT),
    "siglip": SiglipConfig(vision_config={**TRANSFORMER, "intermediate_size": 24}, text_config=TEXT),
    "poolformer": PoolFormerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
}
REFUSED = {"poolformer"}


def make_classifier(name, pixel_values):
    """A classifier of random weights whose logits differ between images."""
    config = copy.deepcopy(CLASSIFIERS[name])
    config.id2label, config.label2id = LABELS, {label: index for index, label in LABELS.items()}
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    # DeiT has two, of which the first has one classifier.
    classifier = (model_class[0] if isinstance(model_class, tuple) else model_class)(config)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        # Statistics of the images for batch normalization, without which deep networks give 0 for all of them.
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        classifier.train()(pixel_values)
        # Logits of the size that trained ones have.
        *_, linear = (module for module in classifier.modules() if isinstance(module, nn.Linear))
        linear.weight /= classifier.eval()(pixel_values).logits.std(0).min()
    return classifier


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("source", ["model", "path"])
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in REFUSED])
def test_an_image_classifier_keeps_its_logits(name, source, pixel_values, tmp_path):
    classifier = make_classifier(name, pixel_values)
    with torch.no_grad():
        expected = classifier(pixel_values).logits
    assert expected.shape == (7, 4) and expected.std(0).min() > 0.9
    before = snapshot(classifier)
    if source == "path":
        classifier.save_pretrained(tmp_path)
    model = RBIForImageClassification.from_image_classifier(classifier.train() if source == "model" else str(tmp_path))
    assert classifier.training == (source == "model")
    assert model.config.relation_position_encoding == "bias" and not model.training
    assert model.config.id2label == LABELS and model.config.num_labels == 4
    for scope in ("self", None):
        torch.testing.assert_close(logits_of(model, pixel_values, scope), expected, atol=1e-5, rtol=0)
    # Scope batch is a weighted mean of the images' logits.
    outputs = model(pixel_values, relation_scope="batch", output_relations=True)
    weighted = outputs.relation_attentions[:, 0] @ expected
    torch.testing.assert_close(outputs.logits, weighted, atol=1e-4, rtol=0)
    assert (weighted - expected).abs().max() > 1e-3

    # What is trained is a copy.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(pixel_values, labels=torch.arange(7) % 4).loss.backward()
    optimizer.step()
    assert (logits_of(model.eval(), pixel_values, "self") - expected).abs().max() > 1e-4
    after = snapshot(classifier)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_image_classifier_takes_the_paper_preset_and_other_fields(pixel_values):
    classifier = make_classifier("convnext", pixel_values)
    model = RBIForImageClassification.from_image_classifier(
        classifier, preset="paper", head_initialization="identity", num_attention_heads=3, image_mean=[0.5, 0.5, 0.5]
    )
    assert model.config.attention_type == "dot_product" and model.config.num_attention_heads == 3
    assert model.config.image_mean == [0.5, 0.5, 0.5]
    with torch.no_grad():
        expected = classifier(pixel_values).logits
    torch.testing.assert_close(logits_of(model, pixel_values, "self"), expected, atol=1e-5, rtol=0)


def test_an_image_classifier_without_bias(pixel_values):
    classifier = make_classifier("vit", pixel_values)
    classifier.classifier = nn.Linear(16, 4, bias=False)
    model = RBIForImageClassification.from_image_classifier(classifier)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, pixel_values, "self"), classifier(pixel_values).logits, atol=1e-5, rtol=0
        )


def test_a_normalisation_before_the_classifier_is_refused(pixel_values):
    with pytest.raises(ValueError, match=r"PoolFormerForImageClassification does more than pooling.*normalization"):
        RBIForImageClassification.from_image_classifier(make_classifier("poolformer", pixel_values))


def test_two_classifiers_are_refused():
    classifier = DeiTForImageClassificationWithTeacher(CLASSIFIERS["deit"])
    with pytest.raises(
        ValueError, match=r"Teacher are not the output of one linear layer.*`from_backbone_pretrained`"
    ):
        RBIForImageClassification.from_image_classifier(classifier)


def test_an_unknown_preset_is_refused(pixel_values):
    with pytest.raises(ValueError, match=r'`preset` must be "paper" or "kernel", got \'papper\''):
        RBIForImageClassification.from_image_classifier(make_classifier("vit", pixel_values), preset="papper")


def test_an_unknown_argument_beside_a_model_is_refused(pixel_values):
    with pytest.raises(ValueError, match="num_head can only be passed with the path"):
        RBIForImageClassification.from_image_classifier(make_classifier("vit", pixel_values), num_head=3)


ODD_MEAN, ODD_STD = [0.11, 0.22, 0.33], [0.44, 0.55, 0.66]


@pytest.fixture
def vit_folder(tmp_path):
    """A ViT of random weights, saved with an image processor of odd statistics."""
    backbone = randomize_(ViTModel(POOLED["vit"][0]), std=0.2)
    backbone.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=ODD_MEAN, image_std=ODD_STD)
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", backbone


@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("model_class", [RBIModel, RBIForImageClassification])
def test_a_pretrained_backbone(model_class, preset, vit_folder, pixel_values):
    folder, backbone = vit_folder
    model = model_class.from_backbone_pretrained(str(folder), preset=preset, num_labels=6, num_attention_heads=2)
    assert type(model) is model_class and not model.training
    assert model.config.num_labels == 6 and model.config.num_attention_heads == 2
    assert model.config.attention_type == getattr(RBIConfig, preset)().attention_type
    assert (model.config.image_mean, model.config.image_std) == (ODD_MEAN, ODD_STD)
    loaded, expected = model.base_model.backbone.state_dict(), backbone.state_dict()
    assert expected.keys() - loaded.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    with torch.no_grad():
        features, _ = model.base_model.extract_features(pixel_values)
        torch.testing.assert_close(features, backbone.eval()(pixel_values).last_hidden_state[:, 0])


def test_statistics_that_are_given_come_first(vit_folder):
    folder, _ = vit_folder
    model = RBIModel.from_backbone_pretrained(str(folder), image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, [0.25] * 3)
    model = RBIModel.from_backbone_pretrained(str(folder), image_mean=[0.5, 0.5, 0.5])
    assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, ODD_STD)
    processor = ViTImageProcessorPil(image_mean=[0.1, 0.1, 0.1], image_std=[0.9, 0.9, 0.9])
    model = RBIModel.from_backbone_pretrained(str(folder), image_processor=processor)
    assert (model.config.image_mean, model.config.image_std) == ([0.1] * 3, [0.9] * 3)


def test_the_vision_tower_of_a_checkpoint_of_several(pixel_values, tmp_path):
    clip = randomize_(CLIPModel(CLASSIFIERS["clip"]), std=0.2).eval()
    clip.save_pretrained(tmp_path)
    model = RBIForImageClassification.from_backbone_pretrained(str(tmp_path), num_labels=3)
    assert model.config.backbone_config.model_type == "clip_vision_model"
    with torch.no_grad():
        features, _ = model.rbi.extract_features(pixel_values)
        torch.testing.assert_close(features, clip.vision_model(pixel_values).pooler_output)


def test_a_backbone_in_low_precision_stays_so(vit_folder):
    folder, _ = vit_folder
    model = RBIModel.from_backbone_pretrained(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- Checkpoints ----------------------------------------------------------------------------------------------------


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


def test_a_bare_backbone_is_refused_with_the_mend(backbone_config, tmp_path):
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
    assert torch.equal(logits_of(loaded, pixel_values, scope), logits_of(model, pixel_values, scope))


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


# --- Refusals of the constructors ---------------------------------------------------------------------------------


@pytest.fixture
def vit_config():
    return ViTConfig(
        hidden_size=FEATURE_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )


def test_features_that_are_not_finite_do_not_poison_gradients_in_scope_self(model, pixel_values, features):
    features[BAD_ROW, 3] = math.nan
    labels = torch.arange(7) % 5
    labels[BAD_ROW] = -100
    model(pixel_values, labels=labels, image_features=features, relation_scope="self").loss.backward()
    assert model.rbi.rra.value.weight.grad.isfinite().all() and model.classifier.weight.grad.isfinite().all()
    assert model.rbi.rra.value.weight.grad.abs().max() > 0


@pytest.mark.parametrize("model_type", ["pvt", "vit_mae", "yolos"])
def test_backbones_that_would_be_silently_wrong_are_refused(model_type):
    with pytest.raises(ValueError, match="cannot be a backbone: it"):
        RBIModel(RBIConfig(backbone_config={"model_type": model_type}))


def test_a_feature_size_that_is_not_the_backbones_is_named(backbone_config, pixel_values):
    model = RBIModel(RBIConfig(backbone_config=backbone_config, feature_size=FEATURE_SIZE + 1))
    with pytest.raises(ValueError, match="`feature_size` is 25, but the backbone gives 24 features"):
        model(pixel_values)


def test_a_backbone_checkpoint_without_some_weights_is_refused(vit_config, tmp_path):
    shallow = copy.deepcopy(vit_config)
    shallow.num_hidden_layers = 1
    ViTModel(shallow).save_pretrained(tmp_path)
    vit_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of ViTModel, for instance"):
        RBIModel.from_backbone_pretrained(str(tmp_path))


def test_a_truncated_backbone_checkpoint_is_refused(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"cannot be read .* truncated or was altered"):
        RBIModel.from_backbone_pretrained(str(tmp_path))


def test_the_folder_of_another_model_is_refused_with_the_mend(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'of a "vit" model, not of RBI.*from_backbone_pretrained'):
        RBIForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights of ViTForImageClassification, for instance `classifier"):
        RBIForImageClassification.from_image_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="not the output of one linear layer"):
        RBIForImageClassification.from_image_classifier(ViTModel(vit_config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 3}, "The classifier has 5 classes"),
        ({"id2label": {0: "a", 1: "b"}}, "The classifier has 5 classes"),
        ({"pooling": "mean"}, "`pooling` is taken from the classifier"),
        ({"feature_size": 24}, "`feature_size` is taken from the classifier"),
    ],
)
def test_what_the_classifier_decides_cannot_be_given(vit_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        RBIForImageClassification.from_image_classifier(ViTForImageClassification(vit_config), **arguments)


def test_an_rbi_model_is_no_classifier_to_plug_into(model):
    with pytest.raises(ValueError, match="is an RBI model already"):
        RBIForImageClassification.from_image_classifier(model)


def test_a_misspelt_argument_is_named(vit_config, tmp_path):
    ViTModel(vit_config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no argument `num_label`: did you mean `num_labels`"):
        RBIForImageClassification.from_backbone_pretrained(str(tmp_path), num_label=3)
