"""The discriminator's input: a prompt with the framed spans of the teacher and of each student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import Prompt
from prism_fast.models.transfer import moved

Span = tuple[int, ...]


@dataclass(frozen=True)
class ScoredGroup:
    """One prompt with the K framed spans of the teacher and of each student; ``None``: an invalid response.

    K = 2 (caption, reasoning), or 1 where whole responses are scored.
    """

    prompt: Prompt
    teacher: tuple[Span, ...]
    students: Sequence[tuple[Span, ...] | None]

    def spans(self) -> dict[Span, int]:
        """The distinct spans in order of first use, each with the number of its score. Equal spans are computed once,
        so a student's span that equals the teacher's gets exactly the teacher's score."""
        columns: dict[Span, int] = {}
        for framed in (self.teacher, *(student for student in self.students if student)):
            for column, span in enumerate(framed):
                columns.setdefault(span, column)
        return columns

    def computed(self) -> PromptGroup:
        """The prompt with its distinct spans, as a forward computes them."""
        return PromptGroup(self.prompt, list(self.spans()))


def span_lengths(groups: Sequence[ScoredGroup], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the teachers' [G, K] and the students' spans [B, K]; an invalid response has none."""
    nothing = ((),) * len(groups[0].teacher)
    students = [framed or nothing for group in groups for framed in group.students]
    rows = ([list(map(len, framed)) for framed in side] for side in ([group.teacher for group in groups], students))
    teacher, student = (moved(torch.tensor(side), device) for side in rows)
    return teacher, student
