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

    A value is an int, a float or a 0-d tensor on any device. A tensor is copied at once, so later writes to it do not
    change the metric; the host waits for no device before :meth:`read`. Sums are rounded once, so micro-batches give
    the same bits in any order and on any number of ranks.
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def sum(self, name: str, value: Number | Tensor) -> None:
        """Values add up. Integers stay integers."""
        self._add(name, "sum", value)

    def mean(self, name: str, total: Number | Tensor, count: Number | Tensor = 1) -> None:
        """Reduced to sum(totals) / sum(counts), a float; absent where the counts sum to 0."""
        self._add(name, "mean", total, count)

    def max(self, name: str, value: Number | Tensor) -> None:
        """The largest value. NaN is larger than any."""
        self._add(name, "max", value)

    def last(self, name: str, value: Number | Tensor) -> None:
        """The newest value; over ranks that of the last rank which has one."""
        self._add(name, "last", value)

    def __or__(self, other: Metrics) -> Metrics:
        """All values of both, those of ``other`` last; names keep the order in which they came first.

        Raises:
            ValueError: a name has one reduction here and another one there.
        """
        both = Metrics()
        for metrics in (self, other):
            for name, series in metrics._series.items():
                joined = both._of(name, series.reduction)
                joined.values += series.values
                joined.counts += series.counts
        return both

    def only(self, *prefixes: str) -> Metrics:
        """The metrics whose name begins with one of ``prefixes``."""
        some = Metrics()
        some._series = {name: series for name, series in self._series.items() if name.startswith(prefixes)}
        return some

    def read(self, gather: Callable[[list[Row]], Iterable[list[Row]]] | None = None) -> dict[str, Number]:
        """The reduced values by name, without names that have no value. One transfer for all tensors of a device.

        Args:
            gather: on several ranks, returns the :meth:`state` of every rank, in the order of the ranks. Names may
                differ between ranks.
        """
        state = self.state()
        joined = Metrics.joined([state] if gather is None else gather(state))
        reduced = {name: _reduced(series) for name, series in joined._series.items()}
        return {name: value for name, value in reduced.items() if value is not None}

    def state(self) -> list[Row]:
        """All values so far as plain numbers, for other ranks and for checkpoints."""
        values = [value for series in self._series.values() for value in (*series.values, *series.counts)]
        tensors: dict[torch.device, list[Tensor]] = {}
        for value in values:
            if isinstance(value, _OnDevice):
                tensors.setdefault(value.copy.device, []).append(value.copy)
        read = {device: iter(torch.stack(copies).tolist()) for device, copies in tensors.items()}

        def plain(value: Number | _OnDevice) -> Number:
            if not isinstance(value, _OnDevice):
                return value
            number = next(read[value.copy.device])
            return int(number) if value.whole else number

        return [
            (name, series.reduction, [plain(v) for v in series.values], [plain(c) for c in series.counts])
            for name, series in self._series.items()
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
                series = metrics._of(name, reduction)
                series.values += values
                series.counts += counts
        return metrics

    def _add(self, name: str, reduction: str, value: Number | Tensor, *counts: Number | Tensor) -> None:
        values = [_checked(name, v) for v in (value, *counts)]  # both are checked before either is added
        series = self._of(name, reduction)
        series.values.append(values[0])
        series.counts += values[1:]

    def _of(self, name: str, reduction: str) -> _Series:
        series = self._series.setdefault(name, _Series(reduction))
        if series.reduction != reduction:
            raise ValueError(
                f"metric {name!r} is reduced by {series.reduction} in one place and by {reduction} in another; "
                "give it one reduction or two names"
            )
        return series


def reproducible(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line that are the same bits for the same seed on one machine."""
    return {name: value for name, value in line.items() if not name.startswith(WALL_CLOCK)}


class _Series:
    """All values of one name, not reduced yet."""

    def __init__(self, reduction: str):
        self.reduction = reduction
        self.values: list[Number | _OnDevice] = []
        self.counts: list[Number | _OnDevice] = []  # of a mean, one for each value


class _OnDevice:
    """A copy of a 0-d tensor in float64, and whether it was a whole number."""

    def __init__(self, value: Tensor):
        self.copy = value.detach().to(torch.float64, copy=True)
        self.whole = not value.is_floating_point()


def _checked(name: str, value: Number | Tensor) -> Number | _OnDevice:
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


def _reduced(series: _Series) -> Number | None:
    """The reduced value of plain numbers; None for a mean over nothing."""
    values = series.values
    if series.reduction == "last":
        return values[-1]
    if series.reduction == "max":
        return next((v for v in values if math.isnan(v)), max(values))
    if series.reduction == "sum":
        return _total(values)
    count = _total(series.counts)
    return _total(values) / count if count else None


def _total(values: list[Number]) -> Number:
    if all(isinstance(value, int) for value in values):
        return sum(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # of infinities with both signs, or past the largest float
        return sum(values, 0.0)
