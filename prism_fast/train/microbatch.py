"""Cutting a step into micro-batches by a token budget. The cut never changes the mathematics, only the memory."""

from __future__ import annotations

from collections.abc import Sequence


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut items into micro-batches of at most ``budget`` padded tokens (items x longest item).

    Items are taken longest first so that padding stays small. An item longer than the budget stands alone.

    Returns:
        Lists of item indices; every item is in exactly one. Empty items (length 0) are left out.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be 1 or more, got {budget}")
    order = sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
