"""Policy losses by the compiled kernels: loss, gradient and statistics in one launch, one more in backward.

Semantics and validation stand in ``prism_fast.ops.policy_loss``; the arithmetic in ``csrc/policy_loss.h``.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_fast.ops import native

from ..results import PolicyStats
from . import calls

# Positions in the C++ enums.
FAMILY = {
    "grpo": 0, "dapo": 0, "dr_grpo": 0, "bnpo": 0, "gspo": 1, "gspo_token": 1, "cispo": 2, "sapo": 3
}  # fmt: skip
AGGREGATION = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
DIVERGENCE = ("k1", "k2", "k3", "abs")
STATS = len(PolicyStats._fields)  # the kernel writes one number more: 1 / denominator
PARTIALS = 10  # per sequence in the workspace


def run(
    logp: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None,
    token_advantage: Tensor | None,
    loss: str,
    clip: tuple[float, float] | None,
    delta: float | None,
    dual_clip: float | None,
    sapo_temperature: tuple[float, float],
    aggregation: str,
    denominator: Tensor | float | None,
    norm_length: float | Tensor | None,
    entropy: Tensor | None,
    entropy_coef: float,
    ref_logp: Tensor | None,
    kl: str,
    kl_coef: float,
    is_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, PolicyStats]:
    """Arguments are already validated by the public op, and ``aggregation`` is resolved.

    Differentiable once, in ``logp`` and ``entropy``. Does not synchronise, and can be captured in a CUDA graph. Offsets
    that descend give NaN. Raises RuntimeError where the kernels are missing.
    """
    kind = torch.float64 if logp.dtype == torch.float64 else torch.float32
    if logp.dtype != kind:
        logp = logp.to(kind)
    if entropy is not None and entropy.dtype != kind:
        entropy = entropy.to(kind)
    wanted = 0
    if torch.is_grad_enabled():
        if entropy is not None and entropy.requires_grad and entropy_coef != 0.0:
            wanted = 2
        elif logp.requires_grad:
            wanted = 1
    low, high = (0.0, 0.0) if clip is None else clip
    bound = dual_clip if delta is None else delta
    denominator_is_tensor, norm_is_tensor = isinstance(denominator, Tensor), isinstance(norm_length, Tensor)
    constants = (
        advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask,
        denominator if denominator_is_tensor else None, norm_length if norm_is_tensor else None,
        loss, aggregation, kl, denominator is not None,
        0.0 if denominator_is_tensor or denominator is None else float(denominator),
        0.0 if norm_is_tensor or norm_length is None else float(norm_length),
        float(low), float(high), bound is not None, 1.0 if bound is None else float(bound),
        float(sapo_temperature[0]), float(sapo_temperature[1]), float(kl_coef), float(entropy_coef), wanted,
    )  # fmt: skip
    if not calls.plain(logp):
        value, stats, _ = _operator(logp, entropy, *constants)
        stats = stats.detach()
    elif wanted:
        value, stats = _Eager.apply(logp, entropy, constants)
    else:
        value, stats, _ = _run(logp, entropy, *constants)
    return value, PolicyStats(*stats.unbind(0)[:STATS])


def _run(
    logp: Tensor,
    entropy: Tensor | None,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    old_logp: Tensor | None,
    token_advantage: Tensor | None,
    ref_logp: Tensor | None,
    is_weight: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    norm_length: Tensor | None,
    loss: str,
    aggregation: str,
    kl: str,
    has_denominator: bool,
    denominator_number: float,
    norm_number: float,
    clip_low: float,
    clip_high: float,
    has_bound: bool,
    bound: float,
    tau_positive: float,
    tau_negative: float,
    kl_coef: float,
    entropy_coef: float,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], stats [STATS + 1], slopes).

    Slopes are gradients times the denominator: of logp [N], with ``wanted`` 2 of logp and entropy [2, N], else [0].
    """
    out = _allocate(logp, wanted)
    workspace = torch.empty((cu_seqlens.shape[0] - 1) * PARTIALS, dtype=torch.float64, device=logp.device)
    with calls.on_device("policy_loss", logp) if logp.is_cuda else nullcontext():
        into(
            out, workspace, logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask,
            denominator, norm_length, loss, aggregation, kl, has_denominator, denominator_number, norm_number, clip_low,
            clip_high, has_bound, bound, tau_positive, tau_negative, kl_coef, entropy_coef, wanted,
        )  # fmt: skip
    return out


