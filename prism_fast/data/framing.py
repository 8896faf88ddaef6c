"""How a caption or a reasoning span is framed as tokens before the discriminator reads its score.

``prism_fast``: both sides alike. The span's text, stripped, is tokenised afresh and closed by the end-of-turn token,
where the score is read. Two equal texts are then equal token sequences, so the discriminator has nothing but content to
tell teacher and student apart by.

``released``: as the published alignment code does. The student's sampled tokens are cut at the caption boundary (score
at the token that completes ``</caption>``, and at the sampled end token); the teacher's text is cut at 512 tokens and
scored at the first pad token behind it. Its warm-up frames both sides by the chat template and reads the newline behind
the end token. The difference of frames is a shortcut that the default closes.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_fast.data.grammar import ResponseSplit
from prism_fast.models.processor import Processor

RELEASED_TEACHER_TOKENS = 512
SEMANTICS = ("prism_fast", "released")


def _check(semantics: str) -> None:
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics {semantics!r} is not known; allowed: {', '.join(SEMANTICS)}")


def frame_text(text: str, processor: Processor) -> tuple[int, ...]:
    """Token ids of a span's text, closed by the end-of-turn token."""
    return (*processor.encode_plain(text.strip()), processor.eos_id)


def frame_warmup(text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of one side of a warm-up pair."""
    _check(semantics)
    framed = frame_text(text, processor)
    return (*framed, *processor.encode_text("\n")) if semantics == "released" else framed


def frame_teacher(text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of a teacher span in alignment."""
    _check(semantics)
    if semantics == "prism_fast":
        return frame_text(text, processor)
    ids = processor.encode_plain(text)[:RELEASED_TEACHER_TOKENS]
    return (*ids, processor.pad_id) if len(ids) < RELEASED_TEACHER_TOKENS else tuple(ids)


def frame_student(
    split: ResponseSplit, token_ids: Sequence[int], processor: Processor, semantics: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Frames of a valid response's caption and reasoning spans in alignment.

    Raises:
        ValueError: the response is not valid (it has no spans), or the semantics is unknown.
    """
    _check(semantics)
    if not split.valid:
        raise ValueError("an invalid response has no spans to frame")
    if semantics == "prism_fast":
        return frame_text(split.caption, processor), frame_text(split.reasoning, processor)
    return tuple(token_ids[: split.caption_tokens]), tuple(token_ids[split.caption_tokens :])
