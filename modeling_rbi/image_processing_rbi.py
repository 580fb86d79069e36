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
"""Image processors for RBI: the processor of the backbone, in a form that can be saved with the model."""

import math

from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

# `transformers` 5.17 exports it only with torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .errors_rbi import UserError


_TIMM_RESAMPLE = {
    "bicubic": PILImageResampling.BICUBIC,
    "bilinear": PILImageResampling.BILINEAR,
    "nearest": PILImageResampling.NEAREST,
}


def load_image_processor(name_or_path: str, **kwargs) -> BaseImageProcessor:
    r"""
    Loads the image processor of a backbone or of an RBI model. For a timm checkpoint, whose own wrapper cannot be
    saved, it is a `CLIPImageProcessor` that does the same as timm's evaluation transform: resize, center crop,
    normalization. With `backend="pil"` its pixels equal timm's; the default, torchvision, resizes slightly differently
    (by about one gray level). Where an odd number of pixels is cropped, the crop may be one pixel off.

    Args:
        name_or_path (`str`):
            Folder or Hub repository.
        kwargs:
            Passed to `AutoImageProcessor.from_pretrained`.

    Raises:
        UserError: if timm's transform cannot be expressed as such a processor.
    """
    processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
    timm_config = getattr(processor, "data_config", None)
    return processor if timm_config is None else _from_timm_data_config(timm_config, kwargs.get("backend"))


def _from_timm_data_config(data_config: dict, backend: str | None) -> BaseImageProcessor:
    _, height, width = data_config["input_size"]
    crop_mode = data_config.get("crop_mode", "center")
    interpolation = data_config["interpolation"]
    scaled_height, scaled_width = (math.floor(length / data_config["crop_pct"]) for length in (height, width))
    if crop_mode == "squash":
        size = {"height": scaled_height, "width": scaled_width}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled_height}
    else:
        size = None
    if size is None or interpolation not in _TIMM_RESAMPLE:
        raise UserError(
            f"timm's evaluation transform has crop_mode={crop_mode!r}, interpolation={interpolation!r} and input size "
            f"{height} x {width}; only a square center crop, or a squashed image, with {sorted(_TIMM_RESAMPLE)} can "
            "be saved as an image processor: build one that suits the model and save it with the model."
        )
    # Imported here because the import warns without torchvision. timm needs torchvision.
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    processor_class = CLIPImageProcessorPil if backend == "pil" else CLIPImageProcessor
    return processor_class(
        size=size,
        crop_size={"height": height, "width": width},
        resample=_TIMM_RESAMPLE[interpolation],
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
    )


def pixel_statistics(image_processor: BaseImageProcessor, num_channels: int = 3) -> tuple[list[float], list[float]]:
    r"""
    Mean and standard deviation of each channel such that `pixel_values * std + mean` is the image in [0, 1]. They are
    measured on a black and a white image, since processors do more than `image_mean` and `image_std` say (rescaling by
    other factors, offsets, normalizing twice).

    Args:
        image_processor (`BaseImageProcessor`):
            The processor of the model's images.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the model's images: 3, or 1 for gray images.

    Returns:
        `tuple[list[float], list[float]]`: `image_mean` and `image_std` for [`RBIConfig`].
    """
    mode = "L" if num_channels == 1 else "RGB"
    images = [Image.new(mode, (64, 64), color) for color in ("black", "white")]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].double()
    black, white = pixel_values.flatten(2).mean(-1)
    std = 1.0 / (white - black)
    mean = -black * std
    return [round(value, 6) + 0.0 for value in mean.tolist()], [round(value, 6) for value in std.tolist()]


__all__ = ["load_image_processor", "pixel_statistics"]
