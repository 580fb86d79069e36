# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decodes stored images to RGB pixels, in the same way everywhere."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, features

from modeling_rbi import UnreadableImageError, upright_rgb
from modeling_rbi.image_processing_rbi import DEFAULT_MAX_PIXELS


# A long text in a PNG file does not make its pixels unreadable.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# Types of files in the ISO container that phones write (ISO/IEC 23008-12).
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
# An extremely narrow image of few pixels would fill the memory when its shorter side is resized to the model's size.
MAX_ASPECT_RATIO = 100


def decode_image(
    image: str | Path | bytes | Mapping[str, Any] | Image.Image,
    box: Sequence[float] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    r"""
    Decodes an image to upright RGB; see [`upright_rgb`]. An animation gives its first frame.

    Args:
        image (`str`, `Path`, `bytes`, `dict` or `PIL.Image.Image`):
            A path, the bytes of a file, a row of `datasets.Image(decode=False)` (`{"path": ..., "bytes": ...}`; the
            bytes are preferred), or an open image, which is not changed.
        box (sequence of 4 floats, *optional*):
            The part of the image to cut out: left, top, right, bottom in pixels of the stored image.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Largest number of pixels, checked before decoding. Pillow warns above its own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, and refuses more than twice as many.

    Raises:
        UnreadableImageError: if the file does not exist, is of an unknown format, broken, cut off or too large.
        UserError: if the box is not four finite numbers, or does not overlap the image.
        TypeError: if `image` is none of the above.
    """
    if isinstance(image, Image.Image):
        return upright_rgb(image, box, max_pixels)
    if isinstance(image, Mapping):
        name = str(image.get("path") or "the image")
        source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if source is None:
            raise UnreadableImageError("The image has neither a path nor bytes.")
    else:
        name, source = str(image) if isinstance(image, (str, Path)) else "the image", image
    if isinstance(source, bytes):
        if not source:
            raise UnreadableImageError(f"{name} is empty.")
        source = io.BytesIO(source)
    elif not isinstance(source, (str, Path)):
        raise TypeError(f"An image is a path, bytes, a dict of both or a PIL image, not {type(source).__name__}.")
    try:
        opened = Image.open(source, formats=known_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name} is too large: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(_why_not_open(source, name, error)) from error
    with opened:
        return upright_rgb(opened, box, max_pixels, name)


@cache
def known_formats() -> list[str]:
    """
    All formats of Pillow, and HEIC if pillow-heif is installed, except EPS, a program that Pillow would have
    Ghostscript execute.
    """
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def missing_decoder(head: bytes, ending: str = "") -> str | None:
    """What to install for a file with these first bytes, or this ending, if it is HEIC or AVIF and cannot be read."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if (brand in _HEIC_BRANDS or ending in (".heic", ".heif", ".hif")) and "HEIF" not in known_formats():
        return "It is HEIC: install pillow-heif (`pip install pillow-heif`), or convert it to JPEG."
    can_read_avif = "AVIF" in known_formats() and features.check("avif")
    if (brand in (b"avif", b"avis") or ending == ".avif") and not can_read_avif:
        return "It is AVIF: install Pillow 11.3 or newer with AVIF, or convert it to JPEG."
    return None


def first_bytes(path: str | Path) -> bytes:
    """The first 12 bytes of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(12)
    except OSError:
        return b""


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
        head = source.getvalue() if isinstance(source, io.BytesIO) else first_bytes(source)
        return f"{name} is not an image of a known format." + (f" {hint}" if (hint := missing_decoder(head)) else "")
    return f"{name} cannot be opened: {error}"
