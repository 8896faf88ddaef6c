"""The response grammar ``<caption>…</caption> <think>…</think> <answer>…</answer>`` and its token-exact boundary.

The published pattern (`PUBLISHED_PATTERN`) accepts more: sections that are empty, and any text inside of one, repeated
sections too. Such a response has the form without its content, so it is valid only where ``published=True`` asks for
that pattern. The verdict and the spans are found by three forward searches, because the pattern backtracks over every
pair of section borders: a policy that repeats tags makes it take minutes on a single response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from prism_fast.data.messages import plain_text
from prism_fast.data.token_bytes import token_pieces

PUBLISHED_PATTERN = r"^\s*(<caption>.*?</caption>)\s*(<think>.*?</think>\s*<answer>.*?</answer>)\s*$"
"""Published split (``re.match``, DOTALL): group 1 the caption span, group 2 the reasoning span. Kept as the spec."""

SECTIONS = ("caption", "think", "answer")
TAGS = tuple(f"<{slash}{name}>" for name in SECTIONS for slash in ("", "/"))

_OPENING = re.compile(r"\s*(?=<caption>)")
_CAPTION_TO_THINK = re.compile(r"</caption>\s*(?=<think>)")
_THINK_TO_ANSWER = re.compile(r"</think>\s*(?=<answer>)")
_CAPTION_CLOSE, _THINK_CLOSE, _ANSWER_CLOSE = "</caption>", "</think>", "</answer>"


@dataclass(frozen=True)
class ResponseSplit:
    """One response cut into its sections. Spans are character offsets ``[start, end)`` into ``text``, tags included.

    ``caption`` and ``reasoning`` are the published spans (the latter ``<think>…</think> <answer>…</answer>``);
    ``answer`` is the stripped inside of the matched third section. All three are empty when ``valid`` is False.
    ``caption_tokens`` and ``think_tokens`` are the smallest numbers of leading tokens whose text contains the section,
    -1 when invalid or when only text was given; a token that merges ``>`` with the newline after it belongs to the
    section that it closes.
    """

    text: str
    valid: bool
    caption: str = ""
    reasoning: str = ""
    answer: str = ""
    caption_tokens: int = -1
    think_tokens: int = -1
    char_spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def split_text(text: str, *, published: bool = False) -> ResponseSplit:
    """Cut ``text`` as `PUBLISHED_PATTERN` does, in time linear in its length; the token counts stay -1.

    Unless ``published``, each of the six tags must occur once and no section may be blank.

    The last section can only close at the last ``</answer>`` with nothing but whitespace after it, and each earlier
    section closes as early as possible: if the earliest border fails, a later one leaves less room and fails too.
    """
    end = len(text.rstrip())
    opening = _OPENING.match(text)
    if opening is None or not text.endswith(_ANSWER_CLOSE, 0, end):
        return ResponseSplit(text, False)
    last_close = end - len(_ANSWER_CLOSE)
    first = _CAPTION_TO_THINK.search(text, opening.end(), end)
    if first is None:
        return ResponseSplit(text, False)
    second = _THINK_TO_ANSWER.search(text, first.end(), end)
    if second is None:
        return ResponseSplit(text, False)
    spans = {
        "caption": (opening.end(), first.start() + len(_CAPTION_CLOSE)),
        "think": (first.end(), second.start() + len(_THINK_CLOSE)),
        "answer": (second.end(), end),
    }
    if not published and not _has_content(text, spans):
        return ResponseSplit(text, False)
    return ResponseSplit(
        text=text,
        valid=True,
        caption=text[slice(*spans["caption"])],
        reasoning=text[first.end() : end],
        answer=text[second.end() + len("<answer>") : last_close].strip(),
        char_spans=spans,
    )


def _has_content(text: str, spans: dict[str, tuple[int, int]]) -> bool:
    """Whether each tag occurs once and each section holds more than whitespace."""
    once = all(text.count(tag) == 1 for tag in TAGS)
    return once and all(
        text[start + len(f"<{name}>") : end - len(f"</{name}>")].strip() for name, (start, end) in spans.items()
    )


def asks_for_sections(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a prompt names all three sections by their opening tags, in any turn."""
    text = "\n".join(plain_text(message["content"]) for message in messages)
    return all(f"<{name}>" in text for name in SECTIONS)


def split_pieces(pieces: Sequence[bytes], *, published: bool = False) -> ResponseSplit:
    """`split_text` of the joined byte pieces (one per token, decoded once), with the token counts filled in.

    Undecodable bytes become U+FFFD, as tokenizers decode them. Characters are not mapped back to bytes one by one: a
    section ends with the n-th occurrence of its closing tag in the text, and ASCII text occurs in the bytes exactly
    where it occurs in their decoding.
    """
    joined = b"".join(pieces)
    split = split_text(joined.decode("utf-8", errors="replace"), published=published)
    if not split.valid:
        return split
    sizes = list(accumulate(map(len, pieces)))

    def tokens_up_to(section: str, tag: str) -> int:
        end = 0
        for _ in range(split.text.count(tag, 0, split.char_spans[section][1])):
            end = joined.index(tag.encode(), end) + len(tag)
        return next(count for count, size in enumerate(sizes, start=1) if size >= end)

    return replace(
        split,
        caption_tokens=tokens_up_to("caption", _CAPTION_CLOSE),
        think_tokens=tokens_up_to("think", _THINK_CLOSE),
    )


def split_tokens(token_ids: Sequence[int], tokenizer: Any, *, published: bool = False) -> ResponseSplit:
    """Cut one response (ids without padding; end tokens may be included) at its token boundaries with one decode.

    ``text`` equals ``tokenizer.decode(token_ids, skip_special_tokens=True)``. ``tokenizer`` is a fast byte-level BPE
    tokenizer; another kind, or a negative id, is a ValueError.
    """
    return split_pieces(token_pieces(token_ids, tokenizer), published=published)
