"""Stopping on request: the first SIGTERM or SIGINT finishes the step and saves, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that loops poll; a context manager that restores the handlers."""

    def __init__(self) -> None:
        self.requested = False
        # Saves the state inside a step, so that a stop loses at most that step. Returns False where the step must be
        # finished first (one model is updated, the other is not yet).
        self.save: Callable[[], bool] | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.requested = True

    def poll(self, where: str) -> None:
        """Save and raise :class:`Stopped` if a stop was asked for; every long loop calls this."""
        if self.requested and (self.save is None or self.save()):
            raise Stopped(where)
