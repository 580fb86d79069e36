# Copyright 2026 The RBI authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Any vision model as the backbone of RBI: building, loading and pooling it, and checking its input."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_rbi import RBIConfig
from .errors_rbi import UserError


# What a family's own image classifier reads, unless it is the pooler or the mean.
_AUTO_POOLING = {
    "deit": "cls",
    "dinov2": "cls_mean",
    "dinov2_with_registers": "cls_mean",
    "ijepa": "mean",
    "vit": "cls",
    "vit_msn": "cls",
}
_UNUSABLE_BACKBONES = {
    "pvt": "its output does not separate the class token from the patch tokens",
    "sam2_hiera_det_model": "its output has the channels last",
    "sam2_vision_model": "its output has the channels last",
    "vit_mae": "it masks patches at random, also in evaluation; load its weights as a ViT (`ViTModel`)",
    "yolos": "its detection tokens come after the patch tokens",
}


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context. Afterwards each part returns to its own mode: some may be frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def backbone_class(backbone_config: PreTrainedConfig) -> type[PreTrainedModel]:
    r"""
    The class of which `AutoModel` makes the backbone.

    Raises:
        UserError: if it is no vision model, or one that cannot be a backbone.
    """
    model_class = MODEL_MAPPING.get(type(backbone_config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if backbone_config.model_type in _UNUSABLE_BACKBONES:
        raise UserError(
            f"`backbone_config` is a {type(backbone_config).__name__}, whose model cannot be a backbone: "
            f"{_UNUSABLE_BACKBONES[backbone_config.model_type]}."
        )
    if model_class is None or model_class.main_input_name != "pixel_values":
        raise UserError(
            f"`backbone_config` is a {type(backbone_config).__name__}, which does not belong to a vision model: RBI "
            "needs a backbone that takes `pixel_values`, such as ConvNextConfig, ViTConfig or TimmWrapperConfig."
        )
    return model_class


def load_whole(model_class: type[PreTrainedModel], name_or_path: str, **kwargs) -> PreTrainedModel:
    r"""
    Loads a model by `from_pretrained`.

    Raises:
        UserError: if the checkpoint lacks some of the weights, which would be random.
        OSError: if a weights file cannot be read.
    """
    try:
        model, info = model_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise unreadable_weights(name_or_path, error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{name_or_path} lacks {len(missing)} weights of {type(model).__name__}, for instance `{missing[0]}`: "
            "it is the checkpoint of another kind of model. (If they belong to a pooler, choose another `pooling`.)"
        )
    return model


def unreadable_weights(name_or_path: str, error: SafetensorError) -> OSError:
    """The error for a weights file that safetensors cannot read."""
    return OSError(
        f"The weights of {name_or_path} cannot be read ({error}): a safetensors file there is truncated or was "
        "altered. Download or save it again."
    )


def backbone_init_kwargs(config: RBIConfig, model_class: type[PreTrainedModel]) -> dict[str, bool]:
    """Arguments that leave out an unused pooler. DDP reports parameters without a gradient as an error."""
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    pooling = _AUTO_POOLING.get(config.backbone_config.model_type) if config.pooling == "auto" else config.pooling
    return {"add_pooling_layer": False} if has_option and pooling not in (None, "pooler") else {}


def build_backbone(config: RBIConfig) -> PreTrainedModel:
    """A backbone with random weights, without a pooler that `config.pooling` does not use."""
    model_class = backbone_class(config.backbone_config)
    return AutoModel.from_config(config.backbone_config, **backbone_init_kwargs(config, model_class))


def expected_image_size(backbone_config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width, in pixels, of the images that the backbone was made for. 224 if its config does not say."""
    size = getattr(backbone_config, "image_size", None)
    if size is None and getattr(backbone_config, "pretrained_cfg", None):
        size = backbone_config.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    size = (getattr(backbone_config, "model_args", None) or {}).get("img_size", size) or 224
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def num_channels(backbone_config: PreTrainedConfig) -> int:
    """Channels of the images that the backbone takes. 3 if its config does not say."""
    model_args = getattr(backbone_config, "model_args", None) or {}  # arguments of timm
    return getattr(backbone_config, "num_channels", None) or model_args.get("in_chans", 3)


def measure_feature_size(config: RBIConfig) -> int:
    r"""
    Number of pooled features. Configs have no common name for it, so the backbone runs once on the meta device.

    Raises:
        UserError: if the backbone cannot process an image of the size that it expects.
    """
    config = copy.deepcopy(config)
    image_size = expected_image_size(config.backbone_config)
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(config).eval()
        pixel_values = torch.zeros(1, len(config.image_mean), *image_size, dtype=backbone.dtype)
        try:
            outputs = backbone(pixel_values, return_dict=True)
        except Exception as error:  # a model for other inputs may fail in any way
            raise UserError(
                f"The features of {type(backbone).__name__} for an image of {image_size[0]} x {image_size[1]} pixels "
                f"could not be measured ({error}): if it is a vision model that takes such images, set "
                "`feature_size` in RBIConfig."
            ) from error
        return pool(outputs, config, image_size).shape[-1]


def pool(outputs: ModelOutput, config: RBIConfig, image_size: tuple[int, int]) -> torch.Tensor:
    r"""
    Pools the backbone's output to one vector for each image, (batch_size, feature_size), by `config.pooling`.

    Raises:
        UserError: if the backbone has nothing to pool in this way.
    """
    backbone_name = config.backbone_config.model_type
    pooler_output = getattr(outputs, "pooler_output", None)
    pooling: str = config.pooling
    if backbone_name == "timm_wrapper":
        if pooling not in ("auto", "pooler"):
            raise UserError(f'`pooling="{pooling}"`, but timm models do their own pooling: use "pooler" or "auto".')
        if pooler_output is None or pooler_output.ndim != 2:
            raise UserError(
                "The TimmWrapperConfig turns the pooling of its model off: leave its `do_pooling`, and "
                "`features_only` and `global_pool` of its `model_args`, at their defaults."
            )
        return pooler_output
    if pooling == "auto":
        pooling = _AUTO_POOLING.get(backbone_name, "mean" if pooler_output is None else "pooler")
    if pooling == "pooler":
        if pooler_output is None:
            raise UserError(f'`pooling="pooler"`, but {backbone_name} gives no `pooler_output`: use "mean" or "auto".')
        return pooler_output.flatten(1)

    hidden_state = getattr(outputs, "last_hidden_state", None)
    if hidden_state is None:
        raise UserError(f"{backbone_name} gives no `last_hidden_state` to pool: RBI needs another backbone.")
    if hidden_state.ndim == 4:  # (N, C, H, W)
        tokens, num_prefix_tokens = hidden_state.flatten(2).transpose(1, 2), 0
    else:  # (N, L, C)
        tokens = hidden_state
        num_prefix_tokens = _count_prefix_tokens(config.backbone_config, tokens.shape[1], image_size)
    if pooling != "mean" and num_prefix_tokens == 0:
        raise UserError(f'`pooling="{pooling}"`, but {backbone_name} has no class token: use "mean" or "auto".')
    mean = tokens[:, num_prefix_tokens:].mean(1)
    if pooling == "mean":
        return mean
    return tokens[:, 0] if pooling == "cls" else torch.cat([tokens[:, 0], mean], dim=-1)


def _count_prefix_tokens(backbone_config: PreTrainedConfig, num_tokens: int, image_size: tuple[int, int]) -> int:
    """Number of tokens before the patch tokens: class, distillation and register tokens."""
    patch_size = getattr(backbone_config, "patch_size", None)
    if patch_size is None:
        return 0
    height, width = patch_size if isinstance(patch_size, (list, tuple)) else (patch_size, patch_size)
    return max(num_tokens - (image_size[0] // height) * (image_size[1] // width), 0)


def check_images(pixel_values: torch.Tensor | None, image_features: torch.Tensor | None, config: RBIConfig):
    r"""
    Raises:
        UserError: if there are neither images nor features, or their shapes or types do not fit the model.
    """
    if image_features is not None:
        if image_features.ndim != 2 or image_features.shape[1] != config.feature_size or image_features.shape[0] == 0:
            raise UserError(
                f"`image_features` must have the shape (batch_size, {config.feature_size}) with a batch size of at "
                f"least 1, got {tuple(image_features.shape)}."
            )
        if pixel_values is not None and pixel_values.shape[0] != image_features.shape[0]:
            raise UserError(
                f"`pixel_values` hold {pixel_values.shape[0]} images, but `image_features` {image_features.shape[0]}."
            )
    elif pixel_values is None:
        raise UserError("You have to specify pixel_values")
    if pixel_values is None:
        return
    if pixel_values.ndim != 4:
        raise UserError(
            "`pixel_values` must have the shape (batch_size, num_channels, height, width), got "
            f"{tuple(pixel_values.shape)}; a single image needs a batch axis, `pixel_values[None]`."
        )
    if pixel_values.shape[0] == 0:
        raise UserError("`pixel_values` are an empty batch: pass at least one image.")
    if pixel_values.shape[1] != len(config.image_mean):
        raise UserError(
            f"`pixel_values` have {pixel_values.shape[1]} channels, but the model takes {len(config.image_mean)}: "
            "convert the images (`image.convert('RGB')`), and put the channels second."
        )
    if not pixel_values.is_floating_point():
        raise UserError(
            f"`pixel_values` are {pixel_values.dtype}, but must be float and normalized: pass the images through the "
            "model's image processor (`AutoImageProcessor.from_pretrained`)."
        )


__all__ = [
    "backbone_class",
    "backbone_init_kwargs",
    "build_backbone",
    "check_images",
    "expected_image_size",
    "in_evaluation",
    "load_whole",
    "measure_feature_size",
    "num_channels",
    "pool",
    "unreadable_weights",
]
