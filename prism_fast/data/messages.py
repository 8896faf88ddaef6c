"""Chat turns of files to chat turns of samples: role names are translated, ``<image>`` markers become typed parts."""

from __future__ import annotations

import re
from typing import Any

from prism_fast.data.problems import Place

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_turns(value: Any, place: Place, field: str, role_key: str, text_key: str) -> list[dict[str, str]]:
    """A list of ``{role_key: …, text_key: …}`` as ``{"role", "content"}`` turns; role names are translated."""
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
        text = turn[text_key]
        if isinstance(text, list):
            wrong = "is a list of typed parts, wanted a string"
            raise place.error(f"{here}.{text_key}", wrong, "Write one text with an <image> marker per image")
        turns.append({"role": ROLES[role], "content": place.text(text, f"{here}.{text_key}", empty=True)})
    return turns


def prompt_messages(turns: list[dict[str, str]], num_images: int, place: Place, field: str) -> list[dict[str, Any]]:
    """Prompt turns with their ``<image>`` markers split into parts; there must be one marker per image.

    The prompt ends with a user turn; only user turns may hold markers.
    """
    if not turns or turns[-1]["role"] != "user":
        last = f"ends with a turn of role '{turns[-1]['role']}'" if turns else "is empty"
        raise place.error(field, f"the prompt {last}", "A prompt ends with the user's turn")
    markers = 0
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        text = turn["content"]
        here = f"{field}[{index}]"
        if VIDEO_MARKER in text:
            raise place.error(here, "holds a <video> marker", "Videos are not supported: use images")
        found = text.count(IMAGE_MARKER)
        if found and turn["role"] != "user":
            raise place.error(here, f"an <image> marker in a turn of role '{turn['role']}'", "Move it to a user turn")
        markers += found
        messages.append({"role": turn["role"], "content": split_markers(text) if found else text})
    if markers != num_images:
        cure = "Write one <image> marker where each image belongs"
        raise place.error(field, f"{markers} <image> markers for {num_images} images", cure)
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
