"""Views of the metrics: one tag per metric, on one axis of steps over all stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

NOTES = ("data", "stage")  # lines that are no step: samples left out while reading, and seconds of a stage


class View(Protocol):
    """Somewhere to look at metrics. It may fail: the record is ``metrics.jsonl``."""

    name: str

    def show(self, step: int, values: Mapping[str, int | float]) -> None:
        """Show ``values`` by tag at the global training step ``step``; steps never fall, and one may come twice."""

    def close(self, *, failed: bool) -> None:
        """The run ends, by an error where ``failed``."""


class GlobalStep:
    """Training steps since the run began. In the record each stage counts from 1; here it continues the count of the
    stage before it. An evaluation has the step after which it was made."""

    def __init__(self) -> None:
        self.value = 0
        self._stage, self._before = "", 0

    def advance(self, stage: str, step: int) -> int:
        """The global step of the record's next line."""
        if stage == "eval" or stage in NOTES:
            return self.value
        if stage != self._stage:
            self._stage, self._before = stage, self.value
        self.value = self._before + step
        return self.value


def tagged(line: Mapping[str, int | float | str]) -> dict[str, int | float]:
    """The metrics of a line of the record by tag: the metric's name, with the stage in front unless the name begins
    with it. Texts are left out: they have no curve."""
    stage = str(line["stage"])
    return {
        name if name.startswith(f"{stage}/") else f"{stage}/{name}": value
        for name, value in line.items()
        if name not in ("stage", "step") and not isinstance(value, str)
    }
