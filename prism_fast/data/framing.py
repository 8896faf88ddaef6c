"""What the discriminator scores, and how each text is framed as tokens before it reads the score.

``prism_fast``: both sides alike. A span's text, stripped, is tokenised afresh and closed by the end-of-turn token,
where the score is read. Two equal texts are then equal token sequences, so the discriminator has nothing but content to
tell teacher and student apart by.

``paper``: the same frames; but the reasoning span is the trace alone, its answer is not scored (PRISM eq. 1-2 score
c and t).

``released``: as the published alignment code does. The student's sampled tokens are cut at the caption boundary (score
at the token that completes ``</caption>``, and at the sampled end token); the teacher's text is cut at 512 tokens and
scored at the first pad token behind it. Its warm-up frames both sides by the chat template and reads the newline behind
the end token. The difference of frames is a shortcut that the default closes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.data.grammar import ResponseSplit
from prism_fast.data.samples import Pair, Task
from prism_fast.models.processor import Processor

SPANS: dict[str, tuple[str, ...]] = {"spans": ("caption", "reasoning"), "response": ("response",)}
"""Names of the scored texts, one score each, under each value of the recipe's key ``align.discriminate``."""

RELEASED_TEACHER_TOKENS = 512
_FIELD = {"caption": "caption", "reasoning": "cot", "response": "response"}
_ANSWER = re.compile(r"(?<=</think>)\s*(?=<answer>)")


def side_texts(sample: Task | Pair, side: Literal["teacher", "student"], spans: Sequence[str]) -> tuple[str, ...]:
    """The teacher's (of a pair also the student's) texts that are scored, one per span.

    Raises:
        ValueError: the sample lacks one.
    """
    texts = {f"{side}_{_FIELD[span]}": getattr(sample, f"{side}_{_FIELD[span]}") for span in spans}
    if missing := [name for name, text in texts.items() if text is None]:
        raise ValueError(
            f"sample {sample.uid!r} has no {' and no '.join(missing)}: align.discriminate=response scores whole "
            "responses, align.discriminate=spans captions and reasonings; the data must hold these texts of both sides"
        )
    return tuple(texts.values())


def frame_text(text: str, processor: Processor) -> tuple[int, ...]:
    """Token ids of a span's text, closed by the end-of-turn token."""
    return (*processor.encode_plain(text.strip()), processor.eos_id)


def frame_warmup(span: str, text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of one side of a warm-up pair."""
    _check(span, semantics)
    framed = frame_text(_scored(span, text, semantics), processor)
    return (*framed, *processor.encode_text("\n")) if semantics == "released" else framed


def frame_teacher(span: str, text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of a teacher's text in alignment."""
    _check(span, semantics)
    if semantics != "released":
        return frame_text(_scored(span, text, semantics), processor)
    ids = processor.encode_plain(text)[:RELEASED_TEACHER_TOKENS]
    return (*ids, processor.pad_id) if len(ids) < RELEASED_TEACHER_TOKENS else tuple(ids)


def frame_student(
    span: str, split: ResponseSplit, token_ids: Sequence[int], processor: Processor, semantics: str
) -> tuple[int, ...]:
    """Frame of one span of a valid response in alignment; ``token_ids`` are the sampled tokens that ``split`` cut.

    Raises:
        ValueError: the response is not valid (it has no spans), the span or the semantics is unknown, or ``released``
            with whole responses: the published code does not run in that mode.
    """
    _check(span, semantics)
    if not split.valid:
        raise ValueError("an invalid response has no spans to frame")
    if semantics == "released":
        return tuple(token_ids[: split.caption_tokens] if span == "caption" else token_ids[split.caption_tokens :])
    text = {"caption": split.caption, "reasoning": split.reasoning, "response": split.text}[span]
    return frame_text(_scored(span, text, semantics), processor)


def _scored(span: str, text: str, semantics: str) -> str:
    """The part of a span's text that is scored: all of it, or under ``paper`` of a reasoning what stands before its
    answer."""
    return _ANSWER.split(text, maxsplit=1)[0] if semantics == "paper" and span == "reasoning" else text


def _check(span: str, semantics: str) -> None:
    if span not in _FIELD:
        raise ValueError(f"span {span!r} is not known; allowed: {', '.join(_FIELD)}")
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics {semantics!r} is not known; allowed: {', '.join(SEMANTICS)}")
    if semantics == "released" and span == "response":
        raise ValueError(
            "semantics 'released' has no whole-response mode: the published code stops there with a KeyError. "
            "Use prism_fast or paper"
        )
