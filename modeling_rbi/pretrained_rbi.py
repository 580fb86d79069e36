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
"""From a pretrained backbone or a fine-tuned classifier to an RBI model."""

import copy
import difflib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .backbone_rbi import backbone_class, backbone_init_kwargs, expected_image_size, load_whole, num_channels, pool
from .configuration_rbi import RBIConfig
from .errors_rbi import UserError
from .image_processing_rbi import load_image_processor, pixel_statistics


logger = logging.get_logger(__name__)

# Relative to the largest feature: what recomputing features may change. Rounding grows with depth and differs between
# processors and memory layouts, but stays far below the difference between two poolings.
_FEATURE_TOLERANCE = 1e-3


def load_backbone(
    name_or_path: str, preset: str, image_processor: BaseImageProcessor | None, kwargs: dict[str, Any]
) -> tuple[RBIConfig, PreTrainedModel]:
    r"""
    Loads a pretrained backbone, with a config for an RBI model on it.

    Args:
        name_or_path (`str`):
            Folder or Hub repository of a vision model, or of a model with a vision tower.
        preset (`str`):
            `"paper"` or `"kernel"`.
        image_processor (`BaseImageProcessor`, *optional*):
            Gives `image_mean` and `image_std`. `None`: the one saved with the backbone.
        kwargs (`dict[str, Any]`):
            Fields of [`RBIConfig`], and arguments of the backbone's `from_pretrained`.

    Raises:
        UserError: if it is no vision model, lacks weights, or a field of the config is wrong.
        OSError: if a weights file is truncated or is no safetensors file.
    """
    config_kwargs, model_kwargs = _split_config_kwargs(kwargs)
    hub_kwargs = _hub_kwargs(model_kwargs)
    backbone_config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    backbone_config = getattr(backbone_config, "vision_config", backbone_config)
    config_kwargs |= _resolve_pixel_statistics(
        name_or_path, image_processor, backbone_config, config_kwargs, hub_kwargs
    )
    config = _preset_config(preset, backbone_config=backbone_config, **config_kwargs)
    model_class = backbone_class(backbone_config)
    backbone = load_whole(
        model_class,
        name_or_path,
        config=backbone_config,
        **backbone_init_kwargs(config, model_class),
        **model_kwargs,
    )
    return config, backbone


def load_classifier(
    model_or_path: PreTrainedModel | str,
    preset: str,
    image_processor: BaseImageProcessor | None,
    kwargs: dict[str, Any],
) -> tuple[RBIConfig, PreTrainedModel, nn.Linear]:
    r"""
    Takes a fine-tuned image classifier apart: a config for an RBI model, the backbone, and the linear classifier.

    Args:
        model_or_path (`PreTrainedModel` or `str`):
            The classifier, which is copied, or its folder or Hub repository.
        preset (`str`):
            `"paper"` or `"kernel"`.
        image_processor (`BaseImageProcessor`, *optional*):
            Gives `image_mean` and `image_std`. `None`: the one saved with the classifier.
        kwargs (`dict[str, Any]`):
            Fields of [`RBIConfig`], and, with a path, arguments of the classifier's `from_pretrained`.

    Raises:
        UserError: if the classifier is not a linear layer on pooled features of its backbone, or a field of the config
            does not fit it.
    """
    config_kwargs, model_kwargs = _split_config_kwargs(kwargs)
    if isinstance(model_or_path, PreTrainedModel):
        if model_kwargs:
            raise UserError(
                f"{', '.join(sorted(model_kwargs))} can only be passed with the path of a classifier, and are no "
                "fields of RBIConfig."
            )
        classifier = copy.deepcopy(model_or_path).eval()
        name_or_path = model_or_path.name_or_path
    else:
        classifier = load_whole(AutoModelForImageClassification, model_or_path, **model_kwargs).eval()
        name_or_path = model_or_path
    if isinstance(classifier.config, RBIConfig):
        raise UserError(f"{name_or_path or 'The given model'} is an RBI model already: use it directly.")
    for name in ("pooling", "feature_size"):
        if name in config_kwargs:
            raise UserError(f"`{name}` is taken from the classifier: leave it out.")

    linear, probe, features = _find_linear(classifier)
    backbone_config = getattr(classifier.config, "vision_config", classifier.config)
    config_kwargs |= _resolve_pixel_statistics(
        name_or_path, image_processor, backbone_config, config_kwargs, _hub_kwargs(model_kwargs)
    )
    for name in ("id2label", "label2id", "problem_type"):
        config_kwargs.setdefault(name, getattr(classifier.config, name))
    num_labels = config_kwargs.get("num_labels", len(config_kwargs["id2label"]))
    if {num_labels, len(config_kwargs["id2label"])} != {linear.out_features}:
        raise UserError(
            f"The classifier has {linear.out_features} classes, so `num_labels` and `id2label` cannot have another "
            "number: fine-tune `from_backbone_pretrained` for other classes."
        )
    backbone, config_kwargs["pooling"] = _find_backbone(classifier, backbone_config, probe, features)
    config_kwargs["feature_size"] = linear.in_features
    return _preset_config(preset, backbone_config=backbone_config, **config_kwargs), backbone, linear


