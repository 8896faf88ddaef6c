"""Images of samples: where they are, and decoding them within limits.

Files are untrusted: only the formats below are ever tried (Pillow would also start external programs for some), and the
size in the header is checked before any pixel is decoded.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from prism_fast.data.problems import Place

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
DEFAULT_MAX_IMAGE_PIXELS = 64 * 2**20

_URL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+://|data:)")


def image_source(value: Any, place: Place, field: str, root: Path) -> bytes | Path:
    """The encoded bytes or the existing file behind one entry of an ``images`` list; nothing is decoded yet.

    ``value`` is a path (relative ones start at ``root``), encoded bytes, or an object with ``bytes``, ``path`` or
    ``image``. URLs are refused: nothing is ever downloaded.
    """
    if isinstance(value, dict):
        keys = ("bytes", "path", "image", "image_url")
        given = next((key for key in keys if value.get(key) is not None), None)
        if given is None:
            cure = "Give 'bytes' (the encoded image file) or 'path'"
            raise place.error(field, f"has none of {', '.join(keys)} (it has: {', '.join(value) or 'nothing'})", cure)
        value, field = value[given], f"{field}.{given}"
    if isinstance(value, bytes):
        if not value:
            raise place.error(field, "holds no bytes", "Store the encoded image file there")
        return value
    text = place.text(value, field)
    shown = text if len(text) <= 80 else text[:77] + "..."
    if _URL.match(text):
        raise place.error(field, f"is a URL ({shown})", "Nothing is downloaded here: save the image and give its path")
    path = root / text
    try:
        exists = path.is_file()
    except OSError as error:
        cure = "Give the path of an image file, or its encoded bytes as 'bytes' (not base64)"
        raise place.error(field, f"is no path ({error.strerror}: {shown})", cure) from error
    if not exists:
        raise place.error(field, f"image file {path} does not exist", f"Relative paths start at {root}: put it there")
    return path


def load_image(source: bytes | Path, place: Place, field: str, max_image_pixels: int) -> Image.Image:
    """Decode one image to RGB: turned upright by its EXIF tag, transparency on white; not resized.

    Raises DataError for what is no image, too large (``max_image_pixels``), animated, damaged, or deeper than 8 bits.
    """
    name = str(source) if isinstance(source, Path) else f"{len(source)} inline bytes"
    too_large = "Resize the image, or raise max_image_pixels if you trust the file"
    try:
        image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise place.error(field, f"{name}: more pixels than Pillow opens ({error})", "Resize the image") from error
    except Image.UnidentifiedImageError as error:
        cure = f"Known formats: {', '.join(FORMATS)}"
        raise place.error(field, f"{name}: not an image that can be read", cure) from error
    except OSError as error:
        raise place.error(field, f"{name}: cannot be opened ({error})", "Check the file and its rights") from error
    with image:
        width, height = image.size
        if width * height > max_image_pixels:
            wrong = f"{name}: {width} x {height} = {width * height} pixels, the limit is {max_image_pixels}"
            raise place.error(field, wrong, too_large)
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise place.error(field, f"{name}: has {image.n_frames} frames", "Save the one frame that is meant")
        if image.mode.startswith(("I", "F")):
            raise place.error(field, f"{name}: pixel mode {image.mode} has more than 8 bits", "Save it with 8 bits")
        try:
            return _rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # decoders of damaged files raise anything from SyntaxError to struct.error
            wrong = f"{name}: cannot be decoded ({type(error).__name__}: {error})"
            raise place.error(field, wrong, "The file is damaged: save it again") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
