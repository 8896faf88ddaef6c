"""Advantages of tokens by the section of the response that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def span_credit(
    terms: Tensor,
    answer: Tensor,
    otherwise: Tensor,
    lengths: Sequence[int],
    sections: Sequence[tuple[int, int] | None],
) -> list[Tensor]:
    """The advantage of every token: the caption score's for the caption, the reasoning score's for the trace, and
    ``answer`` for the answer.

    Caption tokens get ``2 * terms[:, 0]`` and think tokens ``2 * terms[:, 1]``: the mean of the two is the response's
    advantage ``terms.sum(1)``.

    Args:
        terms: [B, 2] floating, ``group_advantage(..., per_score=True)`` of captions and reasonings.
        answer: [B] floating, advantage of the answer's tokens: ``terms.sum(1)``, or the verifier's.
        otherwise: [B] floating, advantage of all tokens of a response without sections.
        lengths: tokens of each response, its end token included.
        sections: for each response, the number of tokens up to the end of its caption and of its think section; None:
            it has no sections.

    Returns:
        B tensors [lengths[b]] in the dtype of ``terms``.

    Per-span credit is this project's; PRISM (arXiv 2604.28123, eq. 1 and 3) gives a response one advantage.
    """
    credit = []
    for b, (length, ends) in enumerate(zip(lengths, sections, strict=True)):
        if ends is None:
            credit.append(otherwise[b].expand(length))
            continue
        caption, think = ends
        values = torch.stack((2 * terms[b, 0], 2 * terms[b, 1], answer[b]))
        credit.append(values.repeat_interleave(torch.tensor((caption, think - caption, length - think))))
    return credit
