"""The published frames of scored texts.

In alignment the student's sampled tokens are cut at the caption boundary (score at the token that completes
``</caption>``, and at the sampled end token); the teacher's text is cut at 512 tokens and scored at the first pad token
after it. The warm-up frames both sides by the chat template and scores at the newline after the end token.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_fast.data.grammar import ResponseSplit
from prism_fast.models.processor import Processor

SPANS = ("caption", "reasoning")  # with whole responses the published code stops with a KeyError
TEACHER_TOKENS = 512


def frame_warmup(span: str, text: str, processor: Processor) -> tuple[int, ...]:
    return (*processor.encode_plain(text.strip()), processor.eos_id, *processor.encode_text("\n"))


def frame_teacher(span: str, text: str, processor: Processor) -> tuple[int, ...]:
    ids = processor.encode_plain(text)[:TEACHER_TOKENS]
    return (*ids, processor.pad_id) if len(ids) < TEACHER_TOKENS else tuple(ids)


def frame_student(span: str, split: ResponseSplit, token_ids: Sequence[int], processor: Processor) -> tuple[int, ...]:
    return tuple(token_ids[: split.caption_tokens] if span == "caption" else token_ids[split.caption_tokens :])
