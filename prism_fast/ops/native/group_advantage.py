"""Group advantages by the compiled kernels: one launch on CUDA, threads on the CPU.

Semantics and validation: ``prism_fast.ops.group_advantage``; arithmetic: ``csrc/group_advantage.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prism_fast.ops import native

from ..forms import plain, refuse_duals
from . import calls

# Positions in the C++ enums.
NORMALIZE = {"per_score": 0, "combined": 1, "mean_only": 2, "leave_one_out": 3, "batch": 4}
INVALID = {"below_min": 0, "exclude": 1, "as_is": 2}


def run(*arguments: Any) -> Tensor:
    """Arguments as for `_run`; the public op has already validated them.

    The result has no gradient. Does not synchronise, and can be captured in a CUDA graph. Raises RuntimeError if the
    kernels are missing.
    """
    if not plain(arguments[0]):
        return _operator(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
    refuse_duals("group_advantage", "native")
    return _run(*arguments)


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
    out, module, (rows, width) = _allocate(scores, per_score), native.module(), scores.shape
    if scores.dtype != out.dtype:
        scores = scores.detach().to(out.dtype)
    group, valid = calls.column(group, torch.int64), calls.column(valid, torch.bool)
    weights, gate, offset = (calls.column(x, out.dtype) for x in (weights, gate, offset))
    kernel = module.group_advantage_float64 if out.dtype == torch.float64 else module.group_advantage_float32
    columns = (scores, group, weights, valid, gate, offset, out)
    terms = max(1, width)  # the weighted sum of no scores is one term too
    calls.launch(
        "group_advantage", kernel, scores, (rows + 1) * terms, [calls.address(x) for x in columns], scores.stride(),
        rows, width, NORMALIZE[normalize], INVALID[invalid], eps, invalid_penalty, power, singleton == "identity",
        per_score,
    )  # fmt: skip
    return out


def _kind(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _allocate(scores: Tensor, per_score: bool) -> Tensor:
    shape, kind = scores.shape if per_score else scores.shape[0], _kind(scores)
    return scores.new_empty(shape) if scores.dtype == kind else scores.new_empty(shape, dtype=kind)


_operator = torch.library.custom_op("prism_fast::group_advantage", _run, mutates_args=())


@_operator.register_fake
def _(scores: Tensor, *arguments) -> Tensor:
    return _allocate(scores, arguments[-1])
