"""Ranks as threads of one process, for what they exchange by words: `World.gather` and all that is made of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from prism_fast.engine.world import World

T = TypeVar("T")


class PlayedWorld(World):
    def __init__(self, rank: int, size: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.phase = rank, size, "played"
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = json.dumps(value)
        self._barrier.wait(60)
        found = [json.loads(text) for text in self._values]
        self._barrier.wait(60)
        return found

    def sum(self, values):
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def max(self, values):
        return [float(max(column)) for column in zip(*self.gather(list(values)), strict=True)]


def on_ranks(size: int, act: Callable[[World], T]) -> list[T]:
    """``act(world)`` on every rank at once; its results, or the first error."""
    values, barrier = [None] * size, threading.Barrier(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = act(PlayedWorld(rank, size, values, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
