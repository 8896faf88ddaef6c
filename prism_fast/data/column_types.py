"""Types that the columns of a table (parquet, Arrow) must have; checked once per file instead of in every row."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from prism_fast.data.keys import IMAGE_KEYS
from prism_fast.data.problems import Place

Check = Callable[[pa.DataType], bool]


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text_or_null(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_null(kind)


def _is_answer(kind: pa.DataType) -> bool:
    return _is_text_or_null(kind) or pa.types.is_integer(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_list(kind: pa.DataType, item: Check) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return listed and (item(kind.value_type) or pa.types.is_null(kind.value_type))


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if pa.types.is_struct(kind) else {}


def _has(kind: pa.DataType, **fields: Check) -> bool:
    """Whether a struct has all ``fields``, each of its type; it may have others."""
    present = _fields(kind)
    return all(name in present and check(present[name]) for name, check in fields.items())


def _is_content(kind: pa.DataType) -> bool:
    return is_text(kind) or is_list(kind, lambda part: _has(part, type=is_text))


def _is_turn(kind: pa.DataType) -> bool:
    return _has(kind, role=is_text, content=_is_content) or _has(kind, **{"from": is_text, "value": _is_content})


def is_image(kind: pa.DataType) -> bool:
    named = bool(set(_fields(kind)) & {"bytes", "path", "image", "image_url"})
    return named or is_text(kind) or _is_bytes(kind)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column holds encoded images (or other binary values), alone or in lists."""
    return is_list(kind, is_encoded) or _is_bytes(kind) or any(map(_is_bytes, _fields(kind).values()))


def _or_null(check: Check) -> Check:
    return lambda kind: pa.types.is_null(kind) or check(kind)


_TURNS = "list<struct<role: string, content: string>>"
_IMAGES = "list<struct<bytes: binary, path: string>> (or a list of paths or of binary)"
_REWARD = "struct<ground_truth: string, style: string, equivalent_answers: list<string>>"


def _turns(kind: pa.DataType) -> bool:
    return is_list(kind, _is_turn)


def _turns_or_text(kind: pa.DataType) -> bool:
    return _is_text_or_null(kind) or _turns(kind)


def _images(kind: pa.DataType) -> bool:
    return is_list(kind, is_image)


def _one_or_images(kind: pa.DataType) -> bool:
    return is_image(kind) or _images(kind)


_TYPES: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("messages", "conversations"), (_turns, _TURNS)),
    **dict.fromkeys(("prompt", "completion", "problem", "question"), (_turns_or_text, f"string, or {_TURNS}")),
    **{name: (_or_null(_images if name.endswith("s") else _one_or_images), _IMAGES) for name in IMAGE_KEYS},
    **dict.fromkeys(("instruction", "input", "output", "system", "data_source"), (_is_text_or_null, "string")),
    **dict.fromkeys(
        (f"{side}_{text}" for side in ("teacher", "student") for text in ("response", "caption", "cot")),
        (_is_text_or_null, "string"),
    ),
    "answer": (_is_answer, "string"),
    "reward_model": (lambda kind: _has(kind, ground_truth=is_text), _REWARD),
    "extra_info": (_or_null(pa.types.is_struct), "struct"),
}


def check_types(schema: dict[str, pa.DataType], place: Place, names: dict[str, str], *, one_image: bool) -> None:
    """Raise DataError for the first column whose type is not the one of its name.

    ``schema``: types by our names; ``names``: the file's names where they differ; ``one_image``: ``images`` may hold a
    single image.
    """
    for name, kind in schema.items():
        if name not in _TYPES:
            continue
        check, wanted = _TYPES[name]
        if not check(kind) and not (name == "images" and one_image and _one_or_images(kind)):
            wrong = f"the column has type {kind}, wanted {wanted}"
            raise place.error(names.get(name, name), wrong, "Convert the column")
