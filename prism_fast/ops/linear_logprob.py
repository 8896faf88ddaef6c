"""Log-probability of target tokens from hidden states and the output matrix, without keeping a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from . import budgets, checks
from .backend import choose
from .reference.linear_logprob import linear_logprob as reference
from .results import LogProb

OP = "linear_logprob"
BACKENDS = ("reference", "triton")
SAVE = ("auto", "logits", "recompute")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    save: str = "auto",
    save_limit_bytes: int | None = None,
    weight_grad_out: Tensor | None = None,
    backend: str | None = None,
) -> LogProb:
    """``log softmax(cap(hidden @ weight.T + bias) / temperature)[target]`` per row, and its entropy.

    Args:
        hidden: [N, H] floating.
        weight: [V, H], dtype of ``hidden``, or float32 with half-precision ``hidden`` (autocast): the products then
            round it, and its gradient is float32.
        target: [N] int64 or int32 in [0, V), or ``ignore_index``. Ignored rows give logp 0, entropy 0 and no gradient;
            any other value outside [0, V) gives NaN and is counted, see ``prism_fast.ops.bad_values``.
        bias: [V], dtype of ``hidden`` or float32, added in float32. -inf bans a token, also under a soft cap.
        temperature: number > 0, or a tensor [N] or [] of such; it gets no gradient.
        softcap: cap(z) = softcap * tanh(z / softcap), before the temperature.
        entropy: also compute the entropy of each row, differentiable.
        save: ``logits`` keeps the exponentials of the scaled scores [N, V], in the inputs' dtype with "triton" (3
            matrix passes); ``recompute`` computes them again, in waves of rows (4 passes); ``auto`` keeps them if they
            fit in ``save_limit_bytes``: shapes and the card decide, never free memory.
        save_limit_bytes: for ``auto``, bytes; None is 4 GiB on a GPU of 80 GB or more, 1 GiB elsewhere.
        weight_grad_out: [V, H] float32 or float64; backward adds the weight's gradient to it and leaves ``weight.grad``
            alone.
        backend: None, "reference" or "triton" (CUDA; bfloat16, float16 or float32; H divisible by 16). None is "triton"
            on CUDA and "reference" elsewhere.

    Returns:
        LogProb(logp [N], entropy [N], or [0] without ``entropy``), nats, float32 (float64 for float64 input).
        Row maximum and log-sum stay two numbers, so logp is exact to rounding also for large scores. Rows whose
        upstream gradient is exactly 0 add nothing. Backward overwrites kept scores: a second backward raises.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        NotImplementedError: float64 or an unknown card with "triton".
        RuntimeError: "triton" without CUDA tensors or without Triton.

    Cost: matrix passes of 2 N V H FLOP, 3 with kept scores and 4 without. Memory beside operands and gradients: the
    kept scores [N, V], or one wave of rows.

    Source: temperature-scaled log-softmax and its entropy (verl ``logprobs_from_logits_v2``, ``entropy_from_logits``);
    soft cap of Gemma 2 (arXiv 2408.00118, section 2).
    """
    validate(OP, hidden, weight, target, bias, temperature, softcap, weight_grad_out, ignore_index)
    checks.flag(OP, "entropy", entropy)
    checks.choice(OP, "save", save, SAVE)
    if save_limit_bytes is None:
        save_limit_bytes = budgets.save_bytes(hidden.device)
    checks.number(OP, "save_limit_bytes", save_limit_bytes, low=0)
    chosen = choose(OP, BACKENDS, backend, hidden)
    keeps = _keeps(save, save_limit_bytes, hidden, weight, bias, chosen)
    options = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "entropy": entropy,
        "ignore_index": ignore_index,
        "save": keeps,
        "weight_grad_out": weight_grad_out,
    }
    if chosen == "triton":
        from .triton.linear_logprob import linear_logprob as fused

        return fused(hidden, weight, target, **options)
    return reference(hidden, weight, target, **options)


def validate(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    weight_grad_out: Tensor | None,
    ignore_index: int,
) -> None:
    """Refuse operands of a head that do not fit together. Raises ValueError, NotImplementedError on device meta."""
    checks.whole(op, "ignore_index", ignore_index)
    checks.tensor(op, "hidden", hidden, shape=(None, None))
    checks.memory(op, hidden)
    n, width = hidden.shape
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    dtypes = (hidden.dtype, torch.float32) if half else (hidden.dtype,)
    checks.tensor(op, "weight", weight, shape=(None, width), dtypes=dtypes, like=hidden)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"{op}: weight has no rows; the vocabulary must hold at least one token")
    checks.tensor(op, "target", target, shape=(n,), dtypes=checks.INTEGERS, like=hidden)
    if bias is not None:
        checks.tensor(op, "bias", bias, shape=(vocabulary,), dtypes=dtypes, like=hidden)
    checks.temperature(op, temperature, n, hidden)
    if softcap is not None:
        checks.number(op, "softcap", softcap, low=0.0, strict=True)
    if weight_grad_out is not None:
        checks.tensor(
            op,
            "weight_grad_out",
            weight_grad_out,
            shape=tuple(weight.shape),
            dtypes=(torch.float32, torch.float64),
            like=hidden,
        )


def _keeps(save: str, limit: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> bool:
    """Whether forward keeps the exponentials [N, V] for backward."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return False
    if save == "auto":
        # The reference keeps exponentials in float32 or wider, the kernels in the inputs' dtype.
        size = hidden.element_size() if backend == "triton" else max(4, hidden.element_size())
        return hidden.shape[0] * weight.shape[0] * size <= limit
    return save == "logits"
