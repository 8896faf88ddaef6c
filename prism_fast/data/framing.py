"""The texts that the discriminator scores, and their frames: the tokens around which a score is read.

``prism_fast``: the same for both sides. The stripped text of a span is tokenised anew and closed by the end-of-turn
token, where the score is read. Equal texts are then equal token sequences, so only content can tell teacher and student
apart.

``paper``: the same frames, but the reasoning span is the trace alone, without its answer (PRISM eq. 1-2 score c and t).

``released``: as in the published code (``released.frames``). There teacher and student end in different tokens, a
shortcut that the default closes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from prism_fast.data.grammar import ResponseSplit
from prism_fast.data.samples import Pair, Task
from prism_fast.models.processor import Processor
from prism_fast.released import frames as released

SPANS: dict[str, tuple[str, ...]] = {"spans": ("caption", "reasoning"), "response": ("response",)}
"""Names of the scored texts, one score each, under each value of the recipe's key ``align.discriminate``."""

_FIELD = {"caption": "caption", "reasoning": "cot", "response": "response"}
_ANSWER = re.compile(r"(?<=</think>)\s*(?=<answer>)")


def side_texts(sample: Task | Pair, side: Literal["teacher", "student"], spans: Sequence[str]) -> tuple[str, ...]:
    """The scored texts of the teacher (of a pair, also of the student), one per span.

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


@dataclass(frozen=True)
class Frames:
    """The frames of one semantics. Each function returns the token ids of a frame; ``spans``: those that are scored.

    ``warmup``, ``teacher``: of (span, text, processor). ``student``: of (span, split, sampled token ids, processor).
    """

    spans: tuple[str, ...]
    warmup: Callable[[str, str, Processor], tuple[int, ...]]
    teacher: Callable[[str, str, Processor], tuple[int, ...]]
    student: Callable[[str, ResponseSplit, Sequence[int], Processor], tuple[int, ...]]


def _alike(scored: Callable[[str, str], str]) -> Frames:
    """The same frame for both sides, of the text ``scored(span, text)``."""

    def of_text(span: str, text: str, processor: Processor) -> tuple[int, ...]:
        return frame_text(scored(span, text), processor)

    def of_split(span: str, split: ResponseSplit, token_ids: Sequence[int], processor: Processor) -> tuple[int, ...]:
        text = {"caption": split.caption, "reasoning": split.reasoning, "response": split.text}[span]
        return of_text(span, text, processor)

    return Frames(tuple(_FIELD), of_text, of_text, of_split)


def _without_answer(span: str, text: str) -> str:
    """The text; that of a reasoning span without its answer."""
    return _ANSWER.split(text, maxsplit=1)[0] if span == "reasoning" else text


FRAMES: dict[str, Frames] = {
    "released": Frames(released.SPANS, released.frame_warmup, released.frame_teacher, released.frame_student),
    "paper": _alike(_without_answer),
    "prism_fast": _alike(lambda span, text: text),
}
"""By the recipe's key ``semantics``."""


def frame_warmup(span: str, text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of one side of a warm-up pair."""
    return _frames(span, semantics).warmup(span, text, processor)


def frame_teacher(span: str, text: str, processor: Processor, semantics: str) -> tuple[int, ...]:
    """Frame of a teacher's text in alignment."""
    return _frames(span, semantics).teacher(span, text, processor)


def frame_student(
    span: str, split: ResponseSplit, token_ids: Sequence[int], processor: Processor, semantics: str
) -> tuple[int, ...]:
    """Frame of one span of a valid response in alignment; ``token_ids`` are the sampled tokens that ``split`` cut.

    Raises:
        ValueError: the response is not valid (it has no spans), the span or the semantics is unknown, or the semantics
            does not score that span.
    """
    frames = _frames(span, semantics)
    if not split.valid:
        raise ValueError("an invalid response has no spans to frame")
    return frames.student(span, split, token_ids, processor)


def _frames(span: str, semantics: str) -> Frames:
    if span not in _FIELD:
        raise ValueError(f"span {span!r} is not known; allowed: {', '.join(_FIELD)}")
    if semantics not in FRAMES:
        raise ValueError(f"semantics {semantics!r} is not known; allowed: {', '.join(FRAMES)}")
    if span not in FRAMES[semantics].spans:
        raise ValueError(
            f"semantics {semantics!r} has no whole-response mode: it scores {', '.join(FRAMES[semantics].spans)}. "
            "Use prism_fast or paper"
        )
    return FRAMES[semantics]
