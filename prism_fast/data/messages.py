"""Chat turns of files to chat turns of samples: role names are translated, ``<image>`` markers become typed parts."""

from __future__ import annotations

import re
from typing import Any

from prism_fast.data.keys import marker_error
from prism_fast.data.problems import Place

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
INLINE = ("image", "image_url", "url", "path", "bytes", "base64")
"""Fields of an image part that hold the image itself."""


def turn_keys(turns: Any, field: str) -> tuple[str, str]:
    """The names of role and text in a list of turns: ``role`` and ``content``, or ``from`` and ``value``."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    either = {"role", "content"} & set(first), {"from", "value"} & set(first)
    sharegpt = bool(either[1]) if bool(either[0]) != bool(either[1]) else field == "conversations"
    return ("from", "value") if sharegpt else ("role", "content")


def read_turns(value: Any, place: Place, field: str, role_key: str, text_key: str) -> list[dict[str, Any]]:
    """A list of ``{role_key: …, text_key: …}`` as ``{"role", "content"}`` turns; role names are translated.

    A text stays a string; typed parts become a string where they are text alone, else a list of parts without images.
    """
    turns = []
    for index, item in enumerate(place.listing(value, field)):
        here = f"{field}[{index}]"
        turn = place.mapping(item, here)
        for key in (role_key, text_key):
            if key not in turn:
                cure = f"Every turn has '{role_key}' and '{text_key}'"
                raise place.error(here, f"has no '{key}' (it has: {', '.join(turn) or 'nothing'})", cure)
        role = turn[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise place.error(f"{here}.{role_key}", f"unknown role {role!r}", f"Known roles: {', '.join(ROLES)}")
        if ROLES[role] == "system" and index > 0:
            raise place.error(f"{here}.{role_key}", "a system turn after the first turn", "Move it to the front")
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                raise place.error(f"{here}.{key}", "tool calls are not read", "Leave the row out")
        text = turn[text_key]
        if isinstance(text, list):
            content = _parts(text, place, f"{here}.{text_key}")
        else:
            content = place.text(text, f"{here}.{text_key}", empty=True)
        turns.append({"role": ROLES[role], "content": content})
    return turns


def _parts(value: list[Any], place: Place, field: str) -> str | list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, item in enumerate(value):
        here = f"{field}[{index}]"
        part = place.mapping(item, here)
        kind = part.get("type")
        if kind == "text":
            text = place.text(part.get("text"), f"{here}.text", empty=True)
            if IMAGE_MARKER in text:
                cure = "Use {type: image} parts, or one text with <image> markers"
                raise place.error(f"{here}.text", "an <image> marker inside a typed part", cure)
            parts.append({"type": "text", "text": text})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
        else:
            raise place.error(f"{here}.type", f"unknown type of part {kind!r}", "Known types: text, image")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def inline_images(turns: Any) -> list[tuple[str, Any]]:
    """(place inside the list of turns, image) of every image that a typed part holds itself; `read_turns` has checked
    the form."""
    found = []
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        content = turn.get("content", turn.get("value"))
        for index, part in enumerate(content if isinstance(content, list) else ()):
            if part.get("type") in ("image", "image_url"):
                key = next((key for key in INLINE if part.get(key) is not None), None)
                value = part[key] if key is not None else None
                if key == "image_url" and isinstance(value, dict):
                    value = value.get("url")
                if isinstance(value, dict) and not any(value.values()):
                    value = None  # a table's empty cell
                if value is not None:
                    found.append((f"[{number}].content[{index}].{key}", value))
    return found


def prompt_messages(turns: list[dict[str, Any]], num_images: int, place: Place, field: str) -> list[dict[str, Any]]:
    """Prompt turns with their ``<image>`` markers split into parts; there must be one marker or image part per image.

    The prompt ends with a user turn; only user turns may hold images.
    """
    if not turns or turns[-1]["role"] != "user":
        last = f"ends with a turn of role '{turns[-1]['role']}'" if turns else "is empty"
        raise place.error(field, f"the prompt {last}", "A prompt ends with the user's turn")
    images = 0
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        content = turn["content"]
        here = f"{field}[{index}]"
        if isinstance(content, str):
            if VIDEO_MARKER in content:
                raise place.error(here, "holds a <video> marker", "Videos are not supported: use images")
            content = split_markers(content) if IMAGE_MARKER in content else content
        found = 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
        if found and turn["role"] != "user":
            raise place.error(here, f"an <image> marker in a turn of role '{turn['role']}'", "Move it to a user turn")
        images += found
        messages.append({"role": turn["role"], "content": content})
    if images != num_images:
        raise marker_error(place, field, images, num_images)
    return messages


def split_markers(text: str) -> list[dict[str, str]]:
    """``"a<image>b"`` → text, image and text parts; empty texts are left out, whitespace is kept."""
    pieces = re.split(f"({IMAGE_MARKER})", text)
    return [{"type": "image"} if p == IMAGE_MARKER else {"type": "text", "text": p} for p in pieces if p]


def marked_text(content: str | list[dict[str, Any]]) -> str:
    """The inverse of `split_markers`: one string with a marker per image part.

    Raises ValueError for parts that are neither text nor image, and for text that holds a marker itself: reading the
    file back would take it for an image.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for part in parts:
        if part["type"] == "image":
            text += IMAGE_MARKER
        elif part["type"] == "text":
            if IMAGE_MARKER in part["text"] or VIDEO_MARKER in part["text"]:
                raise ValueError(f"text {part['text']!r} holds a literal marker; the published formats cannot say that")
            text += part["text"]
        else:
            raise ValueError(f"message part of type {part['type']!r}: only 'text' and 'image' can be written")
    return text


def plain_text(content: str | list[dict[str, Any]]) -> str:
    """The text of a turn without its images."""
    if isinstance(content, str):
        return content.strip()
    return "".join(part["text"] for part in content if part["type"] == "text").strip()
