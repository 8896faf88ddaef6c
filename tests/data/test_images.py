"""Pixel modes: each decodes to the RGB that a viewer shows, or is refused."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_fast.data.images import load_image
from prism_fast.data.problems import ImageError, Place

RED, BLUE = (200, 30, 10), (10, 30, 200)


def decoded(image: Image.Image, kind: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return load_image(buffer.getvalue(), Place(Path("f")), "image", 2**20)


def two(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return image


def palette(**transparency) -> Image.Image:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.info.update(transparency)
    return image


MODES = {
    "RGB": (two("RGB", RED, BLUE), "PNG", [RED, BLUE]),
    "L": (two("L", 7, 200), "PNG", [(7,) * 3, (200,) * 3]),
    "1": (two("1", 0, 1), "PNG", [(0,) * 3, (255,) * 3]),
    "RGBA": (two("RGBA", (*RED, 0), (*BLUE, 255)), "PNG", [(255,) * 3, BLUE]),
    "RGBA, half": (two("RGBA", (0, 0, 0, 128), (*BLUE, 255)), "PNG", [(127,) * 3, BLUE]),
    "RGBA in WEBP": (two("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), "WEBP", [(255,) * 3, (0,) * 3]),
    "LA": (two("LA", (7, 0), (7, 255)), "PNG", [(255,) * 3, (7,) * 3]),
    "P": (palette(), "PNG", [RED, BLUE]),
    "P with a transparent colour": (palette(transparency=0), "PNG", [(255,) * 3, BLUE]),
    "P with an alpha table": (palette(transparency=b"\xff\x00"), "PNG", [RED, (255,) * 3]),
    "GIF with a transparent colour": (palette(transparency=1), "GIF", [RED, (255,) * 3]),
    "CMYK": (two("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "TIFF", [(255, 0, 0), (0, 0, 0)]),
    "16-bit grey": (Image.fromarray(np.array([[0, 65535]], np.uint16)), "PNG", [(0,) * 3, (255,) * 3]),
    "16-bit grey, middle": (
        Image.fromarray(np.array([[257 * 7, 257 * 200]], np.uint16)),
        "PNG",
        [(7,) * 3, (200,) * 3],
    ),
    "16-bit grey TIFF": (Image.fromarray(np.array([[257 * 7, 65535]], np.uint16)), "TIFF", [(7,) * 3, (255,) * 3]),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name):
    image, kind, expected = MODES[name]
    shown = decoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert shown.mode == "RGB" and shown.size == (2, 1)
    np.testing.assert_allclose([shown.getpixel((x, 0)) for x in (0, 1)], expected, atol=1)


def png(rows: bytes, depth: int, color: int, transparent: bytes, width: int = 2) -> bytes:
    """A PNG of one row with a transparent colour, in forms that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)) + chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")


GREY, COLOR = 0, 2
TRANSPARENT = {
    "1 bit": (png(b"\x40", 1, GREY, b"\0\1"), [(0,) * 3, (255,) * 3]),
    "2 bits": (png(b"\x60", 2, GREY, b"\0\1"), [(255,) * 3, (170,) * 3]),
    "4 bits": (png(b"\x7a", 4, GREY, b"\0\7"), [(255,) * 3, (170,) * 3]),
    "8 bits": (png(b"\x07\xc8", 8, GREY, b"\0\7"), [(255,) * 3, (200,) * 3]),
    "16 bits, black": (png(struct.pack(">2H", 0, 257 * 200), 16, GREY, b"\0\0"), [(255,) * 3, (200,) * 3]),
    "16 bits, a neighbour": (png(struct.pack(">2H", 1799, 1800), 16, GREY, b"\7\7"), [(255,) * 3, (7,) * 3]),
    "colour": (png(bytes([1, 2, 3, 9, 9, 9]), 8, COLOR, bytes([0, 1, 0, 2, 0, 3])), [(255,) * 3, (9,) * 3]),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_a_transparent_value_is_white(name):
    data, expected = TRANSPARENT[name]
    shown = load_image(data, Place(Path("f")), "image", 2**20)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == expected


def test_a_transparent_16_bit_colour_is_refused():
    """Pillow keeps 8 of the 16 bits, so neighbours of the transparent colour would vanish with it."""
    data = png(struct.pack(">6H", 300, 600, 900, 301, 600, 900), 16, COLOR, struct.pack(">3H", 300, 600, 900))
    with pytest.raises(ImageError, match="16-bit colours, one of them transparent"):
        load_image(data, Place(Path("f")), "image", 2**20)


@pytest.mark.parametrize("size", [(800, 4), (4, 800), (801, 4), (4, 801), (900, 4)])
def test_what_no_image_processor_takes_is_refused(size):
    """The limit is that of Qwen's own image processor, so the readers and the encoding give the same verdict."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, format="PNG")
    width, height = size
    try:
        smart_resize(height, width)
        taken = True
    except ValueError:
        taken = False
    if taken:
        assert load_image(buffer.getvalue(), Place(Path("f")), "image", 2**20).size == size
    else:
        with pytest.raises(ImageError, match=f"{width} x {height}; one side is more than 200 times the other"):
            load_image(buffer.getvalue(), Place(Path("f")), "image", 2**20)
    assert taken == (max(size) == 800)


def test_adobe_cmyk_jpeg_is_not_inverted():
    shown = decoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    np.testing.assert_allclose(shown.getpixel((8, 8)), (255, 0, 0), atol=6)


def test_16_bit_grey_keeps_its_order():
    """Pillow's own conversion clips everything above 255 to white."""
    values = np.sort(np.random.default_rng(1).integers(0, 2**16, 256, dtype=np.uint16)).reshape(2, 128)
    grey = np.asarray(decoded(Image.fromarray(values), "PNG"))[:, :, 0].astype(int)
    assert (np.diff(grey.ravel()) >= 0).all() and np.abs(grey - values / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_pixels(orientation):
    """The stored pixels are turned by the tag's meaning: rotations and mirrors of an image of four colours."""
    upright = np.array([[RED, BLUE], [(0, 200, 0), (250, 250, 0)], [(9, 9, 9), (90, 90, 90)]], np.uint8)  # [3, 2]
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(shown), upright)


def test_a_limit_counts_the_header_only(monkeypatch):
    """A refused image is never decoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, format="PNG")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 30 = 1200 pixels, the limit is 1199"):
        load_image(buffer.getvalue(), Place(Path("f")), "image", 1199)


def test_warnings_as_errors_do_not_escape():
    """Pillow warns of large images; where warnings are errors, that is a refusal like any other."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, format="PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="more pixels than Pillow opens"):
            load_image(buffer.getvalue(), Place(Path("f")), "image", 2**20)
