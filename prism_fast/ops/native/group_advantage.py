"""Group advantages by the compiled kernels: one launch on CUDA, threads on the CPU.

Semantics and validation stand in ``prism_fast.ops.group_advantage``; the arithmetic in ``csrc/group_advantage.h``.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from prism_fast.ops import native

from . import calls

# Positions in the C++ enums.
NORMALIZE = ("per_score", "combined", "mean_only", "leave_one_out", "batch")
INVALID = ("below_min", "exclude", "as_is")


def run(
    scores: Tensor,
    group: Tensor,
    *,
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
    """scores [B, K] float32 or float64, group [B] int64; arguments are already validated by the public op.

    Returns [B], or [B, K] with ``per_score``, in the dtype of the scores, without gradient. Does not synchronise, and
    can be captured in a CUDA graph. Raises RuntimeError where the kernels are missing.
    """
    weights, gate, offset = (
        x if x is None or (x.dtype == scores.dtype and not x.requires_grad) else x.detach().to(scores.dtype)
        for x in (weights, gate, offset)
    )
    call = _run if calls.plain(scores) else _operator
    return call(
        scores.detach(), group, weights, valid, gate, offset, normalize, float(eps), invalid, float(invalid_penalty),
        singleton, float(power), per_score,
    )  # fmt: skip


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
    rows, columns = scores.shape
    out = scores.new_empty((rows, columns) if per_score else (rows,))
    terms = 1 if normalize == "combined" else columns
    workspace = torch.empty(rows * terms + terms, dtype=torch.float64, device=scores.device)
    with calls.on_device("group_advantage", scores) if scores.is_cuda else nullcontext():
        into(
            out, workspace, scores, group, weights, valid, gate, offset, normalize, eps, invalid, invalid_penalty,
            singleton, power, per_score,
        )  # fmt: skip
    return out


def into(
    out: Tensor,
    workspace: Tensor,
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
) -> None:
    """Write the advantages into ``out``; ``workspace`` is float64 ``[(B + 1) · terms]``, its contents do not matter."""
    module = native.module()
    kernel = module.group_advantage_float64 if scores.dtype == torch.float64 else module.group_advantage_float32
    group, weights, valid, gate, offset = (
        x if x is None else x.contiguous() for x in (group, weights, valid, gate, offset)
    )
    rows, columns = scores.shape
    kernel(
        scores=scores.data_ptr(),
        row_stride=scores.stride(0),
        column_stride=scores.stride(1),
        group=group.data_ptr(),
        weights=weights.data_ptr(),
        valid=calls.address(valid),
        gate=calls.address(gate),
        offset=calls.address(offset),
        out=out.data_ptr(),
        workspace=workspace.data_ptr(),
        rows=rows,
        columns=columns,
        normalize=NORMALIZE.index(normalize),
        invalid=INVALID.index(invalid),
        eps=eps,
        invalid_penalty=invalid_penalty,
        power=power,
        singleton_identity=singleton == "identity",
        per_score=per_score,
        threads=torch.get_num_threads(),
        stream=calls.stream_of(scores),
    )


_operator = torch.library.custom_op("prism_fast::group_advantage", _run, mutates_args=())


@_operator.register_fake
def _(scores: Tensor, *arguments) -> Tensor:
    per_score = arguments[-1]
    return scores.new_empty(tuple(scores.shape) if per_score else (scores.shape[0],))
