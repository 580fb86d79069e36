"""Image files of all kinds, which the handler and the Space decode as training does."""

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin


def _file(image: Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, 4 bytes of value or offset), which need not be valid."""
    body = b"".join(struct.pack(">HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


def _kinds_of_images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC)
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").quantize(16)
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 200
    associated = TiffImagePlugin.ImageFileDirectory_v2()
    associated[TiffImagePlugin.EXTRASAMPLES] = 1
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>6</tiff:Orientation>")
    kinds = {
        "RGBA": _file(rgba),
        "LA": _file(rgba.convert("LA")),
        "associated alpha": _file(rgba, "TIFF", tiffinfo=associated),
        "palette": _file(palette),
        "transparent palette": _file(palette, transparency=3),
        "transparent RGB": _file(rgb, transparency=rgb.getpixel((0, 0))),
        "bilevel": _file(rgb.convert("1")),
        "gray": _file(rgb.convert("L")),
        "16 bits": _file(Image.fromarray(deep)),
        "32 bits": _file(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float": _file(Image.fromarray(deep.astype(np.float32) / 65535), "TIFF"),
        "large float": _file(Image.fromarray(deep.astype(np.float32) / 257), "TIFF"),
        "CMYK": _file(rgb.convert("CMYK"), "JPEG"),
        "animation": _file(palette, "GIF", save_all=True, append_images=[rgb.rotate(90).quantize(16)]),
        "no EXIF": _file(rgb, "JPEG"),
        "orientation 6 in XMP": _file(rgb, pnginfo=xmp),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        kinds[f"orientation {orientation}"] = _file(rgb, "JPEG", exif=exif)
        kinds[f"orientation {orientation} of 16 bits"] = _file(Image.fromarray(deep), exif=exif)
        kinds[f"orientation {orientation} of transparency"] = _file(palette, exif=exif, transparency=3)
        kinds[f"orientation {orientation} of a TIFF"] = _file(rgb, "TIFF", exif=exif)
    turned = (ExifTags.Base.Orientation, 3, 1, struct.pack(">HH", 6, 0))
    broken = {
        "cut off": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        "no directory": b"Exif\0\0",
        "unknown orientation": _exif((ExifTags.Base.Orientation, 3, 1, struct.pack(">HH", 9, 0))),
        "orientation as text": _exif((ExifTags.Base.Orientation, 2, 4, b"six\0")),
        # Pillow reads the orientation of these, but cannot write their EXIF.
        "resolution as text": _exif(turned, (ExifTags.Base.XResolution, 2, 4, b"abc\0")),
        "negative offset": _exif(turned, (ExifTags.IFD.GPSInfo, 9, 1, struct.pack(">l", -5))),
    }
    return kinds | {f"broken EXIF, {name}": _file(rgb, "JPEG", exif=exif) for name, exif in broken.items()}


_KINDS = _kinds_of_images()


@pytest.fixture(scope="session")
def kinds_of_images():
    """Image files by the name of their kind."""
    return _KINDS


@pytest.fixture(params=_KINDS)
def kind_of_image(request):
    """Each image file in turn."""
    return _KINDS[request.param]
