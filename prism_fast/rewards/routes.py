"""Which rules grade which `data_source`, as published: the known names, their weights and their format gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Route:
    """`rules`: the published grader; the weights are the published ones of this grader."""

    rules: Literal["mm_gad", "math", "geo3k"]
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
"""Known data sources. `vl_agent` and the judge variant of mm_gad are unregistered in the published router too: they
need a language model as a judge."""

NO_EQUIVALENT = "__EMPTY__"
"""Placeholder of the released data sets in the list of equivalent answers: there is none."""


def route_of(data_source: str) -> Route:
    """The route of a data source; NotImplementedError naming the known ones otherwise."""
    if data_source not in ROUTES:
        raise NotImplementedError(
            f"no reward is known for data_source {data_source!r}; known: {', '.join(sorted(ROUTES))}. "
            "Give the rows one of these names in their data_source column"
        )
    return ROUTES[data_source]
