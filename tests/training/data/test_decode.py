"""Images of every kind come out as upright RGB, or as an error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from tests.odd_images import ODD_IMAGES
from training.data import decode
from training.data.decode import DEFAULT_MAX_PIXELS, UnreadableImageError, decode_image


RNG = np.random.default_rng(0)
# Smooth, so that JPEG keeps it, and different under all turns and mirrors.
IMAGE = Image.fromarray(RNG.integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((40, 30), Image.Resampling.BILINEAR)


def _bytes(image, image_format, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **kwargs)
    return buffer.getvalue()


def _turned(image, orientation, image_format, quality=95) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _bytes(image, image_format, exif=exif, **({} if image_format == "TIFF" else {"quality": quality}))


def _png(width, height) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _pixel(image):
    assert image.mode == "RGB"
    colors = image.getcolors()
    assert len(colors) == 1
    return colors[0][1]


class TestSources:
    def test_all_give_the_same(self, tmp_path):
        path, data = tmp_path / "a.png", _bytes(IMAGE, "PNG")
        path.write_bytes(data)
        sources = [path, str(path), data, {"path": str(path), "bytes": None}, {"path": None, "bytes": data}, IMAGE]
        for source in [*sources, {"path": "elsewhere.png", "bytes": data}, Image.open(path)]:
            result = decode_image(source)
            assert (result.mode, result.size) == ("RGB", (40, 30))
            assert result.tobytes() == IMAGE.tobytes()

    def test_a_given_image_is_left_as_it_is(self):
        given = IMAGE.copy()
        given.info["note"] = "kept"
        decode_image(given, box=[1, 1, 5, 5]).putpixel((0, 0), (1, 2, 3))
        assert given.info == {"note": "kept"}
        assert given.tobytes() == IMAGE.tobytes()

    def test_nothing_and_other_things(self):
        with pytest.raises(UnreadableImageError, match="neither a path nor bytes"):
            decode_image({"path": None, "bytes": None})
        with pytest.raises(TypeError, match="not int"):
            decode_image(3)


class TestOrientation:
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_as_pillow_turns_them(self, orientation, image_format):
        data = _turned(IMAGE, orientation, image_format)
        result = decode_image(data)
        assert result.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").tobytes()
        assert result.size == ((40, 30) if orientation < 5 else (30, 40))
        # The second time, there is nothing left to turn.
        assert decode_image(result).tobytes() == result.tobytes()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_box_is_of_the_stored_pixels(self, orientation):
        cut = IMAGE.crop((3, 5, 20, 29))
        result = decode_image(_turned(IMAGE, orientation, "PNG"), box=[3, 5, 20, 29])
        expected = decode_image(_turned(cut, orientation, "PNG"))
        assert result.size == expected.size
        assert result.tobytes() == expected.tobytes()

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize(
        "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff"]
    )
    def test_broken_exif_is_no_harm(self, exif):
        assert decode_image(_bytes(IMAGE, "JPEG", exif=exif)).size == (40, 30)

    def test_an_orientation_beside_a_broken_entry(self):
        """ResolutionUnit as text: the whole EXIF can be read but not be written."""
        entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x0128, 2, 2, b"2\0\0\0")]
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        data = _bytes(IMAGE, "JPEG", exif=exif)
        assert decode_image(data).tobytes() == decode_image(_turned(IMAGE, 6, "JPEG", quality=75)).tobytes()

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_unknown_values_turn_nothing(self, orientation):
        assert decode_image(_turned(IMAGE, orientation, "PNG")).tobytes() == IMAGE.tobytes()


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "value", "image_format", "expected"),
        [
            ("1", 1, "PNG", (255, 255, 255)),
            ("L", 100, "PNG", (100, 100, 100)),
            ("LA", (100, 0), "PNG", (255, 255, 255)),
            ("LA", (100, 255), "PNG", (100, 100, 100)),
            ("LA", (0, 51), "PNG", (204, 204, 204)),
            ("RGBA", (200, 0, 0, 51), "PNG", (244, 204, 204)),
            ("RGBA", (10, 20, 30, 255), "TIFF", (10, 20, 30)),
            ("CMYK", (0, 255, 0, 0), "TIFF", (255, 0, 255)),
            ("I;16", 65535, "PNG", (255, 255, 255)),
            ("I;16", 25700, "TIFF", (100, 100, 100)),
            ("I;16B", 25700, "TIFF", (100, 100, 100)),
            ("I", 25700, "TIFF", (100, 100, 100)),
            ("F", 0.5, "TIFF", (128, 128, 128)),
            ("F", 100.0, "TIFF", (100, 100, 100)),
        ],
    )
    def test_colors(self, mode, value, image_format, expected):
        image = Image.new(mode, (5, 4), value)
        for source in (image, _bytes(image, image_format)):
            assert _pixel(decode_image(source)) == pytest.approx(expected, abs=1)
            assert _pixel(decode_image(source, box=[1, 1, 3, 3])) == pytest.approx(expected, abs=1)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("name", ODD_IMAGES)
    def test_odd_images(self, name):
        ODD_IMAGES[name].check(decode_image(ODD_IMAGES[name].file))

    @pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "YCbCr", "HSV", "LAB", "RGBX", "I;16L"])
    def test_rarer_modes(self, mode):
        assert decode_image(Image.new(mode, (5, 4))).mode == "RGB"

    def test_palette(self):
        palette = IMAGE.quantize(16)
        assert decode_image(_bytes(palette, "PNG")).tobytes() == palette.convert("RGB").tobytes()

    @pytest.mark.parametrize("image_format", ["PNG", "GIF"])
    def test_transparent_entry_of_a_palette(self, image_format):
        palette = Image.new("P", (5, 4), 1)
        palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        palette.putpixel((0, 0), 2)
        result = decode_image(_bytes(palette, image_format, transparency=1))
        assert result.getpixel((0, 0)) == (0, 200, 0)
        assert result.getpixel((1, 1)) == (255, 255, 255)

    def test_transparent_color(self):
        image = Image.new("RGB", (5, 4), (1, 2, 3))
        image.putpixel((0, 0), (4, 5, 6))
        result = decode_image(_bytes(image, "PNG", transparency=(1, 2, 3)))
        assert result.getpixel((0, 0)) == (4, 5, 6)
        assert result.getpixel((1, 1)) == (255, 255, 255)

    def test_sixteen_bits_keep_their_order(self):
        values = np.linspace(0, 65535, 1000).astype(np.uint16)[None]
        result = np.asarray(decode_image(_bytes(Image.fromarray(values), "PNG")))[0, :, 0].astype(int)
        assert (np.diff(result) >= 0).all()
        assert (result[0], result[-1]) == (0, 255)
        assert np.abs(result - values[0] / 257).max() <= 0.5

    def test_pixels_that_are_no_numbers(self, tmp_path):
        path = tmp_path / "a.tif"
        Image.new("F", (5, 4), float("nan")).save(path)
        with pytest.raises(UnreadableImageError, match=r"a\.tif has pixels that are not finite"):
            decode_image(path)

    def test_first_frame(self):
        frames = [Image.new("RGB", (5, 4), color) for color in ((200, 0, 0), (0, 200, 0))]
        data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert _pixel(decode_image(data)) == (200, 0, 0)


class TestLongTexts:
    """Pillow refuses compressed texts of more than a megabyte, wherever they stand in a PNG file."""

    @pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
    @pytest.mark.parametrize("is_last", [False, True])
    def test_do_not_matter(self, kind, is_last):
        text = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[kind] + zlib.compress(bytes(3_000_000))
        chunk = (
            struct.pack(">I", len(text)) + kind.encode() + text + struct.pack(">I", zlib.crc32(kind.encode() + text))
        )
        data = _bytes(IMAGE, "PNG")
        place = data.index(b"IEND" if is_last else b"IDAT") - 4
        assert decode_image(data[:place] + chunk + data[place:]).tobytes() == IMAGE.tobytes()

    @pytest.mark.slow
    def test_more_than_the_limit_is_refused_with_its_reason(self):
        text = b"a\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_MEMORY + 1))
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        data = _bytes(IMAGE, "PNG")
        place = data.index(b"IDAT") - 4
        with pytest.raises(UnreadableImageError, match=r"(?i)cannot be opened: decompressed data too large"):
            decode_image(data[:place] + chunk + data[place:])


@pytest.mark.filterwarnings("ignore")
class TestBroken:
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_cut_off(self, image_format, tmp_path):
        data = _bytes(Image.fromarray(RNG.integers(0, 255, (60, 80, 3), dtype=np.uint8)), image_format)
        for share in (0.001, 0.1, 0.5, 0.9):
            path = tmp_path / f"cut.{image_format}"
            path.write_bytes(data[: int(share * len(data))])
            with pytest.raises(UnreadableImageError, match=r"cut\."):
                decode_image(path)
            with pytest.raises(UnreadableImageError, match=r"the image"):
                decode_image({"path": None, "bytes": path.read_bytes()})

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO"])
    def test_altered_bytes_give_an_image_or_the_one_error(self, image_format):
        data = np.frombuffer(_bytes(IMAGE, image_format), np.uint8)
        refused = 0
        for _ in range(150):
            altered = data.copy()
            places = RNG.integers(0, len(data) if RNG.random() < 0.5 else min(60, len(data)), 4)
            altered[places] = RNG.integers(0, 256, 4)
            try:
                assert decode_image(altered.tobytes(), max_pixels=10_000).mode == "RGB"
            except UnreadableImageError:
                refused += 1
        assert refused

    def test_names_what_is_wrong(self, tmp_path):
        for name, content, message in [
            ("a.jpg", b"no image at all", r"a\.jpg is not an image"),
            ("b.jpg", b"", r"b\.jpg is empty"),
            ("c.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"c\.eps is not an image"),
        ]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UnreadableImageError, match=message):
                decode_image(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=r"d\.jpg does not exist"):
            decode_image(tmp_path / "d.jpg")
        with pytest.raises(UnreadableImageError, match="is a folder"):
            decode_image(tmp_path)
        with pytest.raises(UnreadableImageError, match="is empty"):
            decode_image(b"")

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (b"\0\0\0\x18ftypheic", "It is HEIC: install pillow-heif"),
            (b"\0\0\0\x18ftypmif1", "It is HEIC: install pillow-heif"),
            (b"\0\0\0\x1cftypavif", "It is AVIF: install Pillow 11.3 or newer"),
            (b"\0\0\0\x1cftypisom", "$"),
        ],
    )
    def test_names_what_to_install(self, tmp_path, monkeypatch, head, message):
        """Also for a file whose ending hides its format."""
        formats = [name for name in decode.known_formats() if name not in ("HEIF", "AVIF")]
        monkeypatch.setattr(decode, "known_formats", lambda: formats)
        path = tmp_path / "a.jpg"
        path.write_bytes(head + bytes(40))
        for source in (path, str(path), path.read_bytes()):
            with pytest.raises(UnreadableImageError, match=f"is not an image of a known format.*{message}"):
                decode_image(source)

    def test_is_a_value_error(self):
        assert issubclass(UnreadableImageError, ValueError)


class TestMaxPixels:
    @pytest.fixture
    def no_decoding(self, monkeypatch):
        def load(self):
            pytest.fail("pixels were decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)

    def test_a_huge_claim_is_refused_by_the_header(self, tmp_path, no_decoding):
        path = tmp_path / "bomb.png"
        path.write_bytes(_png(30000, 30000))
        with pytest.raises(UnreadableImageError, match=r"bomb\.png is too large.*900000000"):
            decode_image(path)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_the_default_limit(self, no_decoding):
        with pytest.raises(UnreadableImageError, match="more than the limit of 100000000"):
            decode_image(_png(DEFAULT_MAX_PIXELS // 1000, 1001))

    def test_a_limit_of_the_callers(self, no_decoding):
        with pytest.raises(UnreadableImageError, match="40 x 30 = 1200 pixels, more than the limit of 1199"):
            decode_image(_bytes(IMAGE, "PNG"), max_pixels=1199)

    def test_the_limit_itself_is_allowed(self):
        assert decode_image(_bytes(IMAGE, "PNG"), max_pixels=1200).size == (40, 30)


class TestBox:
    @pytest.mark.parametrize(
        ("box", "whole"),
        [
            ([0, 0, 40, 30], (0, 0, 40, 30)),
            ([3.2, 4.0, 10.1, 20.9], (3, 4, 11, 21)),
            ([-5, -0.5, 1000, 7], (0, 0, 40, 7)),
            ([39.5, 29.5, 40, 30], (39, 29, 40, 30)),
            (np.array([1, 2, 3, 4], np.float32), (1, 2, 3, 4)),
        ],
    )
    def test_cuts(self, box, whole):
        assert decode_image(IMAGE, box=box).tobytes() == IMAGE.crop(whole).tobytes()

    @pytest.mark.parametrize("box", [[5, 5, 5, 9], [9, 5, 3, 9], [40, 0, 50, 9], [-9, 0, 0, 9], [0, 31, 9, 40]])
    def test_empty(self, box, tmp_path):
        IMAGE.save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"No part of .*a\.png, 40 x 30, is in its box"):
            decode_image(tmp_path / "a.png", box=box)

    @pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, float("nan")], [0, 0, float("inf"), 9], []])
    def test_no_box(self, box):
        with pytest.raises(ValueError, match="must be 4 finite numbers"):
            decode_image(IMAGE, box=box)
