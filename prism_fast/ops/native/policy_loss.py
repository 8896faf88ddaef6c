"""Policy losses by the compiled kernels: loss, gradient and statistics in one launch, one more in backward.

Semantics and validation: ``prism_fast.ops.policy_loss``; arithmetic: ``csrc/policy_loss.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast.ops import native

from ..bad_values import counter
from ..forms import TwoForms
from ..policy_options import PolicyLossOptions
from ..results import PolicyStats
from . import calls

# Positions in the C++ enums.
FAMILY = {
    "grpo": 0, "dapo": 0, "dr_grpo": 0, "bnpo": 0, "gspo": 1, "gspo_token": 1, "cispo": 2, "sapo": 3
}  # fmt: skip
AGGREGATION = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
DIVERGENCE = ("k1", "k2", "k3", "abs")
STATS = len(PolicyStats._fields)  # the kernel writes one number more: the factor of the slopes in backward
PARTIALS = 10  # per sequence in the workspace


def run(
    logp: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    *,
    options: PolicyLossOptions,
    old_logp: Tensor | None,
    token_advantage: Tensor | None,
    denominator: Tensor | float | None,
    entropy: Tensor | None,
    ref_logp: Tensor | None,
    is_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, PolicyStats]:
    """The public op has already validated the arguments.

    Differentiable once, in ``logp`` and ``entropy``. Does not synchronise, and can be captured in a CUDA graph. Raises
    RuntimeError if the kernels are missing.
    """
    kind = torch.float64 if logp.dtype == torch.float64 else torch.float32
    if logp.dtype != kind:
        logp = logp.to(kind)
    if entropy is not None and entropy.dtype != kind:
        entropy = entropy.to(kind)
    learns = torch.is_grad_enabled()
    entropy_learns = learns and entropy is not None and entropy.requires_grad and options.entropy_coef != 0.0
    if entropy is not None and not entropy_learns and entropy.requires_grad:
        entropy = entropy.detach()
    wanted = 2 if entropy_learns else 1 if learns and logp.requires_grad else 0
    norm_length = options.norm_length if isinstance(options.norm_length, Tensor) else None
    count, count_number = calls.split(denominator)
    value, stats, _ = _forms(
        logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask, count, norm_length,
        denominator is not None, count_number, packed(options), wanted,
    )  # fmt: skip
    return value, PolicyStats._make(stats.unbind(0)[:STATS])


def packed(options: PolicyLossOptions) -> list[float]:
    """The options in the order that ``options_of`` in ``csrc/bind_policy_loss.h`` reads."""
    bound, norm = options.bound, options.norm_length
    return [
        float(FAMILY[options.loss]),
        float(AGGREGATION.index(options.aggregates)),
        float(DIVERGENCE.index(options.kl.removesuffix("+"))),
        float(options.kl.endswith("+")),
        float(bound is not None),
        1.0 - options.clips[0],
        1.0 + options.clips[1],
        1.0 if bound is None else float(bound),
        float(options.sapo_temperature[0]),
        float(options.sapo_temperature[1]),
        float(options.kl_coef),
        float(options.entropy_coef),
        float(options.kl_importance),
        0.0 if norm is None or isinstance(norm, Tensor) else float(norm),
    ]


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
    has_denominator: bool,
    denominator_number: float,
    options: Sequence[float],
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], stats [STATS + 1], slopes).

    Slopes are gradients before the last factor: of logp [N], with ``wanted`` 2 of logp and entropy [2, N], else [0].
    """
    out = loss, stats, slopes = _allocate(logp, wanted)
    module, kind, n, sequences = native.module(), logp.dtype, logp.shape[0], cu_seqlens.shape[0] - 1
    boolean = mask is not None and mask.dtype == torch.bool
    columns = [
        calls.column(x, kind) for x in (logp, old_logp, token_advantage, advantage, ref_logp, entropy, is_weight)
    ]
    columns += calls.column(mask, torch.bool if boolean else kind), calls.column(cu_seqlens, torch.int32), loss, stats
    addresses = [0 if x is None else x.data_ptr() for x in columns]
    addresses.append(slopes.data_ptr() if wanted else 0)
    addresses.append(addresses[-1] + n * slopes.element_size() if wanted == 2 else 0)
    addresses.append(counter(logp.device).data_ptr())
    denominator, count = calls.scalar(denominator, denominator_number, kind)
    norm_length, norm = calls.scalar(norm_length, options[-1], kind)
    calls.launch(
        "policy_loss", module.policy_loss_float64 if kind == torch.float64 else module.policy_loss_float32, logp,
        sequences * PARTIALS, addresses, options, n, sequences, boolean, has_denominator, count, norm,
    )  # fmt: skip
    return out


def _allocate(logp: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    n = logp.shape[0]
    size = n if wanted == 1 else (2, n) if wanted else 0  # new_empty is faster with a plain number
    return logp.new_empty(()), logp.new_empty(STATS + 1), logp.new_empty(size)


def _save(ctx, inputs, output) -> None:
    _, stats, slopes = output
    if calls.on_card(slopes):
        ctx.save_for_backward(slopes, stats)
    else:  # the CPU twin has already applied the last factor
        ctx.save_for_backward(slopes)


def _gradients(ctx, traced: bool, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logp and entropy."""
    slopes, *stats = ctx.saved_tensors
    factor = (stats[0], STATS) if stats else ()
    if slopes.dim() == 1:
        return calls.scaled(slopes, upstream, traced, *factor), None
    # Copied, because the two gradients are views of one kept tensor: accumulating into one would change it.
    gradient = calls.scaled(slopes, upstream, traced, *factor, copy=True)
    of_logp, of_entropy = ctx.needs_input_grad[:2]
    return gradient[0] if of_logp else None, gradient[1] if of_entropy else None


_forms = TwoForms(
    "prism_fast::policy_loss",
    _run,
    backend="native",
    fake=lambda logp, *arguments: _allocate(logp, arguments[-1]),
    leading=2,
    results=1,
    save=_save,
    gradients=_gradients,
)
