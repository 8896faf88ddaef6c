"""The discriminator's loss in the alignment stage, as published and as corrected."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.ops import PairwiseStats, pairwise_loss
from prism_fast.released import losses as released

PER_MICRO_BATCH = {"released": released.discriminator_loss}
"""Semantics whose loss divides by the counts of its own micro-batch, which no options of ``pairwise_loss`` express."""


def discriminator_loss(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    valid: Tensor,
    *,
    semantics: str = "prism_fast",
    score_clip: float | None = 10.0,
    score_reg: float = 0.001,
    lengths: tuple[Tensor, Tensor] | None = None,
    length_penalty: float | Sequence[float] = 0.0,
    spread: float = 0.0,
    denominator: Tensor | float | None = None,
    l2_denominator: Tensor | float | None = None,
    valid_everywhere: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PairwiseStats]:
    """Bradley-Terry loss of each score plus ``score_reg`` times the mean square of all.

    Args:
        teacher: [G, K] floating scores, one row per prompt; K = 2 (caption, reasoning) or 1 (whole response).
        student: [B, K], dtype of ``teacher``.
        group: [B] int64 or int32 row of ``teacher`` that a student answers.
        valid: [B] bool, students that obey the format.
        semantics:
            ``prism_fast`` and ``paper``: sums over valid students divided by ``denominator``; squares of each teacher
            score counted once; nothing is learnt from pairs where no student is valid.
            ``released``: for one micro-batch, not scaled by its share of the mini-batch. Divided by its own valid
            students; the teacher's squares are counted once per student; scores are clamped before the length
            penalty as well; NaN and infinite scores become 0; where no
            rank has a valid student (``valid_everywhere`` = 0), 0.01 * -log sigmoid(mean teacher score) per score.
        score_clip, lengths, length_penalty, spread: ``clip``, ... of ``pairwise_loss``.
        score_reg: weight of the mean square over all scores, invalid ones included.
        denominator: global count of valid students (``prism_fast``, ``paper``), number or 0-d tensor.
        l2_denominator: global count of scores, (G + B) * K summed over calls (``prism_fast``, ``paper``).
        valid_everywhere: 0-d count of valid students over the ranks' current micro-batches (``released``); None = here.
        backend: as in ``pairwise_loss``.

    Returns:
        (loss 0-d, PairwiseStats [K]): counts are true counts under all semantics.

    Raises:
        ValueError: unknown semantics, options of the other semantics, or what ``pairwise_loss`` refuses.

    Source: PRISM (arXiv 2604.28123) eq. 2 (``paper`` is it with ``score_clip=None, score_reg=0``); ``released``:
    ``update_critic`` of its code; one score: GAD (arXiv 2511.10643).
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"discriminator_loss: semantics={semantics!r} is not one of {', '.join(map(repr, SEMANTICS))}")
    if semantics in PER_MICRO_BATCH:
        if denominator is not None or l2_denominator is not None or spread != 0.0:
            raise ValueError(
                f"discriminator_loss: {semantics!r} divides by the counts of its micro-batch and has no spread term; "
                "use semantics='prism_fast' for denominator, l2_denominator and spread"
            )
        return PER_MICRO_BATCH[semantics](
            teacher,
            student,
            group,
            valid,
            score_clip=score_clip,
            score_reg=score_reg,
            lengths=lengths,
            length_penalty=length_penalty,
            valid_everywhere=valid_everywhere,
            backend=backend,
        )
    if valid_everywhere is not None:
        raise ValueError(f"discriminator_loss: valid_everywhere belongs to 'released', not to {semantics!r}")
    return pairwise_loss(
        teacher,
        student,
        group,
        valid=valid,
        clip=score_clip,
        lengths=lengths,
        length_penalty=length_penalty,
        l2=score_reg,
        spread=spread,
        denominator=denominator,
        l2_denominator=l2_denominator,
        backend=backend,
    )
