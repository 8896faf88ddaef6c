"""Group advantages by the compiled kernels: one launch on CUDA, threads on the CPU.

Semantics and validation stand in ``prism_fast.ops.group_advantage``; the arithmetic in ``csrc/group_advantage.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from prism_fast.ops import native

from ..forms import plain
from . import calls

# Positions in the C++ enums.
NORMALIZE = {"per_score": 0, "combined": 1, "mean_only": 2, "leave_one_out": 3, "batch": 4}
INVALID = {"below_min": 0, "exclude": 1, "as_is": 2}


def run(**arguments) -> Tensor:
    """Arguments of `_run`, already validated by the public op.

    The result has no gradient. Does not synchronise, and can be captured in a CUDA graph. Raises RuntimeError where the
    kernels are missing.
    """
    if plain(arguments["scores"]):
        return _run(**arguments)
    return _operator(**{name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()})


def _run(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    valid: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    normalize: str,
    eps: float,
    invalid: str,
    invalid_penalty: float,
    singleton: str,
    power: float,
    per_score: bool,
) -> Tensor:
    """[B], or [B, K] with ``per_score``; float64 for float64 scores, else float32."""
    out, kernel = _allocate(scores, per_score), native.module().group_advantage
    rest = (
        out, NORMALIZE[normalize], INVALID[invalid], eps, invalid_penalty, power, singleton == "identity", per_score,
    )  # fmt: skip

    def dense() -> tuple:
        kind = out.dtype
        floats = [calls.column(x, kind) for x in (weights, gate, offset)]
        return (
            calls.column(scores, kind), calls.column(group, torch.int64), floats[0], calls.column(valid, torch.bool),
            *floats[1:], *rest,
        )  # fmt: skip

    given = (scores, group, weights, valid, gate, offset, *rest)
    calls.launch("group_advantage", kernel, scores, (scores.shape[0] + 1) * scores.shape[1], given, dense)
    return out


def eager(
    normalize: str, eps: float, invalid: str, invalid_penalty: float, singleton: str, power: float, per_score: bool
) -> Callable[..., Tensor | None]:
    """(scores, group, weights, valid, gate, offset, threads) -> `run` with these options, in one call.

    None for anything but plain tensors of the CPU, just as the kernel reads them: then no check would refuse them.
    """
    options = (NORMALIZE[normalize], INVALID[invalid], eps, invalid_penalty, power, singleton == "identity", per_score)
    return functools.partial(native.module().group_advantage_eager, *options)


def _kind(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _allocate(scores: Tensor, per_score: bool) -> Tensor:
    return scores.new_empty(scores.shape if per_score else scores.shape[:1], dtype=_kind(scores))


_operator = torch.library.custom_op("prism_fast::group_advantage", _run, mutates_args=())


@_operator.register_fake
def _(scores: Tensor, *arguments) -> Tensor:
    return _allocate(scores, arguments[-1])
