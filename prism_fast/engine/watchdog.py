"""One rank's end is the end of all: a thread of each rank tells the others that it lives, and why it failed."""

from __future__ import annotations

import json
import os
import threading
import time
from types import TracebackType

import torch.distributed as dist

from prism_fast.engine.world import World

INTERVAL = 1.0  # seconds between two heartbeats
SILENCE = 40.0  # without a heartbeat for so long, a rank is taken for dead
BROKEN = 6.0  # the same, once a connection has broken
GRACE = 15.0  # for a rank to end by its own error, which closes its files and writes a report, before it is ended
# Messages of gloo and NCCL where the other end is gone or does not come.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out", "NCCL")


class Watchdog:
    """A context manager around a rank's work. Rank 0 looks after all ranks, the others after rank 0. The first failure
    is written to the store, and every rank that reads it ends with exit code 1 within a few seconds, wherever it is.
    """

    def __init__(self, store: dist.Store, world: World) -> None:
        """``store``: with a connection of its own, because another thread uses it."""
        self._store, self._world = dist.PrefixStore("prism_fast/watchdog", store), world
        self._watched = range(1, world.size) if world.first else range(1)
        self._allowed = SILENCE
        self._verdict: str | None = None  # why this rank must end
        self._decided, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat(0)
        self._world.agree(True)  # every heartbeat is there before anybody looks for it
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises SystemExit in place of an error that follows from the failure of another rank."""
        if error is None:
            self._world.agree(True)  # nobody leaves before all are done: the store may end with its rank
        elif not self._fails_first(error):
            raise SystemExit(1) from error
        self._ending.set()

    def _fails_first(self, error: BaseException) -> bool:
        """Tell the others of this rank's error; False where another rank has failed before."""
        if any(sign in str(error) for sign in _LOST):  # which rank was lost is found by its silence
            self._allowed = BROKEN
            self._decided.wait(BROKEN + 5 * INTERVAL)
        mine = self._said(self._world.rank, self._world.phase, f"{type(error).__name__}: {error}")
        return self._verdict is None and self._first_failure(mine) == mine

    def _watch(self) -> None:
        seen = dict.fromkeys(self._watched, (-1, time.monotonic()))
        number = 0
        while self._verdict is None and not self._ending.wait(INTERVAL):
            number += 1
            try:
                self._beat(number)
                self._verdict = self._look(seen)
            except RuntimeError as error:  # it ended with the rank or the launcher that held it
                self._verdict = f"rank 0 or its launcher has ended: their store is gone ({error})"
        if self._verdict is not None:
            self._decided.set()
            if self._world.rank < 2:  # one of the two is not the rank that failed
                here = self._said(self._world.rank, self._world.phase, "ends as well")
                os.write(2, f"{self._verdict}\n{here}\n".encode())
            self._ending.wait(GRACE)
            os._exit(1)

    def _look(self, seen: dict[int, tuple[int, float]]) -> str | None:
        """The failure of a rank, if there is one. ``seen``: by rank its newest heartbeat, and when it came."""
        if self._store.check(["failure"]):
            return self._store.get("failure").decode()
        now = time.monotonic()
        for rank, text in zip(seen, self._store.multi_get([f"beat/{rank}" for rank in seen]), strict=True):
            beat = json.loads(text)
            number, came = seen[rank]
            if beat["number"] != number:
                seen[rank] = beat["number"], now
            elif now - came > self._allowed:
                lost = f"no sign of life for {now - came:.0f} seconds (killed, out of memory, or its node is gone)"
                return self._first_failure(self._said(rank, beat["phase"], lost))
        return None

    def _beat(self, number: int) -> None:
        beat = {"number": number, "phase": self._world.phase}
        self._store.set(f"beat/{self._world.rank}", json.dumps(beat))

    def _first_failure(self, text: str) -> str:
        """``text``, or the failure that was told before."""
        try:
            return self._store.compare_set("failure", "", text).decode()
        except RuntimeError:  # the store is gone: nobody can be told, and nobody else can fail first
            return text

    def _said(self, rank: int, phase: str, text: str) -> str:
        return self._world.named(rank, f"{phase}: {text}")
