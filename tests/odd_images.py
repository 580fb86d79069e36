# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Image files of all kinds, with their right pixels in the bank, in training, at an endpoint and in a Space."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin


@dataclass(frozen=True)
class OddImage:
    """An image file, and its pixels, `(height, width, 3)`, of which each may differ by `tolerance`."""

    file: bytes
    pixels: np.ndarray
    tolerance: int = 0

    def check(self, image: Image.Image):
        """Compares a decoded image."""
        assert (image.mode, image.size) == ("RGB", self.pixels.shape[1::-1])
        difference = np.abs(np.asarray(image).astype(int) - self.pixels.astype(int))
        assert difference.max() <= self.tolerance


def _file(image: Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def tiff(values: np.ndarray, compression: int = 1, **tags: int) -> bytes:
    """A TIFF file of gray values (big-endian: as they are), with tags by the names of `ExifTags.Base`."""
    kinds = {"u": 1, "i": 2, "f": 3}
    order, head = ("<", b"II*\0") if values.dtype.byteorder in "<=|" else (">", b"MM\0*")
    height, width = values.shape
    fields = {
        "ImageWidth": width,
        "ImageLength": height,
        "BitsPerSample": 8 * values.dtype.itemsize,
        "Compression": compression,
        "PhotometricInterpretation": 1,
        "StripOffsets": 0,
        "SamplesPerPixel": 1,
        "RowsPerStrip": height,
        "StripByteCounts": values.nbytes,
        "SampleFormat": kinds[values.dtype.kind],
    } | tags
    fields["StripOffsets"] = 8 + 2 + 12 * len(fields) + 4
    numbers = sorted((ExifTags.Base[name].value, value) for name, value in fields.items())
    entries = b"".join(struct.pack(f"{order}HHLL", number, 4, 1, value) for number, value in numbers)
    return head + struct.pack(f"{order}LH", 8, len(fields)) + entries + bytes(4) + values.tobytes()


def _tiff_of_12_bits(values: np.ndarray) -> bytes:
    """Two pixels in three bytes."""
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    return tiff(packed.reshape(len(values), -1), ImageWidth=values.shape[1], BitsPerSample=12)


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, 4 bytes of value or offset), which need not be valid."""
    body = b"".join(struct.pack(">HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


def _gray(values: np.ndarray) -> np.ndarray:
    """Gray values as RGB."""
    return np.repeat(values.round().astype(np.uint8)[..., None], 3, -1)


def _on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return (colors * share + 255 * (1 - share)).round()


# From the stored pixels to the upright ones, for each value of EXIF's Orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


def _colors() -> dict[str, OddImage]:
    """Modes of at most 8 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC)
    rgb = rgba.convert("RGB")
    colors, alpha = np.asarray(rgb), np.asarray(rgba)[..., 3]
    light = np.asarray(rgb.convert("L"))
    palette = rgb.quantize(16)
    indices = np.asarray(palette)
    entries = np.asarray(palette.convert("RGB"))
    corner = (colors == colors[0, 0]).all(-1)
    premultiplied = np.asarray(rgba).copy()
    premultiplied[..., :3] = premultiplied[..., :3] * (alpha[..., None] / 255)
    # Pillow writes that the colors are not multiplied by alpha (ExtraSamples 2); 1 says that they are.
    extra_samples = [struct.pack("<HHLL", ExifTags.Base.ExtraSamples, 3, 1, value) for value in (2, 1)]
    associated = _file(Image.fromarray(premultiplied), "TIFF").replace(*extra_samples)
    deep = np.random.default_rng(1).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    deep_file = _png_of_16_bit_colors(deep)
    jpeg = _file(rgb, "JPEG")
    cmyk = _file(rgb.convert("CMYK"), "JPEG", quality=100)
    return {
        "RGBA": OddImage(_file(rgba), _on_white(colors, alpha), 1),
        "LA": OddImage(_file(rgba.convert("LA")), _on_white(_gray(light), alpha), 1),
        "associated alpha": OddImage(associated, _on_white(colors, alpha), 3),
        "palette": OddImage(_file(palette), entries),
        "transparent palette": OddImage(
            _file(palette, transparency=3), np.where((indices == 3)[..., None], 255, entries)
        ),
        "transparent RGB": OddImage(
            _file(rgb, transparency=rgb.getpixel((0, 0))), np.where(corner[..., None], 255, colors)
        ),
        "bilevel": OddImage(_file(rgb.convert("1")), _gray(255.0 * np.asarray(rgb.convert("1")))),
        "gray": OddImage(_file(rgb.convert("L")), _gray(light)),
        "colors of 16 bits": OddImage(deep_file, deep // 257, 1),
        "CMYK": OddImage(_file(rgb.convert("CMYK"), "TIFF"), colors),
        "CMYK of a JPEG": OddImage(cmyk, colors, 30),
        "animation": OddImage(
            _file(palette, "GIF", save_all=True, append_images=[rgb.rotate(90).quantize(16)]), entries
        ),
        "JPEG": OddImage(jpeg, np.asarray(Image.open(io.BytesIO(jpeg)))),
    }


def _png_of_16_bit_colors(values: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _deep_grays() -> dict[str, OddImage]:
    """Gray of more than 8 bits."""
    light = np.random.default_rng(2).integers(0, 256, (6, 8))
    light[0, 0], light[-1, -1] = 0, 255
    right = _gray(light)

    def scaled(white: float, dtype: str) -> np.ndarray:
        return (light * (white / 255)).astype(dtype)

    def image(values: np.ndarray, file_format: str = "PNG") -> bytes:
        return _file(Image.fromarray(values), file_format)

    files = {
        # What the file states.
        "PNG of 16 bits": image(scaled(65535, "u2")),
        "PGM of 16 bits": b"P5 8 6 65535\n" + scaled(65535, ">u2").tobytes(),
        "PGM of 12 bits": b"P5 8 6 4095\n" + scaled(4095, ">u2").tobytes(),
        "TIFF of 12 bits": _tiff_of_12_bits(scaled(4095, "u2")),
        "TIFF of 16 bits": tiff(scaled(65535, "u2")),
        "TIFF of 16 bits, big-endian": tiff(scaled(65535, ">u2")),
        "TIFF of 12 in 16 bits, stated": tiff(scaled(4095, "u2"), MaxSampleValue=4095),
        "TIFF of 10 in 16 bits, stated": tiff(scaled(1023, "u2"), SMaxSampleValue=1023),
        "TIFF of 16 bits, with too low a statement": tiff(scaled(65535, "u2"), MaxSampleValue=1),
        "TIFF of 1000 in 32 bits, stated": tiff(scaled(1000, "i4"), MaxSampleValue=1000),
        "TIFF of floats to 2, stated": tiff(scaled(2, "f4"), MaxSampleValue=2),
        "TIFF of 16 bits, white is 0": tiff(65535 - scaled(65535, "u2"), PhotometricInterpretation=0),
        # By the range of the pixels.
        **{
            f"TIFF of {white} in 32 bits{name}": tiff(scaled(white, dtype))
            for white in (255, 1023, 4095, 16383, 65535, 2**24, 2**31 - 1)
            for name, dtype in (("", "i4"), (", big-endian", ">i4"), (", unsigned", "u4"))
        },
        "TIFF of 4294967295 in 32 bits, unsigned": tiff(scaled(2**32 - 1, "u4")),
        "TIFF of 255 in signed 16 bits": tiff(scaled(255, "i2")),
        "TIFF of 4095 in signed 16 bits": tiff(scaled(4095, ">i2")),
        "TIFF of 32767 in signed 16 bits": tiff(scaled(32767, "i2")),
        "TIFF of all signed 16 bits": tiff((scaled(65535, "i4") - 32768).astype("i2")),
        "TIFF of signed 16 bits around 0": tiff((scaled(2000, "i4") - 1000).astype("i2")),
        "TIFF of signed 32 bits around 0": tiff(scaled(2000, "i4") - 1000),
        **{
            f"TIFF of floats to {white}": tiff(scaled(white, "f4"))
            for white in (1, 255, 1023, 4095, 16383, 65535, 1e6)
        },
        "TIFF of floats around 0": tiff(scaled(2, "f4") - 1),
        "TIFF of floats to 1, big-endian": tiff(scaled(1, ">f4")),
    }
    kinds = {name: OddImage(file, right, 1) for name, file in files.items()}

    def constant(value: float, dtype: str) -> bytes:
        return tiff(np.full((6, 8), value, dtype))

    constants = {
        "0 in 32 bits": (constant(0, "i4"), 0),
        "100 in 32 bits": (constant(100, "i4"), 100),
        "-7 in 32 bits": (constant(-7, "i4"), 0),
        "25700 in 16 bits": (constant(25700, "u2"), 100),
        "100 in 16 bits": (constant(100, "u2"), 0),
        "0 as floats": (constant(0, "f4"), 0),
        "0.5 as floats": (constant(0.5, "f4"), 128),
        "1.01 as floats": (constant(1.01, "f4"), 255),
        "100 as floats": (constant(100, "f4"), 100),
    }
    return kinds | {
        f"constant {name}": OddImage(file, np.full((6, 8, 3), value, np.uint8), 1)
        for name, (file, value) in constants.items()
    }


def _orientations() -> dict[str, OddImage]:
    """Every orientation in several kinds of files, and odd EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC)
    colors, light = np.asarray(rgb), np.asarray(rgb.convert("L"))
    palette = rgb.quantize(16)
    clear = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    deep = light.astype(np.uint16) * 200
    jpeg = np.asarray(Image.open(io.BytesIO(_file(rgb, "JPEG"))))
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>6</tiff:Orientation>")
    kinds = {"orientation 6 in XMP": OddImage(_file(rgb, pnginfo=xmp), _UPRIGHT[6](colors))}
    for orientation, upright in _UPRIGHT.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for name, file, pixels, tolerance in (
            ("", _file(rgb, "JPEG", exif=exif), jpeg, 0),
            (" of 16 bits", _file(Image.fromarray(deep), exif=exif), _gray(deep / 257), 1),
            (" of transparency", _file(palette, exif=exif, transparency=3), clear, 0),
            (" of a TIFF", _file(rgb, "TIFF", exif=exif), colors, 0),
        ):
            kinds[f"orientation {orientation}{name}"] = OddImage(file, upright(pixels), tolerance)
    turned = (ExifTags.Base.Orientation, 3, 1, struct.pack(">HH", 6, 0))
    broken = {
        "cut off": (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", 1),
        "no directory": (b"Exif\0\0", 1),
        "unknown orientation": (_exif((ExifTags.Base.Orientation, 3, 1, struct.pack(">HH", 9, 0))), 1),
        "orientation as text": (_exif((ExifTags.Base.Orientation, 2, 4, b"six\0")), 1),
        # Pillow reads the orientation of these, but cannot write their EXIF.
        "resolution as text": (_exif(turned, (ExifTags.Base.XResolution, 2, 4, b"abc\0")), 6),
        "negative offset": (_exif(turned, (ExifTags.IFD.GPSInfo, 9, 1, struct.pack(">l", -5))), 6),
    }
    return kinds | {
        f"broken EXIF, {name}": OddImage(_file(rgb, "JPEG", exif=exif), _UPRIGHT[orientation](jpeg))
        for name, (exif, orientation) in broken.items()
    }


ODD_IMAGES = _colors() | _deep_grays() | _orientations()

__all__ = ["ODD_IMAGES", "OddImage", "tiff"]
