"""Rollout engine and trainers take turns on one device: each sleeps while the other works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prism_fast.engine.protocol import Engine
from prism_fast.rollout.protocol import Rollout
from prism_fast.track.metrics import Metrics
from prism_fast.track.speed import StepTimer, free_memory_bytes


@contextmanager
def awake(generator: Rollout) -> Iterator[Rollout]:
    """The engine, awake within the block and asleep behind it, however that ends."""
    generator.wake()
    try:
        yield generator
    finally:
        generator.sleep()


class Turns:
    """Of one stage.

    Args:
        engines: of everything that learns; the weights of ``policy`` are pushed.
        timer: gets ``time/wake``, ``time/push``, ``time/sleep``, with ``offload`` also ``time/offload`` and
            ``time/reload``.
        offload: whether masters, moments and gradients wait in the CPU's memory while responses are generated.
    """

    def __init__(self, generator: Rollout, engines: Mapping[str, Engine], timer: StepTimer, *, offload: bool) -> None:
        self._generator, self._engines, self._timer, self._offload = generator, engines, timer, offload

    @contextmanager
    def generating(self, metrics: Metrics) -> Iterator[None]:
        """Joint. Within the block the generator is awake and has the policy's weights. ``metrics`` gets the memory that
        is free for it, and for training afterwards."""
        with self._trainers_away():
            with self._timer.part("wake"):
                self._generator.wake()
            try:
                with self._timer.part("push"):
                    self._generator.sync(self._engines["policy"].named_weights())
                metrics.mean("perf/free_generating_mib", free_memory_bytes(self._timer.device) / 2**20)
                yield
            finally:
                with self._timer.part("sleep"):
                    self._generator.sleep()
        metrics.mean("perf/free_training_mib", free_memory_bytes(self._timer.device) / 2**20)

    @contextmanager
    def _trainers_away(self) -> Iterator[None]:
        if not self._offload:
            yield
            return
        with self._timer.part("offload"):
            for engine in self._engines.values():
                engine.offload()
        try:
            yield
        finally:
            with self._timer.part("reload"):
                for engine in self._engines.values():
                    engine.reload()
