"""The ranks of a run: what they agree on beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class World:
    """Numbers and words that all ranks of ``torch.distributed`` exchange, on the CPU, whatever the weights use.

    Every method is joint: all ranks call it, in the same order. A rank that does not come ends the others after
    ``patience``.
    """

    def __init__(self, *, patience: timedelta = timedelta(minutes=10)) -> None:
        """Raises RuntimeError where the process group does not exist."""
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: start the run with torchrun (torch.distributed.init_process_group)"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=patience)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum over the ranks of each of ``values``, float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each of ``values`` over the ranks, float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return self.max([not flag]) == [0.0]

    def first(self, text: str | None) -> tuple[int, str] | None:
        """The lowest rank that has a text, and the text; None where no rank has any."""
        if self.agree(text is None):
            return None
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, text, group=self._group)
        return next((rank, text) for rank, text in enumerate(texts) if text is not None)

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp) -> list[float]:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if len(numbers):
            dist.all_reduce(numbers, op=op, group=self._group)
        return numbers.tolist()
