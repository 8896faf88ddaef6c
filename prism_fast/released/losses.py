"""The published loss of the discriminator on one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from prism_fast.algorithms.scored import as_scored
from prism_fast.ops import PairwiseStats, pairwise_loss

FALLBACK = 0.01  # weight of the loss on teacher scores alone where a micro-batch has no valid response


def discriminator_loss(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    valid: Tensor,
    *,
    score_clip: float | None,
    score_reg: float,
    lengths: tuple[Tensor, Tensor] | None,
    length_penalty: float | Sequence[float],
    valid_everywhere: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, PairwiseStats]:
    """``algorithms.alignment_loss.discriminator_loss`` under ``released``: its arguments, its result.

    Source: ``update_critic`` of the code published with PRISM (arXiv 2604.28123).
    """
    teacher, student = _finite(teacher)[group.long()], _finite(student)  # the published batch repeats the teacher
    if lengths is not None:
        lengths = (lengths[0][group.long()], lengths[1])
        # Published: clamped before the length penalty, and `pairwise_loss` clamps once more after it.
        if score_clip is not None and length_penalty != 0.0:
            teacher, student = (score.clamp(-score_clip, score_clip) for score in (teacher, student))
    own = torch.arange(student.shape[0], device=student.device)
    loss, stats = pairwise_loss(
        teacher,
        student,
        own,
        valid=valid,
        clip=score_clip,
        lengths=lengths,
        length_penalty=length_penalty,
        l2=score_reg,
        backend=backend,
    )
    if student.shape[0] == 0:
        return loss, stats
    shown = as_scored(teacher, None if lengths is None else lengths[0], length_penalty, score_clip)
    nobody = (valid.sum() if valid_everywhere is None else valid_everywhere) == 0
    return loss + FALLBACK * nobody.to(shown.dtype) * softplus(-shown.mean(0)).sum(), stats


def _finite(score: Tensor) -> Tensor:
    return torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
