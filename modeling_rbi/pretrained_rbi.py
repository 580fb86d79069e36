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

import difflib

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .backbone_rbi import _backbone_class, _expected_image_size, _num_channels, _pool
from .configuration_rbi import RBIConfig
from .errors_rbi import UserError
from .image_processing_rbi import load_image_processor, pixel_statistics


logger = logging.get_logger(__name__)


def _preset_config(preset: str, **kwargs) -> RBIConfig:
    if preset not in ("paper", "kernel"):
        raise UserError(f'`preset` must be "paper" or "kernel", got {preset!r}.')
    return getattr(RBIConfig, preset)(**kwargs)


def _split_config_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """Those that are fields of RBIConfig, and the others, which are for `from_pretrained`."""
    names = {*RBIConfig.own_fields(), "num_labels", "id2label", "label2id", "problem_type"}
    for name in kwargs.keys() - names:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise TypeError(f"There is no argument `{name}`: did you mean `{close[0]}`?")
    config_kwargs = {name: value for name, value in kwargs.items() if name in names}
    return config_kwargs, {name: value for name, value in kwargs.items() if name not in names}


def _hub_kwargs(kwargs: dict) -> dict:
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    return {name: value for name, value in kwargs.items() if name in names}


def _resolve_pixel_statistics(
    name_or_path: str,
    image_processor: BaseImageProcessor | None,
    backbone_config: PreTrainedConfig,
    config_kwargs: dict,
    hub_kwargs: dict,
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
            f"No image processor was found beside {name_or_path or 'the given model'}. PSNR takes the pixels for "
            "normalized with ImageNet's mean and std: pass `image_processor`, or `image_mean` and `image_std`, "
            "if they are not."
        )
        return {}
    mean, std = pixel_statistics(image_processor, _num_channels(backbone_config))
    return {"image_mean": mean, "image_std": std} | config_kwargs


def _find_classifier(classifier: PreTrainedModel) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Runs the classifier on noise to see which linear layer gives the logits, from which features."""
    config = getattr(classifier.config, "vision_config", classifier.config)
    shape = (2, _num_channels(config), *_expected_image_size(config))
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
    model_class = _backbone_class(backbone_config)
    backbone = next((module for module in classifier.modules() if isinstance(module, model_class)), None)
    if backbone is None:  # timm's classifiers hold no backbone of their own, only all its weights
        backbone = AutoModel.from_config(backbone_config).to(classifier.device, classifier.dtype).eval()
        backbone.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        outputs = backbone(probe, return_dict=True)
    statistics = [1.0] * probe.shape[1]  # pooling does not need them, but the config checks their number
    for pooling in ("pooler", "cls", "mean", "cls_mean"):
        config = RBIConfig(
            backbone_config=backbone_config, pooling=pooling, image_mean=statistics, image_std=statistics
        )
        try:
            pooled = _pool(outputs, config, probe.shape[-2:])
        except ValueError:
            continue
        if pooled.shape == features.shape and torch.allclose(pooled, features, rtol=1e-4, atol=1e-5):
            return backbone, pooling
    raise UserError(
        f"{type(classifier).__name__} does more than pooling between its backbone and its linear classifier (a layer "
        "of its own, such as a normalization), which RBI's backbone would lack: take the backbone with "
        "`from_backbone_pretrained` and train a new classifier."
    )
