"""Images of samples: finding them, and decoding them within limits.

Files are untrusted: only the formats below are tried (for some others Pillow would start external programs), and the
size in the header is checked before any pixel is decoded. Every refusal is an `ImageError`.
"""

from __future__ import annotations

import re
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from prism_fast.data.problems import ImageError, Place

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
DEFAULT_MAX_IMAGE_PIXELS = 64 * 2**20
MAX_ASPECT_RATIO = 200
"""Long side over short side; Qwen's image processors resize nothing longer (transformers, ``smart_resize``)."""

_URL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+://|data:)")


def image_source(value: Any, place: Place, field: str, root: Path) -> bytes | Path:
    """The encoded bytes or the existing file of one entry of an ``images`` list; nothing is decoded yet.

    ``value`` is a path (relative ones start at ``root``), encoded bytes, or an object with ``bytes``, ``path`` or
    ``image``. URLs are refused: nothing is ever downloaded.
    """
    refuse = partial(place.error, kind=ImageError)
    if isinstance(value, dict):
        keys = ("bytes", "path", "image", "image_url")
        given = next((key for key in keys if value.get(key) is not None), None)
        if given is None:
            cure = "Give 'bytes' (the encoded image file) or 'path'"
            raise refuse(field, f"has none of {', '.join(keys)} (it has: {', '.join(value) or 'nothing'})", cure)
        value, field = value[given], f"{field}.{given}"
    if isinstance(value, bytes):
        if not value:
            raise refuse(field, "holds no bytes", "Store the encoded image file there")
        return value
    text = place.text(value, field)
    shown = text if len(text) <= 80 else text[:77] + "..."
    if _URL.match(text):
        raise refuse(field, f"is a URL ({shown})", "Nothing is downloaded here: save the image and give its path")
    path = root / text
    try:
        exists = path.is_file()
    except (OSError, ValueError) as error:  # too long, or a NUL in it
        cure = "Give the path of an image file, or its encoded bytes as 'bytes' (not base64)"
        raise refuse(field, f"is no path ({getattr(error, 'strerror', None) or error}: {shown})", cure) from error
    if not exists:
        raise refuse(field, f"image file {path} does not exist", f"Relative paths start at {root}: put it there")
    return path


def load_image(source: bytes | Path, place: Place, field: str, max_image_pixels: int) -> Image.Image:
    """Decode one image to RGB: turned upright by its EXIF tag, transparency on white, 16-bit grey scaled to 8 bits; not
    resized.

    Raises ImageError for a file that is no image, is larger than ``max_image_pixels``, longer than `MAX_ASPECT_RATIO`
    allows, animated or damaged, or has a pixel mode without a defined white (32-bit integers, floats) or one whose
    transparent colour Pillow cannot tell from others (16-bit colours).
    """
    refuse = partial(place.error, kind=ImageError)
    name = str(source) if isinstance(source, Path) else f"{len(source)} inline bytes"
    damaged = "The file is damaged: save it again"
    try:
        image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refuse(field, f"{name}: more pixels than Pillow opens ({error})", "Resize the image") from error
    except Image.UnidentifiedImageError as error:
        raise refuse(field, f"{name}: not an image that can be read", f"Known formats: {', '.join(FORMATS)}") from error
    except OSError as error:
        raise refuse(field, f"{name}: cannot be opened ({error})", "Check the file and its rights") from error
    except Exception as error:  # Pillow does not wrap all errors of its decoders (a text chunk that inflates too far)
        raise refuse(field, f"{name}: cannot be opened ({type(error).__name__}: {error})", damaged) from error
    with image:
        width, height = image.size
        if width * height > max_image_pixels:
            wrong = f"{name}: {width} x {height} = {width * height} pixels, the limit is {max_image_pixels}"
            raise refuse(field, wrong, "Resize the image, or raise max_image_pixels if you trust the file")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            wrong = f"{name}: {width} x {height}; one side is more than {MAX_ASPECT_RATIO} times the other"
            raise refuse(field, wrong, "No image processor takes it: crop or pad the image")
        stored = str(image.tile[0].args) if image.tile else ""  # Pillow's name of the pixels in the file
        if "transparency" in image.info and stored.startswith("RGB;16"):
            wrong = f"{name}: 16-bit colours, one of them transparent, which 8 bits cannot tell from its neighbours"
            raise refuse(field, wrong, "Save it with 8 bits, or with an alpha channel")
        try:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames == 1 and image.mode not in ("I", "F"):
                return _rgb(ImageOps.exif_transpose(_transparency_as_decoded(image, stored)))
        except Exception as error:  # decoders of damaged files raise anything from SyntaxError to struct.error
            raise refuse(field, f"{name}: cannot be decoded ({type(error).__name__}: {error})", damaged) from error
        if frames > 1:
            raise refuse(field, f"{name}: has {frames} frames", "Save the one frame that is meant")
        wrong = f"{name}: pixel mode {image.mode} does not say which value is white"
        raise refuse(field, wrong, "Save it with 8 or 16 bits")


def _transparency_as_decoded(image: Image.Image, stored: str) -> Image.Image:
    """Grey of 2 or 4 bits is spread over 8 bits, so its transparent value must be too; Pillow leaves it as it was."""
    spread = {"L;2": 85, "L;4": 17}.get(stored)
    if spread is not None and "transparency" in image.info:
        image.info["transparency"] *= spread
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.uint32)  # [H, W], 65535 is white
        grey = ((values + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
