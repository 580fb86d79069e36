"""What is trained and how fast, in models of several families; freezing, LoRA and the moving average."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BeitConfig,
    ConvNextConfig,
    Dinov2Config,
    EfficientNetConfig,
    MobileNetV2Config,
    ResNetConfig,
    SegformerConfig,
    SiglipVisionConfig,
    Swinv2Config,
    ViTConfig,
)

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.fine_tuning.optimization import (
    OPTIMIZERS,
    MovingAverage,
    add_lora,
    freeze_backbone,
    freeze_batch_norm,
    layer_numbers,
    merge_lora,
    parameter_groups,
    rbi_model,
    set_batch_norm_momentum,
)


_TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1]}
# With the number of their blocks, and whether anything comes after these.
FAMILIES = {
    "beit": (BeitConfig(**_TRANSFORMER, intermediate_size=32), 3, True),
    "convnext": (ConvNextConfig(**_STAGES, image_size=32), 5, True),
    "dinov2": (Dinov2Config(**_TRANSFORMER), 3, True),
    "efficientnet": (
        EfficientNetConfig(image_size=32, hidden_dim=320, width_coefficient=0.25, depth_coefficient=0.25),
        7,
        True,
    ),
    "mobilenet_v2": (MobileNetV2Config(image_size=32, depth_multiplier=0.25), 16, True),
    "resnet": (ResNetConfig(embedding_size=8, **_STAGES), 5, False),
    "resnet_basic": (ResNetConfig(embedding_size=8, **_STAGES, layer_type="basic"), 5, False),
    "segformer": (SegformerConfig(**_STAGES, num_attention_heads=[1, 1, 1, 1]), 5, True),
    "siglip": (SiglipVisionConfig(**_TRANSFORMER, intermediate_size=32), 3, True),
    "swinv2": (
        Swinv2Config(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, image_size=32, patch_size=4),
        3,
        True,
    ),
    "vit": (ViTConfig(**_TRANSFORMER, intermediate_size=32), 3, True),
}


def make_model(family="vit", preset="paper", **fields):
    config = copy.deepcopy(FAMILIES[family][0])
    for name, value in fields.items():
        setattr(config, name, value)
    return RBIForImageClassification(getattr(RBIConfig, preset)(backbone_config=config, num_labels=4))


def train_step(model, optimizer, batch_size=6):
    model.train()
    labels = torch.arange(batch_size) % 4
    loss = model(pixel_values=torch.randn(batch_size, 3, 32, 32), labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def order_of_execution(backbone):
    """Names of the backbone's parameters, in the order in which the modules that own them are first called."""
    order = []
    for name, module in backbone.named_modules():
        own = [f"{name}.{each}".lstrip(".") for each, _ in module.named_parameters(recurse=False)]
        module.register_forward_pre_hook(lambda module, inputs, own=own: order.extend(own))
    with torch.no_grad():
        backbone.eval()(torch.zeros(2, 3, 32, 32))
    return list(dict.fromkeys(order))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_numbered_as_they_are_run(family):
    config, num_blocks, has_more = FAMILIES[family]
    backbone = AutoModel.from_config(config)
    numbers = layer_numbers(backbone)
    assert set(numbers) == {name for name, _ in backbone.named_parameters()}
    in_order = [numbers[name] for name in order_of_execution(backbone)]
    assert in_order == sorted(in_order)
    assert set(numbers.values()) == set(range(num_blocks + 1 + has_more))


def test_blocks_of_the_families():
    """One block each of some, by name."""
    for family, prefixes in {
        "vit": {0: "embeddings", 1: "layers.0", 3: "layers.2", 4: ("layernorm", "pooler")},
        "convnext": {
            1: ("encoder.stages.0.layers.0", "encoder.stages.1.downsampling"),  # which goes with the block before
            2: "encoder.stages.1.layers.0",
            6: "layernorm",
        },
        "swinv2": {1: "encoder.layers.0", 2: "encoder.layers.1.blocks.0", 3: "encoder.layers.1.blocks.1"},
        "mobilenet_v2": {0: "conv_stem", 1: "layer.0", 16: "layer.15", 17: "conv_1x1"},
    }.items():
        numbers = layer_numbers(AutoModel.from_config(FAMILIES[family][0]))
        for number, prefix in prefixes.items():
            names = [name for name, each in numbers.items() if each == number]
            assert all(name.startswith(prefix) for name in names), (family, number, names)


class _Timmlike(nn.Module):
    """As timm's MobileNets: lists of blocks in a list of stages, of which one has a block alone."""

    def __init__(self):
        super().__init__()

        def block():
            return nn.ModuleDict({"expand": nn.Conv2d(3, 6, 1), "squeeze": nn.Sequential(nn.Conv2d(6, 3, 1))})

        self.stem = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(*(nn.Sequential(*(block() for _ in range(depth))) for depth in (1, 2, 3)))
        self.head = nn.Conv2d(3, 3, 1)


