"""A benchmarked op, and a line of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_fast.ops import native

MODES = ("inference", "forward", "backward", "full")
STATUSES = ("ok", "wrong", "oom", "unsupported", "absent")
Inputs = dict[str, Tensor]
# Gives differentiable results in a fixed order.
Provider = Callable[[Inputs], tuple[Tensor, ...]]


class Absent(Exception):
    """The provider is not installed."""


class Unsupported(Exception):
    """The provider cannot do this: device, shape, dtype or option."""


def require(backend: str, like: Tensor) -> None:
    """Raises Absent or Unsupported if our ``backend`` is missing or cannot run on the device of ``like``."""
    cuda = like.device.type == "cuda"
    if backend == "triton" and not cuda:
        raise Unsupported("Triton's interpreter is no benchmark: needs CUDA tensors")
    if backend == "native" and not (native.has_cuda() if cuda else native.available()):
        raise Absent(native.why_not())


@dataclass(frozen=True)
class Op:
    """An op with its inputs, its exact results and its providers.

    ``inputs`` gets (shape, dtype, device), seeded by the shape. ``exact`` gets them in float64. Results with a tensor
    ``upstream[i]`` among the inputs are differentiated with it, scalars with 1; an op without ``leaves`` has no
    backward, and its only mode is ``full``. ``work`` gives the FLOP or bytes of (shape, dtype, mode) that the
    mathematics needs, not those that a provider spends.
    """

    name: str
    shapes: dict[str, tuple[tuple[int, ...], ...]]  # "cuda", "cpu", "small"
    inputs: Callable[[tuple[int, ...], torch.dtype, str], Inputs]
    exact: Provider
    providers: dict[str, Provider]
    leaves: tuple[str, ...]
    unit: str  # TFLOP/s or GB/s
    work: Callable[[tuple[int, ...], torch.dtype, str], float]
    upstream: tuple[str, ...] = ()
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {"cuda": (torch.bfloat16,), "cpu": (torch.float32,)}
    )

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else ("full",)

    def run(self, provider: Provider, x: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(results, gradients of the leaves)."""
        results = provider(x)
        return tuple(r.detach() for r in results), self.backward(results, x)

    def backward(self, results: tuple[Tensor, ...], x: Inputs) -> tuple[Tensor, ...]:
        if not self.leaves:
            return ()
        upstream = None
        if self.upstream:
            upstream = [x[name].to(r.dtype) for name, r in zip(self.upstream, results, strict=True)]
        return torch.autograd.grad(results, [x[name] for name in self.leaves], upstream)


# A provider is wrong if the error of a result or gradient, relative to the norm of the exact one, exceeds this. Rivals
# round more often than we do; a larger error is a mistake, not rounding.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class Row:
    """One line of a result: times in milliseconds, memory beyond the inputs, errors against float64."""

    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    status: str
    note: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    runs: int = 0
    # Median over the rounds of this time / eager's in the same round: meaningful on a busy machine too.
    of_eager: float | None = None
    rate: float | None = None
    unit: str = ""
    ceiling_percent: float | None = None
    peak_mib: float | None = None  # of forward and backward together, gradients included
    error: float | None = None  # the largest of ``errors``
    errors: dict[str, float] | None = None  # result or gradient -> normwise relative error
