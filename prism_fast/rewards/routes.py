"""The rules of each `data_source`, as published: known names, their weights and their format gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Route:
    """`rules`: the published grader; the weights are the published ones of this grader."""

    rules: Literal["mm_gad", "math", "geo3k", "judge"]
    accuracy_weight: float
    format_weight: float


_MM_GAD = Route("mm_gad", 0.8, 0.2)
_MATH = Route("math", 0.8, 0.2)

ROUTES: dict[str, Route] = {
    "mm_gad": _MM_GAD,
    "math-77k": _MATH,
    "visual_logic-26k": _MATH,
    "hiyouga/geometry3k": Route("geo3k", 0.9, 0.1),
}
"""Data sources that rules grade."""

JUDGED: dict[str, Route] = {"mm_gad_llm": Route("judge", 1.0, 0.0)}
"""Data sources that need a language model as a judge; known where one is configured. (`vl_agent`, the other one that
the published router leaves unregistered, has another response format and a score per sentence: not supported.)"""

NO_EQUIVALENT = "__EMPTY__"
"""Placeholder of the released data sets in the list of equivalent answers: there is none."""


def known_sources(*, judge: bool) -> tuple[str, ...]:
    """The data sources that can be graded, with or without a judge."""
    return tuple(sorted(ROUTES | JUDGED if judge else ROUTES))


def route_of(data_source: str, *, judge: bool) -> Route:
    """The route of a data source; NotImplementedError naming the known ones otherwise."""
    known = known_sources(judge=judge)
    if data_source not in known:
        cure = "Give the rows one of these names in data_source, or name a function for it in reward.functions"
        if data_source in JUDGED:
            cure = "This one needs a judge: set reward.judge.url and reward.judge.model"
        raise NotImplementedError(
            f"no reward is known for data_source {data_source!r}; known: {', '.join(known)}. {cure}"
        )
    return (ROUTES | JUDGED)[data_source]
