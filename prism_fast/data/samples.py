"""Samples of the readers and writers: a demonstration, a task, a pair.

``messages`` are chat turns ``{"role": "system"|"user"|"assistant", "content": str | [part, …]}``. The content of a turn
with images is a list of parts ``{"type": "image"}`` and ``{"type": "text", "text": str}``; the n-th image part is
``images[n]``. ``images`` are RGB Pillow images of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

MAX_TRUTH_CHARS = 4096
"""Longest ground truth or equivalent answer: comparing answers takes more than linear time."""


@dataclass(frozen=True)
class Demonstration:
    """One SFT example: the prompt turns (``messages``, without the last assistant turn) and that turn's text."""

    uid: str
    messages: list[dict[str, Any]]
    response: str
    images: list[Image]


@dataclass(frozen=True)
class Task:
    """One question with a verifiable answer, and a teacher's response to it (alignment, RLVR, eval).

    ``teacher_caption`` and ``teacher_cot`` keep their tags. ``kind`` groups questions for reports; items of one
    ``cluster`` share an image (their errors are not independent). ``extra``: all other fields of the file.
    """

    uid: str
    messages: list[dict[str, Any]]
    images: list[Image]
    data_source: str
    ground_truth: str
    equivalent_answers: tuple[str, ...] = ()
    question: str = ""
    teacher_caption: str | None = None
    teacher_cot: str | None = None
    teacher_response: str | None = None
    kind: str | None = None
    cluster: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One discriminator warm-up example: the teacher's and the student's texts for one prompt, as caption and reasoning
    spans, as whole responses, or both (an absent form is ``None`` on both sides)."""

    uid: str
    messages: list[dict[str, Any]]
    images: list[Image]
    teacher_caption: str | None = None
    student_caption: str | None = None
    teacher_cot: str | None = None
    student_cot: str | None = None
    teacher_response: str | None = None
    student_response: str | None = None
