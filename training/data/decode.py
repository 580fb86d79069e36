# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decodes stored images to RGB pixels, in the same way everywhere."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from modeling_rbi import UserError


DEFAULT_MAX_PIXELS = 100_000_000
# An extremely narrow image of few pixels would fill the memory when its shorter side is resized to the model's size.
MAX_ASPECT_RATIO = 100

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


class UnreadableImageError(UserError):
    """An image is missing, of an unknown format, broken, cut off or too large; the message names it and says which."""


def decode_image(
    image: str | Path | bytes | Mapping[str, Any] | Image.Image,
    box: Sequence[float] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    r"""
    Decodes an image to upright RGB.

    The orientation from EXIF is applied and removed. Transparent images are put on white. 16-bit gray (modes `I;16`
    and `I`) is scaled to 8 bits. Floats (mode `F`) range from 0 to 1, or from 0 to 255 if one is above 1. An animation
    gives its first frame. Color profiles are not applied.

    Args:
        image (`str`, `Path`, `bytes`, `dict` or `PIL.Image.Image`):
            A path, the bytes of a file, a row of `datasets.Image(decode=False)` (`{"path": ..., "bytes": ...}`; the
            bytes are preferred), or an open image, which is not changed.
        box (sequence of 4 floats, *optional*):
            Left, top, right, bottom in pixels of the stored image, before it is turned upright (in a TIFF file: after,
            because Pillow turns it while loading). The box is rounded outwards, clipped to the image and cut out.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels, checked before decoding. Pillow warns above its own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, and refuses more than twice as many.

    Raises:
        UnreadableImageError: if the file does not exist, is of an unknown format, broken, cut off or too large.
        UserError: if the box is not four finite numbers, or does not overlap the image.
        TypeError: if `image` is none of the above.
    """
    if isinstance(image, Mapping):
        name = str(image.get("path") or "the image")
        source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if source is None:
            raise UnreadableImageError("The image has neither a path nor bytes.")
    else:
        name, source = _name(image), image
    if isinstance(source, Image.Image):
        return _finish(source, name, box, max_pixels)
    if isinstance(source, bytes):
        if not source:
            raise UnreadableImageError(f"{name} is empty.")
        source = io.BytesIO(source)
    elif not isinstance(source, (str, Path)):
        raise TypeError(f"An image is a path, bytes, a dict of both or a PIL image, not {type(source).__name__}.")
    try:
        opened = Image.open(source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name} is too large: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(_why_not_open(source, name, error)) from error
    with opened:
        return _finish(opened, name, box, max_pixels)


def _name(image: Any) -> str:
    if isinstance(image, (str, Path)):
        return str(image)
    return str(getattr(image, "filename", "") or "the image")


@cache
def _formats() -> list[str]:
    """All formats of Pillow except EPS, a program that Pillow would have Ghostscript execute."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _why_not_open(source: Any, name: str, error: Exception) -> str:
    if isinstance(source, (str, Path)):
        if not Path(source).exists():
            return f"{name} does not exist."
        if Path(source).is_dir():
            return f"{name} is a folder, not an image."
        if isinstance(error, PermissionError):
            return f"{name} cannot be read: {error.strerror}."
        if not Path(source).stat().st_size:
            return f"{name} is empty."
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{name} is not an image of a known format."
    return f"{name} cannot be opened: {error}"


def _finish(image: Image.Image, name: str, box: Sequence[float] | None, max_pixels: int) -> Image.Image:
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
    if box is not None:
        image = image.crop(_whole_box(box, image.size, name))
    image = _to_rgb(image, name)
    if orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
    # It still describes the stored image, such as its orientation.
    image.info.clear()
    return image


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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new image of mode RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImageError(f"{name} has pixels that are not finite.")
        if image.mode != "F":
            values /= 257
        elif values.max() <= 1:
            values *= 255
        image = Image.fromarray((values.clip(0, 255) + 0.5).astype(np.uint8))
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        # Pillow converts La only to LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
