"""Encoded images that must be refused: damaged, hostile, too large, of a kind not read. Name -> maker of bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

MAX_PIXELS = 4_000_000
"""The limit of the test; every image that is refused for its size is larger."""


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _noise(size: int = 48, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, channels), dtype=np.uint8))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG written by hand; the header need not be true."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + extra
        + _chunk(b"IDAT", zlib.compress(data))
        + _chunk(b"IEND", b"")
    )


def _cut(kind: str, share: float, **options) -> bytes:
    whole = encoded(_noise(), kind, **options)
    return whole[: int(share * len(whole))]


def _flipped(kind: str) -> bytes:
    whole = bytearray(encoded(_noise(), kind))
    middle = len(whole) // 2
    whole[middle : middle + 8] = bytes(255 - byte for byte in whole[middle : middle + 8])
    return bytes(whole)


def _frames(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(5)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def tiff_circle() -> bytes:
    """A TIFF whose first directory names itself as the next one."""
    tags = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 4), (279, 4, 1, 16)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 24)


def _jpeg_with_size(width: int, height: int) -> bytes:
    whole = bytearray(encoded(_noise(), "JPEG"))
    start = whole.index(b"\xff\xc0") + 5
    whole[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


_TEXT_BOMB = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27)))

IMAGES: dict[str, Callable[[], bytes]] = {
    "no bytes that mean anything": lambda: b"GARBAGE",
    "one byte": lambda: b"\x89",
    "PNG signature alone": lambda: b"\x89PNG\r\n\x1a\n",
    "JPEG signature alone": lambda: b"\xff\xd8\xff",
    "GIF signature alone": lambda: b"GIF89a",
    "WEBP signature alone": lambda: b"RIFF\x10\0\0\0WEBPVP8 ",
    "BMP signature alone": lambda: b"BM",
    "TIFF signature alone": lambda: b"II*\0\x08\0\0\0",
    "PNG cut in half": lambda: _cut("PNG", 0.5),
    "PNG cut in its header": lambda: _cut("PNG", 0.001) + b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0",
    "JPEG cut in half": lambda: _cut("JPEG", 0.5),
    "WEBP cut in half": lambda: _cut("WEBP", 0.5),
    "BMP cut in half": lambda: _cut("BMP", 0.5),
    "TIFF cut in half": lambda: _cut("TIFF", 0.5, compression="tiff_lzw"),
    "GIF cut in half": lambda: encoded(_noise().convert("P"), "GIF")[:400],
    "PNG with flipped bytes": lambda: _flipped("PNG"),
    "PNG without pixels": lambda: png(64, 64),
    "PNG of width 0": lambda: png(0, 64),
    "PNG of unknown colour type": lambda: png(8, 8, color=5),
    "PNG of 3 bits": lambda: png(8, 8, depth=3),
    "PNG above the limit": lambda: png(4000, 4000),
    "PNG bomb, 900 megapixels": lambda: png(30_000, 30_000),
    "PNG bomb, largest header": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG one pixel high and far too long": lambda: png(2**24, 1),
    "PNG of few bytes and real pixels": lambda: png(2500, 2500, depth=1, color=0, data=bytes(2500 * 314)),
    "PNG text chunk that inflates to 128 MiB": lambda: png(8, 8, data=bytes(25 * 8), extra=_TEXT_BOMB),
    "PNG chunk that claims 4 GiB": lambda: b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR" + bytes(64),
    "BMP bomb": lambda: _bmp(30_000, 30_000),
    "BMP of negative width": lambda: _bmp(-8, 8),
    "JPEG whose header says 65500 x 65500": lambda: _jpeg_with_size(65500, 65500),
    "JPEG cut in its header": lambda: encoded(_noise(), "JPEG")[:300],
    "animated GIF": lambda: _frames("GIF"),
    "animated WEBP": lambda: _frames("WEBP"),
    "animated PNG": lambda: _frames("PNG"),
    "TIFF of five pages": lambda: _frames("TIFF"),
    "TIFF that names itself as its next page, cut": lambda: tiff_circle()[:60],
    "TIFF of 32-bit integers": lambda: encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
    "TIFF of floats": lambda: encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "PDF": lambda: b"%PDF-1.7\n1 0 obj\n",
    "ICO": lambda: encoded(_noise(), "ICO"),
    "base64 text": lambda: b"iVBORw0KGgoAAAANSUhEUgAAAAUA" * 20,
    "pickle": lambda: b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}
