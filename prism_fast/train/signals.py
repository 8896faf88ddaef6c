"""Stopping on request: the first SIGTERM or SIGINT finishes the step and saves, the second stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from prism_fast.engine.world import World


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


def _tell(text: str) -> None:
    """A line on standard error, by one system call: a handler may interrupt a print."""
    os.write(2, f"{text}\n".encode())


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that loops poll; a context manager that restores the handlers. A signal to
    one of several ranks stops all of them, where they meet."""

    def __init__(self, world: World | None = None) -> None:
        """``world``: None: of one rank."""
        self.world = World() if world is None else world
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
        name = signal.Signals(number).name
        if self.requested:
            _tell(f"second {name}: stopped at once; a resumed run goes on from the newest checkpoint")
            raise KeyboardInterrupt(f"second {name}")
        _tell(f"{name}: saving as soon as the step in progress allows; a second one stops at once")
        self.requested = True

    def agreed(self) -> bool:
        """Joint. Whether any rank was asked to stop."""
        self.requested = self.world.any(self.requested)
        return self.requested

    def poll(self, where: str, *, joint: bool = False) -> None:
        """Save and raise :class:`Stopped` if a stop was asked for; every long loop calls this. Several ranks stop
        together, so only where all of them make the same call: it says ``joint``."""
        if self.world.size > 1 and not (joint and self.agreed()):
            return
        if self.requested and (self.save is None or self.save()):
            raise Stopped(where)
