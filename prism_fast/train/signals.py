"""Stopping on request: the first SIGTERM or SIGINT finishes the step and saves, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop and has saved what it needs to go on."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that loops poll; a context manager that restores the handlers."""

    def __init__(self) -> None:
        self.requested = False
        # Saves what a step in progress needs so that stopping inside it loses that step at most. Returns False where
        # the step cannot be left (one model updated, the other not yet): then it is finished.
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
        """Raise :class:`Stopped` if a stop was asked for, after saving; every loop that may take long calls this."""
        if self.requested and (self.save is None or self.save()):
            raise Stopped(where)
