"""Policy losses by the compiled kernels: loss, gradient and statistics in one launch, one more in backward.

Semantics and validation stand in ``prism_fast.ops.policy_loss``; the arithmetic in ``csrc/policy_loss.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from prism_fast.ops import native

from ..forms import TwoForms
from ..results import PolicyStats
from . import calls

# Positions in the C++ enums.
FAMILY = {
    "grpo": 0, "dapo": 0, "dr_grpo": 0, "bnpo": 0, "gspo": 1, "gspo_token": 1, "cispo": 2, "sapo": 3
}  # fmt: skip
AGGREGATION = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
DIVERGENCE = ("k1", "k2", "k3", "abs")
STATS = len(PolicyStats._fields)  # the kernel writes one number more: what backward has to multiply the slopes by
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
    learns = torch.is_grad_enabled()
    entropy_learns = learns and entropy is not None and entropy.requires_grad and entropy_coef != 0.0
    if entropy is not None and not entropy_learns and entropy.requires_grad:
        entropy = entropy.detach()
    wanted = 2 if entropy_learns else 1 if learns and logp.requires_grad else 0
    inputs = (
        logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask, denominator,
        norm_length,
    )  # fmt: skip
    options = _options(
        loss, clip, delta, dual_clip, sapo_temperature, aggregation, denominator is not None, kl, entropy_coef, kl_coef
    )
    if calls.plain(logp):
        outputs = _compute(inputs, _plan(*options), wanted)
        value = outputs[0]
        if wanted:
            value, _, _ = _forms.attach((logp, entropy if wanted == 2 else None), (), outputs)
        return value, PolicyStats._make(outputs[1].unbind(0)[:STATS])
    count, count_number = calls.split(denominator)
    norm, norm_number = calls.split(norm_length)
    loss, aggregation, kl, has_denominator, *numbers = options
    value, stats, _ = _forms.traced(
        *inputs[:-2], count, norm, loss, aggregation, kl, has_denominator, count_number, norm_number,
        *(x if isinstance(x, bool) else float(x) for x in numbers), wanted,
    )  # fmt: skip
    return value, PolicyStats._make(stats.unbind(0)[:STATS])


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

    Slopes are gradients before the last factor: of logp [N], with ``wanted`` 2 of logp and entropy [2, N], else [0].
    """
    plan = _plan(
        loss, aggregation, kl, has_denominator, clip_low, clip_high, has_bound, bound, tau_positive, tau_negative,
        kl_coef, entropy_coef,
    )  # fmt: skip
    inputs = (
        logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask,
        denominator_number if denominator is None else denominator,
        norm_number or None if norm_length is None else norm_length,
    )  # fmt: skip
    return _compute(inputs, plan, wanted)


def _compute(inputs: tuple, plan, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_run` of its eleven tensors, the last two of which may be numbers or None, and of its options in a plan."""
    logp, kernel = inputs[0], native.module().policy_loss
    out = _allocate(logp, wanted)

    def dense() -> tuple:
        kind = logp.dtype
        of_mask = torch.bool if inputs[8] is not None and inputs[8].dtype == torch.bool else kind
        kinds = (kind, kind, kind, torch.int32, kind, kind, kind, kind, of_mask)
        columns = map(calls.column, inputs[:9], kinds)
        return (plan, *columns, *(calls.scalar(x, kind) for x in inputs[9:]), *out, wanted)

    calls.launch(
        "policy_loss", kernel, logp, (inputs[3].shape[0] - 1) * PARTIALS, (plan, *inputs, *out, wanted), dense
    )  # fmt: skip
    return out


def _allocate(logp: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    n = logp.shape[0]
    slopes = torch.empty_like(logp) if wanted == 1 else logp.new_empty((2, n) if wanted else 0)
    return logp.new_empty(()), logp.new_empty(STATS + 1), slopes


@functools.lru_cache(maxsize=64)
def _plan(
    loss: str, aggregation: str, kl: str, has_denominator: bool, clip_low: float, clip_high: float, has_bound: bool,
    bound: float, tau_positive: float, tau_negative: float, kl_coef: float, entropy_coef: float,
):  # fmt: skip
    """The options as the kernels read them."""
    return native.module().policy_plan(
        FAMILY[loss], AGGREGATION.index(aggregation), DIVERGENCE.index(kl.removesuffix("+")), kl.endswith("+"),
        has_denominator, clip_low, clip_high, has_bound, bound, tau_positive, tau_negative, kl_coef, entropy_coef,
    )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    _, stats, slopes = output
    if slopes.is_cuda:
        ctx.save_for_backward(slopes, stats)
    else:  # the twin has divided already, its last factor is 1
        ctx.save_for_backward(slopes)


def _gradients(ctx, traced: bool, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logp and entropy."""
    slopes, *stats = ctx.saved_tensors
    factor = (stats[0], STATS) if stats else ()
    if slopes.dim() == 1:
        return calls.scaled(slopes, upstream, traced, *factor), None
    # Two halves of one tensor never pass as gradients uncopied: whoever accumulates into one would change what is kept.
    gradient = calls.scaled(slopes, upstream, traced, *factor, copy=True)
    of_logp, of_entropy = ctx.needs_input_grad[:2]
    return gradient[0] if of_logp else None, gradient[1] if of_entropy else None


_forms = TwoForms(
    "prism_fast::policy_loss",
    _run,
    fake=lambda logp, *arguments: _allocate(logp, arguments[-1]),
    leading=2,
    results=1,
    save=_save,
    gradients=_gradients,
)


def eager(*settled: object) -> Callable[..., tuple[Tensor, PolicyStats] | None]:
    """(the eleven tensors of `_compute`, whether gradients are on, threads) -> `run` with the options ``settled``
    (those of `_options`), in one call.

    None for anything but plain tensors of the CPU, just as the kernel reads them: then no check would refuse them.
    """
    plan = _plan(*_options(*settled))
    return functools.partial(native.module().policy_loss_eager, _forms.apply, PolicyStats._make, plan)


def _options(
    loss: str,
    clip: tuple[float, float] | None,
    delta: float | None,
    dual_clip: float | None,
    sapo_temperature: tuple[float, float],
    aggregation: str,
    has_denominator: bool,
    kl: str,
    entropy_coef: float,
    kl_coef: float,
) -> tuple:
    """Arguments of `_plan`."""
    bound = dual_clip if delta is None else delta
    return (
        loss, aggregation, kl, has_denominator, *((0.0, 0.0) if clip is None else clip), bound is not None,
        1.0 if bound is None else bound, *sapo_temperature, kl_coef, entropy_coef,
    )  # fmt: skip