def _allocate(logp: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    n = logp.shape[0]
    return logp.new_empty(()), logp.new_empty(STATS + 1), logp.new_empty((2, n) if wanted == 2 else n if wanted else 0)


def into(
    out: tuple[Tensor, Tensor, Tensor],
    workspace: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    old_logp: Tensor | None,
    token_advantage: Tensor | None,
    ref_logp: Tensor | None,
    is_weight: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    norm_length: Tensor | None,
    loss: str,
    aggregation: str,
    kl: str,
    has_denominator: bool,
    denominator_number: float,
    norm_number: float,
    clip_low: float,
    clip_high: float,
    has_bound: bool,
    bound: float,
    tau_positive: float,
    tau_negative: float,
    kl_coef: float,
    entropy_coef: float,
    wanted: int,
) -> None:
    """Write into ``out``; ``workspace`` is float64 ``[B · PARTIALS]``, its contents do not matter."""
    module, kind = native.module(), logp.dtype
    kernel = module.policy_loss_float64 if kind == torch.float64 else module.policy_loss_float32
    logp, cu_seqlens = logp.contiguous(), cu_seqlens.contiguous()
    old_logp, token_advantage, advantage, ref_logp, entropy, is_weight = (
        calls.column(x, kind) for x in (old_logp, token_advantage, advantage, ref_logp, entropy, is_weight)
    )
    if mask is not None:
        mask = mask.contiguous() if mask.dtype == torch.bool else calls.column(mask, kind)
    plan = _plan(
        loss, aggregation, kl, has_denominator, clip_low, clip_high, has_bound, bound, tau_positive, tau_negative,
        kl_coef, entropy_coef,
    )  # fmt: skip
    denominator, *count = calls.number(denominator, denominator_number, kind)
    norm_length, *norm = calls.number(norm_length, norm_number, kind)
    value, stats, slopes = out
    kernel(
        plan,
        logp.data_ptr(),
        calls.address(old_logp),
        calls.address(token_advantage),
        calls.address(advantage),
        calls.address(ref_logp),
        calls.address(entropy),
        calls.address(is_weight),
        calls.address(mask),
        0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        cu_seqlens.data_ptr(),
        value.data_ptr(),
        stats.data_ptr(),
        slopes.data_ptr() if wanted else 0,
        slopes.data_ptr() + logp.shape[0] * slopes.element_size() if wanted == 2 else 0,
        workspace.data_ptr(),
        logp.shape[0],
        cu_seqlens.shape[0] - 1,
        *count,
        *norm,
        torch.get_num_threads(),
        calls.stream_of(logp),
    )


@functools.lru_cache(maxsize=64)
def _plan(
    loss: str,
    aggregation: str,
    kl: str,
    has_denominator: bool,
    clip_low: float,
    clip_high: float,
    has_bound: bool,
    bound: float,
    tau_positive: float,
    tau_negative: float,
    kl_coef: float,
    entropy_coef: float,
):
    """The options as the kernels read them."""
    return native.module().policy_plan(
        family=FAMILY[loss],
        aggregation=AGGREGATION.index(aggregation),
        divergence=DIVERGENCE.index(kl),
        has_denominator=has_denominator,
        clip_low=clip_low,
        clip_high=clip_high,
        has_bound=has_bound,
        bound=bound,
        tau_positive=tau_positive,
        tau_negative=tau_negative,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )


class _Eager(torch.autograd.Function):
    """The op without the dispatcher. What gets no gradient comes in one tuple: each argument costs its bookkeeping."""

    @staticmethod
    def forward(ctx, logp, entropy, constants):
        value, stats, slopes = _run(logp, entropy, *constants)
        ctx.save_for_backward(slopes, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return value, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        if upstream is None:
            return None, None, None
        return *_gradients(*ctx.saved_tensors, upstream, ctx.needs_input_grad), None


def _gradients(
    slopes: Tensor, stats: Tensor, upstream: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logp and entropy."""
    gradient = calls.scaled(slopes, upstream, stats, STATS)
    if slopes.dim() == 1:
        return gradient, None
    return gradient[0] if needed[0] else None, gradient[1] if needed[1] else None


_operator = torch.library.custom_op("prism_fast::policy_loss", _run, mutates_args=())


@_operator.register_fake
def _(logp: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(logp, arguments[-1])


def _keep(ctx, inputs, output) -> None:
    _, stats, slopes = output
    ctx.save_for_backward(slopes, stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    gradients = (None, None)
    if upstream is not None:
        gradients = _gradients(*ctx.saved_tensors, upstream, ctx.needs_input_grad)
    return *gradients, *(None,) * 24


_operator.register_autograd(_backward, setup_context=_keep)
