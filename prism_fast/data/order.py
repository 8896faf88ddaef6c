"""Seeded sample order whose position can be saved and resumed exactly."""

from __future__ import annotations

import numpy as np


class SampleOrder:
    """Indices ``0 … size-1``, each once per epoch, in a permutation drawn from (seed, epoch).

    The order continues across epochs and drops nothing, so a call in which an epoch ends may return an index twice.
    ``shuffle=False`` gives the file order.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        if size < 1:
            raise ValueError(f"size = {size}: there must be at least one sample to order")
        if seed < 0:
            raise ValueError(f"seed = {seed}: seeds are not negative")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._start_epoch(0)
        self.position = 0

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        rng = np.random.default_rng([self.seed, epoch])
        self._order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)

    def next_indices(self, count: int) -> list[int]:
        """The next ``count`` indices."""
        if count < 0:
            raise ValueError(f"count = {count}: cannot take a negative number of samples")
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.size:
                self._start_epoch(self.epoch + 1)
                self.position = 0
            chunk = self._order[self.position : self.position + count - len(taken)]
            taken += chunk.tolist()
            self.position += len(chunk)
        return taken

    def state_dict(self) -> dict[str, int | bool]:
        """The state that the next call depends on, as plain numbers."""
        return {
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue where ``state`` was taken. ValueError if it belongs to another size, seed or shuffling."""
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"sample order state lacks {', '.join(missing)}: it was not saved by this class")
        for key in ("size", "seed", "shuffle"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"sample order was saved with {key} = {state[key]}, this run has {getattr(self, key)}: "
                    "resume with the same data and seed, or start a new run"
                )
        if not 0 <= state["position"] <= self.size or state["epoch"] < 0:
            raise ValueError(f"sample order position {state['position']} is outside 0 … {self.size}: damaged state")
        self._start_epoch(int(state["epoch"]))
        self.position = int(state["position"])
