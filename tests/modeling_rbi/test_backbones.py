"""
Every supported backbone goes through the same checks: forward, backward, both scopes, saving and loading, gradient
checkpointing, bf16, and loading in a process that has no package `modeling_rbi`.
"""

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextV2Config,
    DeiTConfig,
    Dinov2Config,
    EfficientNetConfig,
    HieraConfig,
    MobileNetV2Config,
    PoolFormerConfig,
    PreTrainedConfig,
    PvtV2Config,
    RegNetConfig,
    ResNetConfig,
    SegformerConfig,
    SiglipVisionConfig,
    SwinConfig,
    Swinv2Config,
    TimmWrapperConfig,
    ViTConfig,
)

from modeling_rbi import RBIConfig, RBIForImageClassification


NUM_LABELS = 5
TIMM_IMAGE_SIZE = 64


@dataclass
class Backbone:
    """A backbone to test, and what is known of it from its own documentation."""

    config_class: type[PreTrainedConfig]
    arguments: dict[str, Any]
    # Size of what is pooled; for DINOv2 twice the hidden size, the class token and the mean.
    feature_size: int
    has_checkpointing: bool
    # Parameters without a gradient, and why.
    unused_parameters: dict[str, str] = field(default_factory=dict)
    image_size: int = 32

    def config(self) -> PreTrainedConfig:
        return self.config_class(**self.arguments)


def _transformer(config_class: type[PreTrainedConfig], feature_size: int = 16, **kwargs) -> Backbone:
    """A plain vision transformer: 2 blocks over 16 patches. `kwargs` go to `Backbone`."""
    arguments = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    arguments |= {"mlp_ratio": 2} if config_class is Dinov2Config else {"intermediate_size": 24}
    return Backbone(config_class, arguments, feature_size, has_checkpointing=True, **kwargs)


def _stages(config_class: type[PreTrainedConfig], has_checkpointing: bool, feature_size: int = 12, **arguments):
    """2 stages of one block each. `arguments` go to the config."""
    return Backbone(config_class, {"depths": [1, 1], **arguments}, feature_size, has_checkpointing)


def _timm(architecture: str, feature_size: int, **model_args) -> Backbone:
    arguments = {"architecture": architecture, "model_args": model_args}
    return Backbone(TimmWrapperConfig, arguments, feature_size, has_checkpointing=True, image_size=TIMM_IMAGE_SIZE)


_WINDOWS = {"image_size": 32, "embed_dim": 8, "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
_OVERLAPPING_PATCHES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [8, 12],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
_SPATIAL_REDUCTION = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
_INVERTED_BOTTLENECKS = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 4],
}
_TIMM_WINDOWS = {"img_size": TIMM_IMAGE_SIZE, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}

BACKBONES = {
    "vit": _transformer(ViTConfig),
    "deit": _transformer(DeiTConfig),
    "swin": _stages(SwinConfig, True, 16, **_WINDOWS),
    "swinv2": _stages(Swinv2Config, True, 16, **_WINDOWS),
    "convnext": _stages(ConvNextConfig, False, hidden_sizes=[8, 12], num_stages=2, image_size=32),
    "convnextv2": _stages(ConvNextV2Config, False, hidden_sizes=[8, 12], num_stages=2, image_size=32),
    "dinov2": _transformer(
        Dinov2Config,
        feature_size=2 * 16,
        unused_parameters={"embeddings.mask_token": "stands for masked patches, in pretraining alone"},
    ),
    "beit": _transformer(BeitConfig),
    "resnet": _stages(ResNetConfig, False, embedding_size=8, hidden_sizes=[8, 12]),
    "regnet": _stages(RegNetConfig, False, embedding_size=8, hidden_sizes=[8, 12], groups_width=4),
    "mobilenet_v2": Backbone(
        MobileNetV2Config,
        {"depth_multiplier": 0.25, "finegrained_output": False, "image_size": 64},
        feature_size=320,
        has_checkpointing=False,
        image_size=64,
    ),
    "efficientnet": Backbone(
        EfficientNetConfig,
        {
            "image_size": 32,
            "width_coefficient": 0.05,
            "hidden_dim": 64,
            "initializer_range": 1.0,
            **_INVERTED_BOTTLENECKS,
        },
        feature_size=64,
        has_checkpointing=False,
    ),
    "pvt_v2": _stages(PvtV2Config, True, **_OVERLAPPING_PATCHES, **_SPATIAL_REDUCTION, image_size=32),
    "segformer": _stages(SegformerConfig, True, **_OVERLAPPING_PATCHES, **_SPATIAL_REDUCTION),
    "poolformer": _stages(PoolFormerConfig, False, **_OVERLAPPING_PATCHES, padding=[2, 1], initializer_range=0.2),
    "hiera": _stages(
        HieraConfig, True, 16, image_size=[32, 32], embed_dim=8, num_heads=[1, 2], num_query_pool=1, mlp_ratio=2.0
    ),
    "clip_vision": _transformer(CLIPVisionConfig),
    "siglip_vision": _transformer(SiglipVisionConfig),
    "timm_densenet201": _timm("densenet201", 1920),
    "timm_densenet161": _timm("densenet161", 2208),
    "timm_mobilenetv3_small": _timm("mobilenetv3_small_100", 1024),
    "timm_mobilenetv3_large": _timm("mobilenetv3_large_100", 1280),
    "timm_efficientnet_b0": _timm("efficientnet_b0", 1280),
    "timm_swin": _timm("swin_tiny_patch4_window7_224", 48, window_size=2, **_TIMM_WINDOWS),
    "timm_swinv2": _timm("swinv2_tiny_window8_256", 48, window_size=4, **_TIMM_WINDOWS),
}

