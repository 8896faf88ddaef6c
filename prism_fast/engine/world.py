"""The ranks of a run: what they agree on beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
S = TypeVar("S")


class RankError(RuntimeError):
    """Another rank failed or does not answer; the message names it."""


class World:
    """Numbers and words that all ranks of ``torch.distributed`` exchange, on the CPU, whatever the weights use.

    Methods marked *joint*: all ranks call them, in the same order. A rank that does not come ends the others after
    ``patience``. Without a process group there is one rank, and nothing is exchanged.

    ``phase``: what this rank is at, for messages to the others.
    """

    def __init__(self, *, patience: timedelta = timedelta(minutes=10)) -> None:
        self.rank, self.size, self.phase = 0, 1, "start"
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=patience) if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this rank writes the run's files and talks to the console."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Joint. Sum over the ranks of each of ``values``, float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Joint. Largest of each of ``values`` over the ranks, float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def agree(self, flag: bool) -> bool:
        """Joint. Whether ``flag`` is true on every rank."""
        return self.max([not flag]) == [0.0]

    def any(self, flag: bool) -> bool:
        """Joint. Whether ``flag`` is true on some rank."""
        return self.max([flag]) != [0.0]

    def gather(self, value: Any) -> list[Any]:
        """Joint. The ``value`` of every rank, in their order; what JSON can hold, so that no floating-point bit is
        lost. One rank gets its own object back."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self._group)
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=self._group)
        pieces = zip(texts, lengths, strict=True)
        return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in pieces]

    def of_first(self, value: Any) -> Any:
        """Joint. The ``value`` of rank 0; see `gather`."""
        return self.gather(value if self.first else None)[0]

    def fault(self, text: str | None) -> tuple[int, str] | None:
        """Joint. The lowest rank that has a text, and the text; None where no rank has any."""
        if self.agree(text is None):
            return None
        return next((rank, text) for rank, text in enumerate(self.gather(text)) if text is not None)

    def together(self, act: Callable[[], T]) -> T:
        """Joint. ``act()``; if it fails on one rank it fails on all.

        Raises:
            RankError: it failed on another rank.
        """
        if self.size == 1:
            return act()
        fault: Exception | None = None
        try:
            result = act()
        except Exception as error:
            fault = error
        found = self.fault(None if fault is None else str(fault))
        if fault is not None:
            raise fault
        if found is not None:
            raise RankError(self.named(*found))
        return result

    def on_first(self, act: Callable[[], T]) -> T | None:
        """Joint. ``act()`` on rank 0 alone, None on the others, which wait for it; fails as `together` does."""
        return self.together(act if self.first else lambda: None)

    def share(self, items: Sequence[S]) -> Sequence[S]:
        """This rank's part of ``items``, the same on all ranks: as many neighbours for each rank, in their order; where
        they cannot be divided, some ranks have one more."""
        low, high = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[low:high]

    def named(self, rank: int, text: str) -> str:
        """A message of ``rank``."""
        return text if self.size == 1 else f"rank {rank} of {self.size}: {text}"

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp) -> list[float]:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if len(numbers) and self.size > 1:
            dist.all_reduce(numbers, op=op, group=self._group)
        return numbers.tolist()
