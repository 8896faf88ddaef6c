"""Fields that hold images, in every spelling that is read, and fields that must not be passed over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prism_fast.data.entries import COLUMNS
from prism_fast.data.problems import DataError, ImageError, Place

IMAGE_KEYS = (
    *("images", "image", "image_paths", "image_path", "image_files", "image_file", "image_urls", "image_url"),
    *("imgs", "img", "img_paths", "img_path"),
)
"""Names under which every reader finds the images of a row; the plural ones hold a list, the others one or a list."""

UNREAD = {
    **dict.fromkeys(("videos", "video"), ("videos are not supported", "Use images")),
    **dict.fromkeys(("audios", "audio"), ("audio is not supported", "Leave the row out")),
    **dict.fromkeys(
        ("tools", "functions"), ("tool descriptions are not read", "Write them into the system turn, or drop the field")
    ),
}
"""Fields that change what a row means and are not read: (fault, cure) where they hold something."""

READ = {*IMAGE_KEYS, *COLUMNS}
"""Fields that the parsers read."""
_NAME = re.compile(r"(^|[_\W])(images?|imgs?|pictures?|pics?|photos?|figures?|screenshots?)(\d*)([_\W]|$)", re.I)
_FILE = re.compile(r"\S{1,1000}\.(png|jpe?g|webp|bmp|gif|tiff?)", re.I)
_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-9A-Za-z]{2})[A-Za-z0-9+/\s]{40,}=*\s*")


def looks_like_images(value: Any) -> bool:
    """Whether ``value`` is encoded bytes, a name of an image file, or a list or object of these."""
    if isinstance(value, Mapping):
        return any(looks_like_images(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, list):
        return bool(value) and looks_like_images(value[0])
    if isinstance(value, bytes):
        return bool(value)
    return isinstance(value, str) and (_FILE.fullmatch(value) is not None or value.startswith("data:image/"))


def image_key(record: Mapping[str, Any], place: Place, *, named: bool) -> str | None:
    """The field that holds the row's images, or None. ``named``: the recipe names it (it is ``images`` then), so other
    fields are meant to be passed over.

    Raises:
        DataError: two fields hold images, or one does that is not read; a field of `UNREAD` holds something.
    """
    for key, (wrong, cure) in UNREAD.items():
        if record.get(key):
            raise place.error(key, wrong, cure)
    if named:
        return "images" if record.get("images") is not None else None
    given = [key for key in IMAGE_KEYS if record.get(key) not in (None, [], "")]
    if len(given) > 1:
        cure = f"Say which one is meant: data.columns.images={given[0]}"
        raise place.error(given[1], f"holds images, and so does '{given[0]}'", cure)
    for key, value in record.items():
        if key not in READ and looks_like_images(value):
            refuse_unread(key, place, anywhere=not given)
    present = [key for key in IMAGE_KEYS if record.get(key) is not None]
    return next(iter(given or present), None)


def refuse_unread(key: str, place: Place, *, anywhere: bool) -> None:
    """Raise DataError for a field outside `IMAGE_KEYS` with images in it, if its name says so or, with ``anywhere``,
    whatever its name (the row has no other images)."""
    if anywhere or _NAME.search(key):
        cure = f"Name it: data.columns.images={key}, or rename the field that is meant to 'images'"
        raise place.error(key, "looks like images and is not read", cure)


def image_values(value: Any, key: str, place: Place, *, named: bool) -> list[tuple[str, Any]]:
    """(field, image) of each image in field ``key``: a plural name holds a list, a singular one, and a field that the
    recipe names, an image or a list."""
    if (named or not key.endswith("s")) and not isinstance(value, list):
        values = [(key, value)]
    else:
        values = [(f"{key}[{n}]", item) for n, item in enumerate(place.listing(value, key))]
    for field, item in values:
        if isinstance(item, str) and _BASE64.match(item):
            cure = "Decode it: give the path of an image file, or its encoded bytes as 'bytes' (not base64)"
            raise place.error(field, f"is base64 text ({item[:40]}…)", cure, kind=ImageError)
    return values


def marker_error(place: Place, field: str, markers: int, images: int) -> DataError:
    """The error of a row whose markers and images differ in number."""
    cure = "Write one <image> marker where each image belongs"
    if images == 0:
        cure = f"Give the images in 'images' (or {', '.join(IMAGE_KEYS[1:4])}, …), or remove the markers"
    return place.error(field, f"{markers} <image> markers for {images} images", cure)
