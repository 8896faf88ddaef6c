"""Seeded sample order whose position can be saved and resumed exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism_fast.data.samples import Samples


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


class MixedOrder:
    """Indices of several data sets, drawn in the shares of their weights, each data set in a `SampleOrder` of its own.

    The k-th draw comes from the data set that is furthest behind its share of k draws (the first one of equals), so
    that any run of draws holds the shares as exactly as whole numbers can.
    """

    def __init__(self, members: Sequence[Sequence[int]], weights: Sequence[float], seed: int) -> None:
        """``members``: the indices of each data set; an empty one has no share."""
        self._members = [list(indices) for indices in members if len(indices)]
        weights = [weight for indices, weight in zip(members, weights, strict=True) if len(indices)]
        self.shares = [weight / sum(weights) for weight in weights]
        self.size, self.seed = sum(map(len, self._members)), seed
        self._orders = [SampleOrder(len(indices), seed + n) for n, indices in enumerate(self._members)]
        self._drawn = [0] * len(self._orders)

    def next_indices(self, count: int) -> list[int]:
        """The next ``count`` indices."""
        if count < 0:
            raise ValueError(f"count = {count}: cannot take a negative number of samples")
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        draws = sum(self._drawn) + 1
        behind = [share * draws - drawn for share, drawn in zip(self.shares, self._drawn, strict=True)]
        source = behind.index(max(behind))
        self._drawn[source] += 1
        (index,) = self._orders[source].next_indices(1)
        return self._members[source][index]

    def state_dict(self) -> dict:
        """The state that the next call depends on, as plain numbers and lists."""
        return {"shares": self.shares, "drawn": list(self._drawn), "orders": [o.state_dict() for o in self._orders]}

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state`` was taken. ValueError if it belongs to other sizes, weights or another seed."""
        if state.get("shares") != self.shares:
            raise ValueError(
                f"sample order was saved with shares {state.get('shares')}, this run has {self.shares}: "
                "resume with the same data, weights and seed, or start a new run"
            )
        for order, saved in zip(self._orders, state["orders"], strict=True):
            order.load_state_dict(saved)
        self._drawn = list(state["drawn"])


def order_of(samples: Samples, seed: int) -> SampleOrder | MixedOrder:
    """The order in which a stage draws ``samples``: by weights where their data sets have some, else once per epoch."""
    if samples.weights is None:
        return SampleOrder(len(samples), seed)
    members: list[list[int]] = [[] for _ in samples.weights]
    for index, entry in enumerate(samples.entries()):
        members[entry].append(index)
    return MixedOrder(members, samples.weights, seed)