def test_blocks_of_stages_that_are_lists_themselves():
    numbers = layer_numbers(_Timmlike())
    assert numbers["stem.weight"] == 0
    places = ("0.0", "1.0", "1.1", "2.0", "2.1", "2.2")
    assert [numbers[f"blocks.{place}.expand.weight"] for place in places] == list(range(1, 7))
    assert numbers["blocks.2.2.squeeze.0.weight"] == 6
    assert numbers["head.weight"] == 7


def test_a_backbone_without_blocks():
    assert set(layer_numbers(nn.Linear(2, 2)).values()) == {0}
    assert layer_numbers(nn.Identity()) == {}


@pytest.mark.parametrize(
    ("family", "head_learning_rate", "layer_decay"),
    [
        ("vit", None, None),
        ("vit", 0.03, 0.5),
        ("convnext", 0.03, None),
        ("swinv2", None, 0.5),
        ("resnet", None, 0.5),
        ("mobilenet_v2", 0.03, 0.5),
        ("dinov2", 0.03, None),
    ],
)
def test_each_parameter_has_the_rate_of_its_depth(family, head_learning_rate, layer_decay):
    model = make_model(family)
    frozen = next(model.rbi.backbone.parameters()).requires_grad_(False)
    groups = parameter_groups(model, 0.01, 0.3, head_learning_rate, layer_decay)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(group_of) == len(trainable)
    assert id(frozen) not in group_of
    numbers = {f"rbi.backbone.{name}": number for name, number in layer_numbers(model.rbi.backbone).items()}
    deepest = max(numbers.values())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in numbers:
            rate = 0.01 * (layer_decay or 1.0) ** (deepest - numbers[name])
        else:
            rate = head_learning_rate or 0.01
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(rate, rel=1e-9), name
        assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), name
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)


def test_biases_norms_and_the_temperature_do_not_decay():
    model = make_model("convnext", "kernel")
    decaying = {id(p) for group in parameter_groups(model, 1.0, 0.1) if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decaying}
    assert names
    assert not any(word in name for name in names for word in ("bias", "norm", "scale", "gain"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_every_group(name):
    optimizer_class, kwargs = OPTIMIZERS[name]
    model = make_model("resnet")
    before = state_of(model)
    train_step(model, optimizer_class(parameter_groups(model, 0.01, 0.1), lr=0.01, **kwargs))
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad.abs().sum() > 0}
    assert with_gradient <= changed(before, model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2", "convnext", "vit"])
def test_a_frozen_backbone_stays_as_it_is(family):
    # With all that is random in training, and statistics.
    noise = {
        "vit": {"hidden_dropout_prob": 0.5},
        "convnext": {"drop_path_rate": 0.9},
        "mobilenet_v2": {},
        "resnet": {},
    }[family]
    model = make_model(family, **noise)
    freeze_backbone(model)
    groups = parameter_groups(model, 0.1, 0.1, 0.1, 0.5)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if ".backbone." not in name
    }
    before = state_of(model)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        train_step(model, optimizer)
    names = changed(before, model)
    assert {"classifier.weight", "classifier.bias"} <= names
    assert any(".rra." in name for name in names)
    assert not any(".backbone." in name for name in names)
    pixel_values = torch.randn(3, 3, 32, 32)
    model.train()
    first, second = (model.rbi.extract_features(pixel_values)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, model.eval().rbi.extract_features(pixel_values)[0])


def test_without_freezing_the_same_backbone_is_noisy_in_training():
    model = make_model("vit", hidden_dropout_prob=0.5).train()
    pixel_values = torch.randn(3, 3, 32, 32)
    first, second = (model.rbi.extract_features(pixel_values)[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_frozen_batch_statistics(family, is_frozen):
    model = make_model(family)
    if is_frozen:
        freeze_batch_norm(model)
    before = state_of(model)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    names = changed(before, model)
    assert any("running_mean" in name for name in names) != is_frozen
    if family == "resnet":  # without batch statistics, next to nothing comes through a MobileNet that is random
        assert any("normalization.weight" in name for name in names), "their weights are trained"
        assert any(".backbone." in name and "convolution.weight" in name for name in names)


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
def test_the_momentum_of_batch_statistics(momentum):
    model = make_model("resnet").train()
    set_batch_norm_momentum(model, momentum)
    layer = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    before = layer.running_mean.fill_(3.0).clone()
    with torch.no_grad():
        model(pixel_values=torch.randn(6, 3, 32, 32))
    expected = (1 - momentum) * before + momentum * inputs[0].mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected)


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("family", ["vit", "convnext", "swinv2", "resnet", "mobilenet_v2"])
def test_lora_trains_adapters_and_the_head_alone_and_merges(family):
    plain = make_model(family)
    original = state_of(plain)
    model = add_lora(plain, rank=2)
    assert rbi_model(model) is plain
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or ".rra." in name or "classifier" in name for name in trainable)
    adapted = {name.split(".lora_")[0] for name in trainable if ".lora_" in name}
    linear = [
        module
        for module in make_model(family).rbi.backbone.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    assert len(adapted) == len(linear)

    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 0.1))
    for _ in range(3):
        train_step(model, optimizer)
    for name, value in plain.state_dict().items():
        if ".backbone." in name and ".base_layer." in name:
            assert torch.equal(value, original[name.replace(".base_layer.", ".")]), name

    pixel_values = torch.randn(5, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        before = model(pixel_values=pixel_values, relation_scope="batch").logits
        merge_lora(model)
        after = plain(pixel_values=pixel_values, relation_scope="batch").logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == set(original), "an RBI model as it was"
    names = changed(original, plain)
    assert {"classifier.weight"} <= names
    assert any(".backbone." in name and name.endswith("weight") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rank"), [("vit", 1), ("vit", 32), ("convnext", 32), ("swinv2", 1), ("resnet", 32), ("mobilenet_v2", 1)]
)
def test_adapters_have_the_rate_of_their_layer(family, rank):
    numbers = layer_numbers(make_model(family).rbi.backbone)
    model = add_lora(make_model(family), rank)
    groups = parameter_groups(model, 0.01, 0.1, 0.5, 0.5)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(trainable)
    deepest = max(numbers.values())
    for name, parameter in trainable.items():
        if ".lora_" in name:
            layer = name.split(".backbone.")[1].split(".lora_")[0]
            expected = 0.01 * 0.5 ** (deepest - numbers[f"{layer}.weight"])
        else:
            expected = 0.5
        assert rates[id(parameter)] == pytest.approx(expected), name


def test_scale_and_dropout_of_lora():
    config = add_lora(make_model(), rank=4).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
    config = add_lora(make_model(), 4, alpha=0.5, dropout=0.1).peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout) == (0.5, 0.1)


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        add_lora(make_model(), 2)


