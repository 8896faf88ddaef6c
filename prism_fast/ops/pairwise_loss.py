"""Discriminator loss: each student response against the teacher's response to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .reference.pairwise_loss import pairwise_loss as reference
from .results import PairwiseStats

OP = "pairwise_loss"
BACKENDS = ("reference", "native")


def pairwise_loss(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    *,
    valid: Tensor | None = None,
    clip: float | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    length_penalty: float | Sequence[float] = 0.0,
    l2: float = 0.0,
    spread: float = 0.0,
    denominator: Tensor | float | None = None,
    l2_denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PairwiseStats]:
    """``sum_k sum_b valid_b * -log sigmoid(T[group_b, k] - S[b, k]) / denominator`` + L2 term + spread term.

    Args:
        teacher: [G, K] floating, K scores of each teacher response; one row serves its whole group.
        student: [B, K], dtype of ``teacher``.
        group: [B] int64 or int32 in [0, G); a valid row with another id gives NaN.
        valid: [B] bool, students that count; None = all. The others get gradient 0 from the Bradley-Terry and spread
            terms and may hold NaN if ``l2`` is 0.
        clip: scores are clamped to [-clip, clip] first: no gradient outside, full gradient on the bounds.
        lengths: (teacher [G, K], student [B, K]) tokens of the scored spans, for ``length_penalty``.
        length_penalty: number or K numbers b: score - b * log(1 + tokens), before the clamp.
        l2: weight of the sum of squares of *all* G*K + B*K scores (invalid ones included) over ``l2_denominator``.
        spread: weight of the spread term: within each group the n valid students of rank j should lie at
            mean + Phi^-1((j - 1/2) / n); the squared distances are summed and divided by ``denominator``. A group
            with one valid student adds nothing. A group must not be split over calls.
        denominator: number or 0-d tensor, the *global* count of valid students; None counts this call. 0 counts as 1.
        l2_denominator: likewise, the global count of scores; None counts this call.
        backend: None, "reference" or "native" (differentiable once; ``length_penalty`` for at most 16 scores).

    Returns:
        (loss 0-d float32, or float64 for float64 scores; PairwiseStats of [K] tensors). The statistics compare scores
        before the clamp. Exactly equal scores, such as those of identical texts, are ties: they enter the loss but not
        the accuracy.

    Raises:
        ValueError: wrong shape, dtype, device or option; ``length_penalty`` without ``lengths``.
        RuntimeError: the backend is missing on this machine.

    Cost: "native" on CUDA is one launch of one block, for some hundred responses. The spread term compares every
    student with the others of its group.

    Sources: PRISM (arXiv 2604.28123) eq. 2-3 and ``update_critic`` of its code; GAD (arXiv 2511.10643); spread term:
    CGC of GRGC (arXiv 2609.39757), weight 0.01 there.
    """
    checks.tensor(OP, "teacher", teacher, shape=(None, None))
    groups, columns = teacher.shape
    checks.tensor(OP, "student", student, shape=(None, columns), dtypes=(teacher.dtype,), like=teacher)
    rows = student.shape[0]
    checks.tensor(OP, "group", group, shape=(rows,), dtypes=checks.INTEGERS, like=teacher)
    if valid is not None:
        checks.tensor(OP, "valid", valid, shape=(rows,), dtypes=(torch.bool,), like=teacher)
    if clip is not None:
        checks.number(OP, "clip", clip, low=0.0, strict=True)
    penalty = _penalties(length_penalty, columns)
    if any(penalty) and lengths is None:
        raise ValueError(f"{OP}: length_penalty={length_penalty} needs lengths=(teacher [G, K], student [B, K])")
    if lengths is not None:
        kinds = (*checks.INTEGERS, *checks.FLOATS)
        if not isinstance(lengths, tuple) or len(lengths) != 2:
            raise ValueError(
                f"{OP}: lengths must be the pair (teacher [G, K], student [B, K]), got {type(lengths).__name__}"
            )
        checks.tensor(OP, "lengths[0]", lengths[0], shape=(groups, columns), dtypes=kinds, like=teacher)
        checks.tensor(OP, "lengths[1]", lengths[1], shape=(rows, columns), dtypes=kinds, like=teacher)
    checks.number(OP, "l2", l2, low=0.0)
    checks.number(OP, "spread", spread, low=0.0)
    for name, count in (("denominator", denominator), ("l2_denominator", l2_denominator)):
        if isinstance(count, Tensor):
            checks.scalar(OP, name, count, teacher)
        elif count is not None:
            checks.number(OP, name, count, low=0.0)
    kernel = reference
    if choose(OP, BACKENDS, backend, teacher) == "native":
        from .native.pairwise_loss import run as kernel
    return kernel(
        teacher,
        student,
        group,
        valid=valid,
        clip=clip,
        lengths=lengths if any(penalty) else None,
        length_penalty=penalty,
        l2=l2,
        spread=spread,
        denominator=denominator,
        l2_denominator=l2_denominator,
    )


def _penalties(value: float | Sequence[float], columns: int) -> list[float]:
    """One number for each score."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        checks.number(OP, "length_penalty", value)
        return [float(value)] * columns
    if len(value) != columns:
        raise ValueError(
            f"{OP}: length_penalty has {len(value)} entries, there are {columns} scores; pass one each, or one number"
        )
    for each in value:
        checks.number(OP, "length_penalty", each)
    return [float(each) for each in value]
