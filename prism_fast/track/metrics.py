"""Values by name, each with the one reduction that joins it over micro-batches, updates and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

Number = int | float
WALL_CLOCK = ("time/", "perf/")  # names of metrics that depend on the machine's clock and memory, not on the seed alone
# One name: itself, its reduction, its values and, of a mean, their counts (else an empty list). JSON can hold it.
Row = tuple[str, str, list[Number], list[Number]]


class Metrics:
    """Collects values and reduces them when they are read.

    A value is an int, a float or a 0-d tensor on any device. A tensor is copied when it is given, so the metric keeps
    the value of that moment; the host waits for no device before :meth:`read`. Sums are rounded once, so micro-batches
    give the same bits in any order and on any number of ranks.
    """

    def __init__(self) -> None:
        self._parts: dict[str, _Parts] = {}

    def sum(self, name: str, value: Number | Tensor) -> None:
        """Values add up. Integers stay integers."""
        self._add(name, "sum", value)

    def mean(self, name: str, total: Number | Tensor, count: Number | Tensor = 1) -> None:
        """Reduced to sum(totals) / sum(counts), a float. Where the counts are 0 in sum there is no metric."""
        self._add(name, "mean", total, count)

    def max(self, name: str, value: Number | Tensor) -> None:
        """The largest value. NaN is larger than any."""
        self._add(name, "max", value)

    def last(self, name: str, value: Number | Tensor) -> None:
        """The value given last; over ranks that of the last rank which has one."""
        self._add(name, "last", value)

    def __or__(self, other: Metrics) -> Metrics:
        """Both as one; ``other`` follows, and names keep the order in which they came first.

        Raises:
            ValueError: a name has one reduction here and another one there.
        """
        both = Metrics()
        for metrics in (self, other):
            for name, parts in metrics._parts.items():
                kept = both._of(name, parts.reduction)
                kept.values += parts.values
                kept.counts += parts.counts
        return both

    def only(self, *prefixes: str) -> Metrics:
        """Those whose name begins with one of ``prefixes``."""
        some = Metrics()
        some._parts = {name: parts for name, parts in self._parts.items() if name.startswith(prefixes)}
        return some

    def read(self, gather: Callable[[list[Row]], Iterable[list[Row]]] | None = None) -> dict[str, Number]:
        """The reduced values by name, without names that have no value. One transfer for all tensors of a device.

        Args:
            gather: on several ranks: gives each rank the :meth:`state` of all of them, in the order of the ranks.
                Names may differ between ranks.
        """
        state = self.state()
        joined = Metrics.joined([state] if gather is None else gather(state))
        found = {name: _reduced(parts) for name, parts in joined._parts.items()}
        return {name: value for name, value in found.items() if value is not None}

    def state(self) -> list[Row]:
        """Everything given so far as plain numbers, for other ranks."""
        given = [value for parts in self._parts.values() for value in (*parts.values, *parts.counts)]
        tensors: dict[torch.device, list[Tensor]] = {}
        for value in given:
            if isinstance(value, _OnDevice):
                tensors.setdefault(value.copy.device, []).append(value.copy)
        read = {device: iter(torch.stack(copies).tolist()) for device, copies in tensors.items()}

        def plain(value: Number | _OnDevice) -> Number:
            if not isinstance(value, _OnDevice):
                return value
            number = next(read[value.copy.device])
            return int(number) if value.whole else number

        return [
            (name, parts.reduction, [plain(v) for v in parts.values], [plain(c) for c in parts.counts])
            for name, parts in self._parts.items()
        ]

    @classmethod
    def joined(cls, states: Iterable[list[Row]]) -> Metrics:
        """The metrics of several ranks as one, from the :meth:`state` of each in the order of the ranks.

        Raises:
            ValueError: a name has different reductions on two ranks.
        """
        metrics = cls()
        for rows in states:
            for name, reduction, values, counts in rows:
                parts = metrics._of(name, reduction)
                parts.values += values
                parts.counts += counts
        return metrics

    def _add(self, name: str, reduction: str, value: Number | Tensor, *counts: Number | Tensor) -> None:
        values = [_taken(name, v) for v in (value, *counts)]  # both or neither are kept
        parts = self._of(name, reduction)
        parts.values.append(values[0])
        parts.counts += values[1:]

    def _of(self, name: str, reduction: str) -> _Parts:
        parts = self._parts.setdefault(name, _Parts(reduction))
        if parts.reduction != reduction:
            raise ValueError(
                f"metric {name!r} is reduced by {parts.reduction} in one place and by {reduction} in another; "
                "give it one reduction or two names"
            )
        return parts


def reproducible(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line that are the same bits for the same seed on one machine."""
    return {name: value for name, value in line.items() if not name.startswith(WALL_CLOCK)}


class _Parts:
    """All values of one name, not reduced yet."""

    def __init__(self, reduction: str):
        self.reduction = reduction
        self.values: list[Number | _OnDevice] = []
        self.counts: list[Number | _OnDevice] = []  # of a mean, one for each value


class _OnDevice:
    """A 0-d tensor as it was when it was given, in float64, and whether it was a whole number."""

    def __init__(self, value: Tensor):
        self.copy = value.detach().to(torch.float64, copy=True)
        self.whole = not value.is_floating_point()


def _taken(name: str, value: Number | Tensor) -> Number | _OnDevice:
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            raise ValueError(
                f"metric {name!r} must be a number or a real 0-d tensor, got {value.dtype} of shape "
                f"{tuple(value.shape)}; reduce it first"
            )
        return _OnDevice(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise ValueError(f"metric {name!r} must be a number or a 0-d tensor, got {value!r}; leave out what has no value")


def _reduced(parts: _Parts) -> Number | None:
    """The value of plain parts; None for a mean over nothing."""
    values = parts.values
    if parts.reduction == "last":
        return values[-1]
    if parts.reduction == "max":
        return next((v for v in values if math.isnan(v)), max(values))
    if parts.reduction == "sum":
        return _total(values)
    count = _total(parts.counts)
    return _total(values) / count if count else None


def _total(values: list[Number]) -> Number:
    if all(isinstance(value, int) for value in values):
        return sum(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # of infinities with both signs, or past the largest float
        return sum(values, 0.0)
