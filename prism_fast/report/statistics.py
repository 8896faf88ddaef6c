"""Percentile bootstrap over clusters, for accuracies and for paired differences between two stages.

Held-out items that show the same image are not independent, so whole clusters (images) are resampled, not items
(A. C. Davison and D. V. Hinkley, *Bootstrap Methods and their Application*, 1997, on hierarchical data).
A difference between two stages is taken item by item, which removes the variance that the stages share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_DRAWS_AT_ONCE = 4_000_000  # cluster draws held in memory at once


class Interval(NamedTuple):
    """A mean and its percentile interval at ``LEVEL``, all in the unit of the values."""

    mean: float
    low: float
    high: float


class PairedInterval(NamedTuple):
    """Mean of ``a - b`` over the items, its percentile interval at ``LEVEL`` and the two-sided p of "no difference"."""

    mean: float
    low: float
    high: float
    p: float


def accuracy_interval(correct: ArrayLike, cluster: Sequence[Hashable], *, seed: int, resamples: int = 2000) -> Interval:
    """Mean of ``correct`` and its interval at 95 %, by resampling clusters with replacement.

    Args:
        correct: [M] finite values, usually 0 or 1.
        cluster: [M] names; items that share one are resampled together.
        seed: of the resampling; the result does not depend on the order of the items.
        resamples: number of bootstrap sets.

    Raises:
        ValueError: no items, lengths differ, a value is not finite, fewer than two clusters, or ``resamples`` < 100.
    """
    values = _values("correct", correct)
    means = _resampled_means(values, cluster, seed, resamples)
    low, high = _percentiles(means)
    return Interval(float(values.mean()), low, high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    cluster: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 2000,
    uids: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> PairedInterval:
    """Mean of ``a - b`` over the same items, its interval at 95 % and a two-sided p, by resampling clusters.

    ``p = 2 * min(P(d* <= 0), P(d* >= 0))``, each probability counted as (hits + 1) / (resamples + 1), at most 1.

    Args:
        a, b: [M] values of the two stages, item by item in the same order.
        cluster: [M] names, as in `accuracy_interval`.
        uids: the items' names in ``a`` and in ``b``; given, they must be equal position by position.

    Raises:
        ValueError: the uids differ (the first offender is named), or as in `accuracy_interval`.
    """
    first, second = _values("a", a), _values("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a has {first.size} items and b has {second.size}; a paired difference needs the same items")
    if uids is not None:
        _same_uids(uids[0], uids[1], first.size)
    difference = first - second
    means = _resampled_means(difference, cluster, seed, resamples)
    low, high = _percentiles(means)
    below = (np.count_nonzero(means <= 0.0) + 1) / (resamples + 1)
    above = (np.count_nonzero(means >= 0.0) + 1) / (resamples + 1)
    return PairedInterval(float(difference.mean()), low, high, min(1.0, 2.0 * min(below, above)))


def _values(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be one-dimensional with at least one item, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}[{int(np.flatnonzero(~np.isfinite(array))[0])}] is not finite")
    return array


def _same_uids(a: Sequence[Hashable], b: Sequence[Hashable], count: int) -> None:
    if len(a) != count or len(b) != count:
        raise ValueError(f"{count} items but {len(a)} and {len(b)} uids")
    for position, (left, right) in enumerate(zip(a, b, strict=True)):
        if left != right:
            raise ValueError(
                f"item {position} is {left!r} in a and {right!r} in b; sort both by uid and compare the same items"
            )


def _resampled_means(
    values: NDArray[np.float64], cluster: Sequence[Hashable], seed: int, resamples: int
) -> NDArray[np.float64]:
    """[resamples] means of bootstrap sets: ratio of the drawn clusters' sums to their sizes."""
    if len(cluster) != values.size:
        raise ValueError(f"{values.size} items but {len(cluster)} cluster names")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100 for an interval at 95 %, got {resamples}")
    # Sorting makes the draws depend on the names of clusters, not on the order of items in a file.
    _, code = np.unique(np.asarray([str(name) for name in cluster]), return_inverse=True)
    size = np.bincount(code).astype(np.float64)  # [C]
    clusters = size.size
    if clusters < 2:
        raise ValueError("all items belong to one cluster; resampling clusters needs at least two")
    order = np.lexsort((values, code))  # fixed order of summation: equal bits for any order of the items
    total = np.bincount(code[order], weights=values[order], minlength=clusters)  # [C]
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _DRAWS_AT_ONCE // clusters)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = random.integers(clusters, size=(stop - start, clusters))
        means[start:stop] = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    return means


def _percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)
