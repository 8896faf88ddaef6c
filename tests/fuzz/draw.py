"""Random choices, shapes and tensors of a case; the same seed, op and number give the same case."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GUARDS = {torch.bool: True, torch.int32: -77, torch.int64: -77}  # what lies around a tensor that has gaps


@dataclass
class Case:
    """One call of an op. Tensors are given by the name of their argument."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    learns: tuple[str, ...] = ()  # tensors that require a gradient
    upstream: dict[str, Tensor] = field(default_factory=dict)  # by result; one that is missing gets no gradient
    buffers: dict[str, str] = field(default_factory=dict)  # argument that collects a gradient -> tensor whose it is
    facts: dict[str, Any] = field(default_factory=dict)  # what only the formula and the choice of backends look at
    large: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.facts["dtype"]


class Draw:
    """Source of everything random in a case. ``cap`` bounds every drawn size, for shrinking."""

    def __init__(self, seed: int, op: str, number: int, cap: int | None = None):
        self.random = random.Random(f"{seed}/{op}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.cap = cap
        self.number = number
        # Small tensors never leave one thread, so now and then a case is large. It is nothing for an interpreter.
        self.large = cap is None and number % 20 == 18

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def power(self, low: float, high: float) -> float:
        """A number whose decimal logarithm is uniform."""
        return 10.0 ** self.random.uniform(low, high)

    def size(self, low: int, high: int, large: int = 0) -> int:
        """A size in [low, high], the smallest ones more often; ``large`` in the large cases."""
        if self.large and large:
            return self.random.randint(large // 2, large)
        found = min(low + self.random.randint(0, 1), high) if self.chance(0.25) else self.random.randint(low, high)
        return found if self.cap is None else max(low, min(found, self.cap))

    def lengths(self, count: int, high: int, large: int = 0) -> list[int]:
        return [0 if self.chance(0.15) else self.size(0, high, large) for _ in range(count)]

    def dtype(self) -> torch.dtype:
        return self.pick(*DTYPES)

    def like(self, dtype: torch.dtype) -> torch.dtype:
        """Mostly ``dtype``, else any."""
        return dtype if self.chance(0.7) else self.dtype()

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Integers in [low, high)."""
        found = torch.randint(low, max(high, low + 1), shape, generator=self.generator)
        return found.to(dtype or self.pick(torch.int64, torch.int32))

    def mask(self, *shape: int, probability: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < probability

    def scattered(self, x: Tensor, value: float, probability: float) -> Tensor:
        """``x`` with ``value`` in random places."""
        return x.masked_fill(self.mask(*x.shape, probability=probability), value)

    def junk(self, x: Tensor, where: Tensor) -> Tensor:
        """``x`` with NaN and infinities in the rows ``where``, which nobody may look at."""
        rows = where.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
        for value in (math.nan, math.inf, -math.inf):
            x = torch.where(rows & self.mask(*x.shape, probability=0.6), value, x).to(x.dtype)
        return x

    def strided(self, x: Tensor) -> Tensor:
        """The same numbers in some other arrangement of memory, with guards in the gaps and around."""
        if self.chance(0.4):
            return x
        order = list(range(x.dim()))
        if self.chance(0.5):
            self.random.shuffle(order)
        steps = [self.pick(1, 1, 1, 2, 3) for _ in order]
        before, after = self.pick(0, 0, 1, 3, 8), self.pick(0, 1, 5)
        room = [x.shape[d] * steps[d] + self.pick(0, 0, 1, 4) for d in order]
        guard = GUARDS.get(x.dtype, math.nan)
        base = torch.full((before + math.prod(room) + after,), guard, dtype=x.dtype)
        view = base[before : before + math.prod(room)].view(room)
        for at, d in enumerate(order):
            view = view.narrow(at, 0, x.shape[d] * steps[d])
        view = view.permute([order.index(d) for d in range(x.dim())])[tuple(slice(None, None, s) for s in steps)]
        return view.copy_(x)

    def upstream(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A gradient from above: dense or expanded from one number, here and there or everywhere 0, of any size."""
        scale = self.pick(1.0, 1.0, 1e-3, 30.0)
        if self.chance(0.2):
            return self.normal(scale=scale, dtype=dtype).expand(shape)
        g = self.normal(*shape, scale=scale, dtype=dtype)
        if self.chance(0.3):
            g = self.scattered(g, 0.0, self.pick(0.3, 0.9, 1.0))
        return self.strided(g)

    def learns(self, *names: str) -> tuple[str, ...]:
        """Mostly all of them, else any subset."""
        return names if self.chance(0.6) else tuple(n for n in names if self.chance(0.5))


Formula = Callable[[Case, dict[str, Tensor | None]], dict[str, Tensor]]