# Those that are saved with references, too: with and without class tokens, batch normalization, a pooler.
WITH_REFERENCES = ("vit", "dinov2", "swin", "convnext", "resnet", "efficientnet", "mobilenet_v2", "timm_densenet201")

every_backbone = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.timm] if "timm" in name else []) for name in BACKBONES]
)
backbones_with_references = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.timm] if "timm" in name else []) for name in WITH_REFERENCES]
)
# Each backbone with one of the two presets, in turn.
every_backbone_with_a_preset = pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=[pytest.mark.timm] if "timm" in name else [])
        for name, preset in zip(BACKBONES, itertools.cycle(["paper", "kernel"]))
    ],
)
both_scopes = pytest.mark.parametrize("scope", ["self", "batch"])


def _build(name: str, preset: str = "paper", **kwargs) -> RBIForImageClassification:
    config = getattr(RBIConfig, preset)(backbone_config=BACKBONES[name].config(), num_labels=NUM_LABELS, **kwargs)
    return RBIForImageClassification(config)


def _images(name: str, batch_size: int = 6) -> torch.Tensor:
    """Different smooth images, normalized with ImageNet's mean and std."""
    size = BACKBONES[name].image_size
    images = torch.nn.functional.interpolate(torch.rand(batch_size, 3, 4, 4), size=(size, size), mode="bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def _labels(pixel_values: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(pixel_values)) % NUM_LABELS


@torch.no_grad()
def _settle(model: RBIForImageClassification, pixel_values: torch.Tensor) -> RBIForImageClassification:
    """
    Gives an untrained model answers that differ between images, in evaluation: BatchNorm's statistics become those
    of the images, else most deep convolutional networks give 0 for all of them, and the classifier's weights grow.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(pixel_values)
    model.classifier.weight.normal_(std=4 * model.config.feature_size**-0.5)
    return model.eval()


@torch.no_grad()
def _both_logits(model: Callable, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {scope: model(pixel_values, relation_scope=scope).logits for scope in ("self", "batch")}


def _set_references(model: RBIForImageClassification, name: str):
    images = [{"pixel_values": image} for image in _images(name, 5)]
    model.set_references(images, batch_size=2)


@dataclass
class Saved:
    folder: Path
    pixel_values: torch.Tensor
    config: RBIConfig
    logits: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def saved_models(request, tmp_path_factory) -> dict[str, Saved]:
    """Each backbone that this run has tests for, saved once, with the logits it had."""
    names = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    root = tmp_path_factory.mktemp("saved")
    saved = {}
    for index, name in enumerate(dict.fromkeys(filter(BACKBONES.get, names))):
        torch.manual_seed(index)
        pixel_values = _images(name)
        model = _settle(_build(name, preset=("paper", "kernel")[index % 2]), pixel_values)
        model.save_pretrained(root / name)
        saved[name] = Saved(root / name, pixel_values, copy.deepcopy(model.config), _both_logits(model, pixel_values))
        if name in WITH_REFERENCES:
            _set_references(model, name)
            folder = root / f"{name}_with_references"
            model.save_pretrained(folder)
            with torch.no_grad():
                logits = _both_logits(model, pixel_values) | {"reference": model(pixel_values).logits}
            saved[folder.name] = Saved(folder, pixel_values, model.config, logits)
    yield saved
    shutil.rmtree(root)


# Runs where `modeling_rbi` cannot be imported, even if it is installed.
_LOAD_WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_rbi":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
try:
    import modeling_rbi
except ModuleNotFoundError:
    pass
else:
    sys.exit("modeling_rbi was imported from " + modeling_rbi.__file__)

import torch
from transformers import AutoConfig, AutoModelForImageClassification

images, answers_file = torch.load(sys.argv[1]), sys.argv[2]
answers = {}
for folder, pixel_values in images.items():
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        scopes = ("self", "batch") if model.config.references is None else ("self", "batch", "reference")
        logits = {scope: model(pixel_values, relation_scope=scope).logits for scope in scopes}
        default = model(pixel_values).logits
    answers[folder] = {
        "logits": logits, "default": default, "module": type(model).__module__, "refusal": refusal,
    }
assert "modeling_rbi" not in sys.modules
torch.save(answers, answers_file)
"""


@pytest.fixture(scope="session")
def remote_answers(saved_models, tmp_path_factory) -> dict[str, dict]:
    """What all saved folders answer in one other process, without the package, through the code they carry."""
    folder = tmp_path_factory.mktemp("remote")
    torch.save({str(saved.folder): saved.pixel_values for saved in saved_models.values()}, folder / "images.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    process = subprocess.run(
        [sys.executable, "-I", "-c", _LOAD_WITHOUT_PACKAGE, folder / "images.pt", folder / "answers.pt"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if process.returncode != 0:
        pytest.fail(process.stderr)
    answers = torch.load(folder / "answers.pt")
    return {name: answers[str(saved.folder)] for name, saved in saved_models.items()}


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


@pytest.mark.slow
@every_backbone
def test_feature_size_is_measured(name):
    model = _build(name)
    pixel_values = _images(name, 2)
    assert BACKBONES[name].config().model_type == model.config.backbone_config.model_type
    with torch.no_grad():
        features, _ = model.eval().rbi.extract_features(pixel_values)
    assert features.shape == (2, BACKBONES[name].feature_size)
    assert model.config.feature_size == BACKBONES[name].feature_size


@every_backbone_with_a_preset
def test_forward_and_backward(name, preset):
    model = _build(name, preset).train()
    pixel_values = _images(name).requires_grad_()
    outputs = model(pixel_values, labels=_labels(pixel_values))
    assert outputs.logits.shape == (len(pixel_values), NUM_LABELS)
    outputs.loss.backward()

    without_gradient = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient == {f"rbi.backbone.{key}" for key in BACKBONES[name].unused_parameters}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # The gradient passes through the whole backbone; also where the head is trained without neighbors.
    alone = model(pixel_values, labels=_labels(pixel_values), relation_scope="self").loss
    for gradient in (pixel_values.grad, *torch.autograd.grad(alone, pixel_values)):
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


# Untrained deep networks blow float32's rounding up, which differs between batch sizes: so these two take float64.
@every_backbone_with_a_preset
def test_scope_self_knows_no_batch(name, preset):
    pixel_values = _images(name).double()
    model = _settle(_build(name, preset, relation_scope="self").double(), pixel_values)
    with torch.no_grad():
        logits = model(pixel_values).logits
        for batch_size in (1, 2, 5):
            torch.testing.assert_close(model(pixel_values[:batch_size]).logits, logits[:batch_size])
    assert logits.std(0).min() > 1e-3


@every_backbone_with_a_preset
def test_scope_batch_follows_a_permutation(name, preset):
    pixel_values = _images(name).double()
    model = _settle(_build(name, preset, relation_scope="batch").double(), pixel_values)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        logits = model(pixel_values).logits
        # RPE and attention are in float32 whatever the model is in.
        _assert_close(model(pixel_values[permutation]).logits, logits[permutation])
        # And the neighbors do count.
        assert (model(pixel_values[:2]).logits - logits[:2]).abs().max() > 1e-3


@pytest.mark.slow
@every_backbone
@both_scopes
def test_save_and_load_keep_the_logits(name, scope, saved_models):
    saved = saved_models[name]
    model = AutoModelForImageClassification.from_pretrained(saved.folder)
    with torch.no_grad():
        logits = model(saved.pixel_values, relation_scope=scope).logits
    _assert_close(logits, saved.logits[scope])


@every_backbone
def test_save_and_load_keep_the_config(name, saved_models, tmp_path):
    saved = saved_models[name]
    config = RBIConfig.from_pretrained(saved.folder)
    for key in RBIConfig.own_fields():
        if key != "backbone_config":
            assert getattr(config, key) == getattr(saved.config, key), key
    assert type(config.backbone_config) is BACKBONES[name].config_class
    backbone_config = BACKBONES[name].config()
    for key in BACKBONES[name].arguments:
        # As JSON, which has no tuples.
        loaded, given = (
            json.dumps(getattr(c, key), sort_keys=True) for c in (config.backbone_config, backbone_config)
        )
        assert loaded == given, key
    config.save_pretrained(tmp_path)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (saved.folder, tmp_path))
    assert second == first


@pytest.mark.slow
@every_backbone
def test_loads_without_the_package(name, saved_models, remote_answers):
    saved, answers = saved_models[name], remote_answers[name]
    assert answers["module"].startswith("transformers_modules.")
    for scope, logits in saved.logits.items():
        _assert_close(answers["logits"][scope], logits)
    _assert_close(answers["default"], saved.logits["self"])
    # Code from a folder runs only where it is asked for.
    assert "trust_remote_code" in answers["refusal"]


@pytest.mark.slow
@backbones_with_references
def test_references_go_with_the_model(name, saved_models, remote_answers):
    saved, answers = (each[f"{name}_with_references"] for each in (saved_models, remote_answers))
    assert answers["module"].startswith("transformers_modules.")
    model = AutoModelForImageClassification.from_pretrained(saved.folder)
    assert model.config.references == saved.config.references
    assert answers["logits"].keys() == saved.logits.keys() == {"self", "batch", "reference"}
    for scope, expected in saved.logits.items():
        with torch.no_grad():
            _assert_close(model(saved.pixel_values, relation_scope=scope).logits, expected)
        _assert_close(answers["logits"][scope], expected)
    _assert_close(answers["default"], saved.logits["reference"])
    assert (saved.logits["reference"] - saved.logits["self"]).abs().max() > 1e-3


@backbones_with_references
def test_scope_reference_knows_no_batch(name):
    pixel_values = _images(name).double()
    preset = ("paper", "kernel")[WITH_REFERENCES.index(name) % 2]
    model = _settle(_build(name, preset).double(), pixel_values)
    _set_references(model, name)
    with torch.no_grad():
        logits = model(pixel_values).logits
        for batch_size in (1, 2, 5):
            _assert_close(model(pixel_values[:batch_size]).logits, logits[:batch_size])
    assert logits.std(0).min() > 1e-3


@backbones_with_references
def test_references_of_another_start_are_refused(name, tmp_path):
    """The features of a fixed pattern tell a backbone of random weights from another one."""
    pixel_values = _images(name)
    model, other = (_settle(_build(name), pixel_values) for _ in range(2))
    _set_references(model, name)
    model.rbi.backbone.load_state_dict(other.rbi.backbone.state_dict())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"references of .* were computed by another backbone"):
        RBIForImageClassification.from_pretrained(tmp_path)


def _loss_and_gradients(
    model: RBIForImageClassification, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and how many of the backbone's modules ran again in backward."""
    torch.manual_seed(0)  # some backbones drop paths
    loss = model(pixel_values, labels=_labels(pixel_values)).loss
    calls = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, args: calls.update(again=1))
        for module in model.rbi.backbone.modules()
    ]
    model.zero_grad()
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, calls["again"]


