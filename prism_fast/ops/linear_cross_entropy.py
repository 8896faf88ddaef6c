"""Cross entropy from hidden states and the output matrix, with label smoothing and z-loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, waves
from .backend import choose
from .bad_values import counted
from .forms import plain, refuse_duals
from .linear_logprob import linear_logprob, validate
from .reference import softmax_rows

OP = "linear_cross_entropy"
BACKENDS = ("reference", "triton")
REDUCTIONS = ("mean", "sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weight_grad_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(cap(hidden @ weight.T + bias), target, label_smoothing=...) + z_loss * mean(logsumexp ** 2)``.

    Args:
        hidden [N, H], weight [V, H], target [N], bias, softcap, ignore_index: as in ``linear_logprob``; rows with
            ``ignore_index`` do not count.
        reduction: "mean" over the rows that count, or "sum". There is no "none": gradients are computed in forward,
            before backward could weigh the rows; use ``linear_logprob``.
        denominator: number or 0-d tensor instead of the number of rows that count, for "mean": the *global* count, so
            that any micro-batching gives the same gradient. 0 counts as 1.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``: the share of the target that goes
            evenly to the whole vocabulary. Not with ``softcap``.
        z_loss: coefficient >= 0 of the squared log-sum-exp of a row's scores, reduced like the loss.
        weight_grad_out: as in ``linear_policy_loss``: this call adds to it, and backward takes the gradient 1 alone.
        backend: None, "reference" or "triton", as in ``linear_logprob``.

    Forward computes the gradients too, wave after wave of rows, as in ``linear_policy_loss``: 3 matrix passes and one
    wave of scores in memory; backward may be called again. Under ``torch.compile`` the op composes ``linear_logprob``
    and plain PyTorch instead (4 passes; no ``weight_grad_out`` with ``label_smoothing`` or ``z_loss``).

    Returns:
        The loss, 0-d, float32 (float64 for float64 input); NaN with "mean" and no row that counts, as in PyTorch.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        NotImplementedError: ``label_smoothing`` with ``softcap``; otherwise as ``linear_logprob``.

    Cost: 6 N V H FLOP with gradients.

    Sources: label smoothing of Szegedy et al. (arXiv 1512.00567, section 7); z-loss of PaLM (arXiv 2204.02311, section
    5), coefficient 1e-4 there.
    """
    validate(OP, hidden, weight, target, bias, 1.0, softcap, weight_grad_out, ignore_index)
    chosen = choose(OP, BACKENDS, backend, hidden)
    if plain(hidden):
        refuse_duals(OP, chosen, hidden, weight, bias)
    checks.choice(OP, "reduction", reduction, REDUCTIONS)
    checks.number(OP, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    checks.number(OP, "z_loss", z_loss, low=0.0)
    if label_smoothing != 0.0 and softcap is not None:
        raise NotImplementedError(
            f"{OP}: label_smoothing={label_smoothing} with softcap={softcap}: the mean of capped scores would need "
            "another pass; pass one of them"
        )
    if denominator is not None:
        if reduction == "sum":
            raise ValueError(f"{OP}: reduction='sum' has no denominator; use reduction='mean'")
        if isinstance(denominator, Tensor):
            checks.scalar(OP, "denominator", denominator, hidden)
        else:
            checks.number(OP, "denominator", denominator, low=0.0)
    kind = waves.wide(hidden)
    kept = target != ignore_index
    share = _share(kept, reduction, denominator, kind)  # 0-d: the weight of a row
    average = None  # ([H] mean row of the matrix, 0-d mean of the bias or None)
    if label_smoothing != 0.0:
        mean = weight.to(hidden.dtype).mean(0, dtype=kind)
        average = mean, None if bias is None else bias.mean(dtype=kind)
    if torch.compiler.is_compiling():
        logp = linear_logprob(
            hidden, weight, target, bias=bias, softcap=softcap, ignore_index=ignore_index, save="recompute",
            weight_grad_out=weight_grad_out, backend=chosen,
        ).logp  # fmt: skip
        if average is None and z_loss == 0.0:
            return -logp.sum() * share
        if weight_grad_out is not None:
            raise NotImplementedError(
                f"{OP}: weight_grad_out with label_smoothing or z_loss under torch.compile; call the op outside of it"
            )
        lse = _own_score(hidden, weight, bias, softcap, target, kept) - logp
        return torch.where(kept, _each(logp, lse, hidden, average, label_smoothing, z_loss), 0.0).sum() * share
    rows, step = waves.open_rows(chosen, hidden, weight, bias, target, 1.0, softcap, False, ignore_index)
    vocabulary = weight.shape[0]

    def walk(head: waves.Rows, learns: bool) -> tuple[Tensor]:
        _, ignored, outside = softmax_rows.target_rows(target, vocabulary, ignore_index)
        outside = counted(outside)
        total = hidden.new_zeros((), dtype=kind)
        for start, end in waves.cuts(hidden.shape[0], step, None):
            block = slice(start, end)
            found = head.forward(block, keep=learns)
            logp, _ = softmax_rows.finish(found.logp, found.entropy, ignored[block], outside[block])
            lse = head.log_sum_exp(block, found)
            each = _each(logp, lse, hidden[block], average, label_smoothing, z_loss)
            total += torch.where(kept[block], each, 0.0).sum()
            if learns:
                weighs = torch.where(kept[block], share, 0.0)
                g = torch.where(outside[block], torch.nan, -(1.0 - label_smoothing) * weighs)
                apart = None
                if average is not None or z_loss != 0.0:
                    of_lse = torch.where(kept[block], (label_smoothing + 2.0 * z_loss * lse) * weighs, 0.0)
                    apart = g - of_lse, -label_smoothing / vocabulary * weighs
                head.backward(block, found, g, apart=apart)
            del found  # the next wave reuses its memory
        return (total * share,)

    return waves.run(OP, chosen, hidden, weight, bias, rows, walk, weight_grad_out)[0]


def _share(kept: Tensor, reduction: str, denominator: Tensor | float | None, kind: torch.dtype) -> Tensor:
    if reduction == "sum":
        return torch.ones((), dtype=kind, device=kept.device)
    if denominator is None:
        return 1.0 / kept.sum().to(kind)
    count = torch.as_tensor(denominator, dtype=kind, device=kept.device)
    return 1.0 / torch.where(count == 0.0, 1.0, count)


def _each(
    logp: Tensor,
    lse: Tensor,
    hidden: Tensor,
    average: tuple[Tensor, Tensor | None] | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """[n] losses of the rows."""
    each = -(1.0 - label_smoothing) * logp
    if average is not None:
        mean, of_bias = average
        with torch.autocast(hidden.device.type, enabled=False):
            score = hidden.to(mean.dtype) @ mean
        each = each + label_smoothing * (lse - (score if of_bias is None else score + of_bias))
    return each if z_loss == 0.0 else each + z_loss * lse.square()


def _own_score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, target: Tensor, kept: Tensor
) -> Tensor:
    """[N] score of the target; where it is no column, the score of some other column."""
    kind = waves.wide(hidden)
    column = torch.where(kept, target, 0).clamp(0, weight.shape[0] - 1)
    score = (hidden.to(kind) * weight[column].to(hidden.dtype).to(kind)).sum(-1)
    score = score if bias is None else score + bias[column].to(kind)
    return score if softcap is None else softcap * torch.tanh(score / softcap)
