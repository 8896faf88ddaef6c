"""Engines that keep the gradient of their last update."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from prism_fast.engine.deepspeed import WHOLE, DeepSpeedEngine
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update


class Local(LocalEngine):
    def step(self) -> Update:
        self.kept = {name: p.grad.clone() for name, p in self.masters.items() if p.grad is not None}
        return super().step()

    def gradients(self) -> dict[str, Tensor]:
        return self.kept


class Sharded(DeepSpeedEngine):
    """The gradient as AdamW gets it, without the clip factor."""

    def step(self) -> Update:
        self.kept: dict[str, Tensor] = {}
        return super().step()

    def _update(self, partitions: Iterable[Tensor]) -> None:
        partitions = list(partitions)
        flats = self._flats()
        for name, piece in self._pieces.items():
            for partition in partitions:
                if piece.flat != WHOLE and partition is flats[piece.flat] and name in self._updated:
                    part = partition.grad.narrow(0, piece.offset, piece.tensor.numel())
                    self.kept[name] = part.clone() * self.ranks
        super()._update(partitions)

    def _sum_replicated(self, updated: set[str]) -> None:
        super()._sum_replicated(updated)
        self.kept |= {name: self._replicated[name].grad.clone() for name in self._replicated_with_gradient()}

    def gradients(self) -> dict[str, Tensor]:
        """Joint."""
        return {name: self._whole(name, self.kept.get(name)) for name in self._names if name in self._updated}


class Averaging(Sharded):
    """As DeepSpeed by itself: a deliberate fault."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.ranks = 1


class CountsAlone(Sharded):
    """Divides by this rank's counts: a deliberate fault."""

    def sum(self, values):
        return [float(value) for value in values]
