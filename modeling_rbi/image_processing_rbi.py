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
"""
Image processors for RBI: the processor of the backbone, in a form that can be saved with the model; and the RGB image
that any PIL image is turned into before it is processed.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import ExifTags, Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

# `transformers` 5.17 exports it only with torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .errors_rbi import UnreadableImageError, UserError


DEFAULT_MAX_PIXELS = 100_000_000

_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
# How to turn the stored pixels for each value of EXIF's Orientation (CIPA DC-008-2019, 4.6.4 A). Not left to
# `ImageOps.exif_transpose`, which writes the EXIF back and fails if any other entry has a wrong type.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The largest values of cameras and scanners of 8 to 16 bits.
_WHITES = [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
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


def image_mode(image_processor: BaseImageProcessor) -> Literal["L", "RGB"]:
    """The mode of the images that an image processor takes: gray if its `image_mean` has one value."""
    mean = getattr(image_processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def upright_rgb(
    image: Image.Image,
    box: Sequence[float] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    r"""
    Decodes an opened image of any mode to upright RGB.

    The orientation from EXIF is applied and removed. Transparent images are put on white. An animation gives its
    current frame. Color profiles are not applied.

    Gray of more than 8 bits (modes `I;16`, `I` and `F`) is scaled to 8 bits. Black is 0, and white is the first of
    these that applies:

    - the largest value that a TIFF file names (MaxSampleValue, SMaxSampleValue), unless a pixel is above it;
    - the largest value of unsigned 16 bits, in a file or array of that type (of 12 bits in a TIFF file of 12 bits);
    - 1 for floats below 2 (resampling leads to values slightly above 1);
    - the smallest of 255, 1023, 4095, 16383 and 65535 (32767 in a TIFF file of signed 16 bits) that no pixel is above;
    - the largest pixel.

    If a pixel is negative, black is the smallest pixel and white is the largest. `info["gray_range"]` of the result
    says which range was taken.

    Args:
        image (`PIL.Image.Image`):
            The image; it is loaded, but not changed.
        box (sequence of 4 floats, *optional*):
            Left, top, right, bottom in pixels of the stored image, before it is turned upright (in a TIFF file: after,
            because Pillow turns it while loading). The box is rounded outwards, clipped to the image and cut out.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels, checked before decoding.
        name (`str`, *optional*):
            Name of the image in errors. Default: its file.

    Raises:
        UnreadableImageError: if the image is broken, cut off or too large, or has pixels that are not finite.
        UserError: if the box is not four finite numbers, or does not overlap the image.
    """
    name = name or str(getattr(image, "filename", "") or "the image")
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"{name} has {width} x {height} = {width * height} pixels, more than the limit of {max_pixels}."
        )
    # Pillow's decoders raise errors of many kinds for broken files, and its EXIF reader even for intact images.
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"{name} is broken or cut off: {error}") from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        orientation = 1
    rgb = image
    info: dict = {}
    if image.mode == "F" or image.mode.startswith("I"):
        rgb, info["gray_range"] = _scaled_gray(image, name)
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        # Pillow converts La only to LA.
        rgb = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb)
    rgb = rgb.convert("RGB")
    if box is not None:
        rgb = rgb.crop(_whole_box(box, rgb.size, name))
    if orientation in _TRANSPOSES:
        rgb = rgb.transpose(_TRANSPOSES[orientation])
    # The metadata of the stored image would be wrong, such as its orientation.
    rgb.info = info
    return rgb


def _scaled_gray(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Gray of more than 8 bits as gray of 8 bits, and the range that it was scaled from, in words."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    is_unsigned = tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 1
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and is_unsigned:
        values = values.view(np.uint32)  # Pillow has no mode for them
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImageError(f"{name} has pixels that are not finite.")
    black, high = min(0.0, values.min()), values.max()
    white = next((white for white in _WHITES if high <= white), high)
    if image.mode == "F" and high < 2:
        white = 1
    elif image.mode == "I" and bits == 16 and tags:
        white = min(white, 2**15 - 1)
    # In mode I, Pillow gives 16 bits of PNG files in older versions, and PGM files scaled to 16 bits.
    stated = 2**bits - 1 if image.mode.startswith("I;") or image.format in ("PNG", "PPM") else None
    for tag in (ExifTags.Base.MaxSampleValue, ExifTags.Base.SMaxSampleValue):
        with contextlib.suppress(Exception):  # Any type of value may stand there.
            value = tags[tag]
            value = float(max(value) if isinstance(value, tuple) else value)
            if value > 0 and high <= value:
                stated = value
    if black < 0:
        white, gray_range = high, "from the smallest to the largest pixel of each image"
    elif stated is not None:
        white, gray_range = stated, f"from 0 to {stated:g}, as the file states"
        if 16 * high <= white:
            gray_range += ", though no pixel is above a sixteenth of that"
    elif high > _WHITES[-1]:
        gray_range = "from 0 to the largest pixel of each image"
    else:
        gray_range = f"from 0 to {white:g}, by the range of the pixels"
    values -= black
    values *= 255 / (white - black or 1)
    gray = (values.clip(0, 255) + 0.5).astype(np.uint8)
    # In a TIFF file, 0 may be white. Pillow applies that to 8 bits only.
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return Image.fromarray(255 - gray if is_inverted else gray), gray_range


def _whole_box(box: Sequence[float], size: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise UserError(f"The box of {name} must be 4 finite numbers (left, top, right, bottom), got {list(box)}.")
    width, height = size
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if right <= left or bottom <= top or box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(
            f"No part of {name}, {width} x {height}, is in its box {list(box)} (left, top, right, bottom)."
        )
    return left, top, right, bottom


__all__ = ["DEFAULT_MAX_PIXELS", "image_mode", "load_image_processor", "pixel_statistics", "upright_rgb"]