@every_backbone
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_disable.*:FutureWarning")
def test_gradient_checkpointing(name):
    model = _build(name).train()
    assert model.supports_gradient_checkpointing == BACKBONES[name].has_checkpointing
    if not BACKBONES[name].has_checkpointing:
        # Before 5.23 the message is transformers' own, which names the whole model.
        names_backbone = hasattr(model, "activation_checkpointing_enable")
        culprit = type(model.rbi.backbone if names_backbone else model).__name__
        with pytest.raises(ValueError, match=f"{culprit}.* does not support .*checkpointing"):
            model.gradient_checkpointing_enable()
        return

    pixel_values = _images(name)
    loss, gradients, again = _loss_and_gradients(model, pixel_values)
    assert again == 0
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed_gradients, again = _loss_and_gradients(model, pixel_values)
    assert again > 0
    torch.testing.assert_close(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed_gradients, gradients, atol=1e-5, rtol=1e-4)
    model.gradient_checkpointing_disable()
    assert _loss_and_gradients(model, pixel_values)[2] == 0


@every_backbone
@both_scopes
def test_bf16_is_finite(name, scope):
    pixel_values = _images(name)
    model = _settle(_build(name), pixel_values).bfloat16()
    with torch.no_grad():
        logits = model(pixel_values.bfloat16(), relation_scope=scope).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
