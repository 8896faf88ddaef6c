"""Policy loss from hidden states: ``linear_logprob`` and ``policy_loss`` as one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks, waves
from .backend import choose
from .forms import plain, refuse_duals
from .linear_logprob import linear_logprob, validate
from .policy_loss import policy_loss
from .policy_options import PolicyLossOptions, gather, spelled_out
from .results import PolicyStats

OP = "linear_policy_loss"
BACKENDS = ("reference", "triton")
WHOLE = ("gspo", "gspo_token")  # one ratio per sequence, so a wave holds whole sequences


@spelled_out
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    *,
    options: PolicyLossOptions | None = None,
    old_logp: Tensor | None = None,
    token_advantage: Tensor | None = None,
    denominator: Tensor | float | None = None,
    entropy: bool = False,
    ref_logp: Tensor | None = None,
    is_weight: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    weight_grad_out: Tensor | None = None,
    logp_out: Tensor | None = None,
    borders: Sequence[int] | None = None,
    backend: str | None = None,
    **settings: Any,
) -> tuple[Tensor, PolicyStats]:
    """``policy_loss`` of the log-probabilities that ``linear_logprob`` gives for the same rows.

    Args:
        hidden [N, H], weight [V, H], target [N], bias, temperature, softcap, ignore_index: as in
            ``linear_logprob``; rows with ``ignore_index`` are inactive, like those that ``mask`` excludes.
        entropy: report the mean entropy; ``entropy_coef`` != 0 computes it in any case.
        weight_grad_out: [V, H] float32 or float64; this call, not backward, adds the weight's gradient to it. Backward
            must then be called with the gradient 1 (scale the loss through ``denominator``); any other gives NaN.
            Without it the op collects the gradient of a half-precision weight in a float32 matrix of its own.
        logp_out: [N] float32 or float64, receives the log-probabilities of the rows, as ``linear_logprob`` gives them,
            without gradient.
        borders: the offsets of ``cu_seqlens`` as Python numbers. gspo and gspo_token with ``old_logp`` need them on a
            GPU; on the CPU the op reads them from ``cu_seqlens``.
        All others: as in ``policy_loss``.
        backend: None, "reference" or "triton", as in ``linear_logprob``. None lets ``policy_loss`` choose its own.

    Forward computes the gradients too, wave after wave of rows: 3 matrix passes, and one wave of scores in memory (2.5
    GiB on a GPU of 80 GB or more, 320 MiB on others, 64 MiB or 256 rows on a CPU; at least the longest sequence for
    gspo with ``old_logp``). Backward only scales them, so it may be called again; a float16 gradient beyond 65504 is
    already infinite by then (a larger ``denominator`` prevents it). Under ``torch.compile`` one graph composes the two
    ops instead; backward then computes the scores again (4 passes) and adds to ``weight_grad_out``.

    Returns:
        (loss 0-d, PolicyStats), as ``policy_loss``.

    Raises:
        ValueError, NotImplementedError: as ``linear_logprob`` and ``policy_loss``.

    Cost: 6 N V H FLOP with gradients.

    Sources: those of the two ops.
    """
    options = gather(linear_policy_loss, options, settings)
    validate(OP, hidden, weight, target, bias, temperature, softcap, weight_grad_out, ignore_index)
    checks.offsets(OP, cu_seqlens, hidden)
    checks.flag(OP, "entropy", entropy)
    chosen = choose(OP, BACKENDS, backend, hidden)
    if plain(hidden):
        refuse_duals(OP, chosen, hidden, weight, bias)
    if logp_out is not None:
        wide = (torch.float32, torch.float64)
        checks.tensor(OP, "logp_out", logp_out, shape=tuple(target.shape), dtypes=wide, like=hidden)
    with_entropy = entropy or options.entropy_coef != 0.0
    kept = target != ignore_index
    if mask is not None:
        checks.mask(OP, mask, target.shape[0], hidden)
        kept = kept & (mask != 0)
    policy = partial(
        policy_loss,
        options=options,
        old_logp=old_logp,
        token_advantage=token_advantage,
        denominator=denominator,
        ref_logp=ref_logp,
        is_weight=is_weight,
        mask=kept,
        backend="reference" if backend == "reference" else None,
    )
    if torch.compiler.is_compiling():
        found = linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            entropy=with_entropy,
            ignore_index=ignore_index,
            save="recompute",
            weight_grad_out=weight_grad_out,
            backend=chosen,
        )
        if logp_out is not None:
            logp_out.copy_(found.logp.detach())
        return policy(found.logp, advantage, cu_seqlens, entropy=found.entropy if with_entropy else None)
    rows, step = waves.open_rows(chosen, hidden, weight, bias, target, temperature, softcap, with_entropy, ignore_index)
    whole = _borders(borders, cu_seqlens, hidden.shape[0]) if options.loss in WHOLE and old_logp is not None else None
    walk = waves.policy_walk(
        lambda logp, entropies: policy(logp, advantage, cu_seqlens, entropy=entropies),
        waves.cuts(hidden.shape[0], step, whole),
        target,
        weight.shape[0],
        ignore_index,
        with_entropy,
        logp_out,
    )
    loss, *stats = waves.run(OP, chosen, hidden, weight, bias, rows, walk, weight_grad_out)
    return loss, PolicyStats(*stats)


def _borders(borders: Sequence[int] | None, cu_seqlens: Tensor, rows: int) -> Sequence[int]:
    """Offsets of the sequences on the host."""
    if borders is None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"{OP}: a sequence ratio cuts waves at sequence borders, and reading cu_seqlens from "
                f"{cu_seqlens.device} would synchronise; pass borders=, the same offsets as Python numbers"
            )
        borders = cu_seqlens.tolist()
    if (
        not isinstance(borders, Sequence)
        or not all(isinstance(at, int) for at in borders)
        or len(borders) != cu_seqlens.shape[0]
        or list(borders) != sorted(borders)
        or not 0 <= borders[0] <= borders[-1] <= rows
    ):
        raise ValueError(
            f"{OP}: borders must be the {cu_seqlens.shape[0]} ascending offsets of cu_seqlens, at most {rows}; got "
            f"{list(borders[:8]) if isinstance(borders, Sequence) else borders!r}"
        )
    return borders