class _Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.randn(3, 4))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(()))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_moving_average_is_that_of_float64(decay):
    model = _Weights()
    average = MovingAverage(model, decay)
    expected = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    frozen = model.frozen.clone()
    for step in range(1, 60):
        with torch.no_grad():
            model.trained.copy_(torch.randn(3, 4))
            model.scale.copy_(torch.randn(()))
        average.update(model)
        now = min(decay, (1 + step) / (10 + step))
        for name in ("trained", "scale"):
            expected[name] = now * expected[name] + (1 - now) * model.get_parameter(name).detach().double().numpy()
    with average.swapped_in(model):
        for name in ("trained", "scale"):
            np.testing.assert_allclose(
                model.get_parameter(name).detach().numpy(), expected[name], rtol=1e-5, atol=1e-6
            )
        assert torch.equal(model.frozen, frozen)


def test_swapping_twice_changes_no_bit():
    model = make_model("resnet")
    average = MovingAverage(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train_step(model, optimizer)
        average.update(model)
    before, averaged = state_of(model), [each.clone() for each in average.average]
    with pytest.raises(KeyError), average.swapped_in(model):
        inside = [parameter.detach().clone() for parameter in model.parameters()]
        raise KeyError
    assert not changed(before, model)
    assert all(torch.equal(one, other) for one, other in zip(average.average, averaged, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(inside, averaged, strict=True))
    names = {name for name, _ in model.named_parameters()}
    with average.swapped_in(model):
        assert changed(before, model) <= names, "the buffers belong to the model"
    optimizer.step()  # the optimizer still holds the tensors of the model


def test_the_moving_average_goes_on_from_a_checkpoint():
    torch.manual_seed(3)
    model = _Weights()
    whole = MovingAverage(model, 0.95)
    draws = [torch.randn(3, 4) for _ in range(20)]
    parts = MovingAverage(model, 0.95)
    for number, draw in enumerate(draws):
        with torch.no_grad():
            model.trained.copy_(draw)
        if number == 7:
            state = {name: value.clone() for name, value in parts.state_dict().items()}
            parts = MovingAverage(model, 0.95)
            parts.load_state_dict(state)
        whole.update(model)
        parts.update(model)
    torch.testing.assert_close(parts.average, whole.average)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, float("nan")])
def test_decays_out_of_range(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MovingAverage(_Weights(), decay)