def _preset_config(preset: str, **kwargs) -> RBIConfig:
    if preset not in ("paper", "kernel"):
        raise UserError(f'`preset` must be "paper" or "kernel", got {preset!r}.')
    names = "id2label" if kwargs.get("id2label") is not None else "label2id"
    number, named = kwargs.get("num_labels"), kwargs.get(names)
    if number is not None and named is not None and len(named) != number:
        raise UserError(
            f"`num_labels` is {number}, but `{names}` names {len(named)} classes: leave `num_labels` out, or name "
            f"{number} classes."
        )
    return getattr(RBIConfig, preset)(**kwargs)


def _split_config_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits arguments into fields of RBIConfig and arguments of `from_pretrained`."""
    names = {*RBIConfig.own_fields(), "num_labels", "id2label", "label2id", "problem_type"}
    for name in kwargs.keys() - names:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise TypeError(f"There is no argument `{name}`: did you mean `{close[0]}`?")
    config_kwargs = {name: value for name, value in kwargs.items() if name in names}
    return config_kwargs, {name: value for name, value in kwargs.items() if name not in names}


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    return {name: value for name, value in kwargs.items() if name in names}


def _resolve_pixel_statistics(
    name_or_path: str,
    image_processor: BaseImageProcessor | None,
    backbone_config: PreTrainedConfig,
    config_kwargs: dict[str, Any],
    hub_kwargs: dict[str, Any],
) -> dict[str, list[float]]:
    """`image_mean` and `image_std` for the config, from the image processor unless they are given."""
    if "image_mean" in config_kwargs and "image_std" in config_kwargs:
        return {}
    if image_processor is None and name_or_path:
        try:
            image_processor = load_image_processor(name_or_path, **hub_kwargs)
        except (OSError, ValueError, ImportError) as error:
            logger.info(f"No image processor with {name_or_path}: {error}")
    if image_processor is None:
        logger.warning(
            f"No image processor was found with {name_or_path or 'the given model'}. PSNR assumes pixels normalized "
            "with ImageNet's mean and std: pass `image_processor`, or `image_mean` and `image_std`, if they are not."
        )
        return {}
    mean, std = pixel_statistics(image_processor, num_channels(backbone_config))
    return {"image_mean": mean, "image_std": std} | config_kwargs


def _find_linear(classifier: PreTrainedModel) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Runs the classifier on noise to find the linear layer that gives the logits. Also the noise and its features."""
    config = getattr(classifier.config, "vision_config", classifier.config)
    shape = (2, num_channels(config), *expected_image_size(config))
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(shape, generator=generator).to(classifier.device, classifier.dtype)
    calls = []
    handles = [
        module.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
        for module in classifier.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = getattr(classifier(probe, return_dict=True), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    for module, features, output in reversed(calls):
        # The same numbers, passed on unchanged within one forward pass: nothing is computed twice.
        if logits is not None and output.shape == logits.shape and torch.equal(output, logits):
            return module, probe, features
    raise UserError(
        f"The logits of {type(classifier).__name__} are not the output of one linear layer on pooled features, so RBI "
        "cannot be plugged in before it: take its backbone with `from_backbone_pretrained` and train a new classifier."
    )


def _find_backbone(
    classifier: PreTrainedModel, backbone_config: PreTrainedConfig, probe: torch.Tensor, features: torch.Tensor
) -> tuple[PreTrainedModel, str]:
    """The classifier's backbone, and the pooling that gives the features that its linear layer reads."""
    model_class = backbone_class(backbone_config)
    backbone = next((module for module in classifier.modules() if isinstance(module, model_class)), None)
    if backbone is None:  # timm's classifiers hold all the weights of the backbone, but no backbone module
        backbone = AutoModel.from_config(backbone_config).to(classifier.device, classifier.dtype).eval()
        backbone.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        outputs = backbone(probe, return_dict=True)
    statistics = [1.0] * probe.shape[1]  # pooling does not need them, but the config checks their number
    tolerance = max(_FEATURE_TOLERANCE, 16 * torch.finfo(features.dtype).eps) * features.abs().max()
    for pooling in ("pooler", "cls", "mean", "cls_mean"):
        config = RBIConfig(
            backbone_config=backbone_config, pooling=pooling, image_mean=statistics, image_std=statistics
        )
        try:
            pooled = pool(outputs, config, probe.shape[-2:])
        except UserError:  # a pooling that this backbone does not have
            continue
        if pooled.shape == features.shape and (pooled - features).abs().max() <= tolerance:
            return backbone, pooling
    raise UserError(
        f"{type(classifier).__name__} does more than pooling between its backbone and its linear classifier (a layer "
        "of its own, such as a normalization), which RBI's backbone would lack: take the backbone with "
        "`from_backbone_pretrained` and train a new classifier."
    )


__all__ = ["load_backbone", "load_classifier"]
