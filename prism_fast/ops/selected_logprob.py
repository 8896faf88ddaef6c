"""Log-probability of target tokens from logits."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .backend import choose
from .reference.selected_logprob import selected_logprob as reference
from .results import LogProb

OP = "selected_logprob"
BACKENDS = ("reference", "native")


def selected_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LogProb:
    """``log softmax(logits / temperature)[target]`` per row, and its entropy.

    Args:
        logits: [N, V] floating; not changed.
        target: [N] int64 or int32 in [0, V), or ``ignore_index``. Ignored rows give logp 0, entropy 0 and no gradient;
            any other value outside [0, V) gives NaN and is counted, see ``prism_fast.ops.bad_values``.
        temperature: number > 0, or a tensor [N] or [] of such; it gets no gradient.
        entropy: also compute the entropy of each row, differentiable.
        backend: None, "reference" or "native".

    Returns:
        LogProb(logp [N], entropy [N], or [0] without ``entropy``), nats, float32 (float64 for float64 logits).
        The gradient has the dtype of the logits; rows whose upstream gradient is exactly 0 get exact zeros.

    Raises:
        ValueError: wrong shape, dtype, device or option; an empty vocabulary.
        RuntimeError: the backend is missing on this machine.

    Cost: "native" reads the logits once forward, and reads and writes them once backward.

    Source: verl ``logprobs_from_logits_v2`` and ``entropy_from_logits``.
    """
    checks.tensor(OP, "logits", logits, shape=(None, None))
    if logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits have no columns; the vocabulary must hold at least one token")
    checks.tensor(OP, "target", target, shape=(logits.shape[0],), dtypes=checks.INTEGERS, like=logits)
    checks.temperature(OP, temperature, logits.shape[0], logits)
    checks.flag(OP, "entropy", entropy)
    checks.whole(OP, "ignore_index", ignore_index)
    kernel = reference
    if choose(OP, BACKENDS, backend, logits) == "native":
        from .native.selected_logprob import run as kernel
    return kernel(logits, target, temperature=temperature, entropy=entropy, ignore_index=ignore_index)
