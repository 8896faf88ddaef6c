"""The y axes of learning curves: over the bulk of the values, with a note of the outliers that they leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_fast.report.charts import Chart

_WIDE = 2.0  # an axis over all values that is so many times longer than one over their bulk leaves outliers out


def y_axis(chart: Chart, curves: Sequence[Sequence[float]], line: float | None) -> dict[str, Any]:
    """``yaxis`` of a plotly layout for curves that are not all empty, and ``annotations`` where values lie outside it.

    A double-click on the chart shows the whole range. ``line``: a value that the axis holds in any case.
    """
    finite = [kept for values in curves if (kept := [value for value in values if math.isfinite(value)])]
    if not finite:
        return {"yaxis": {}}
    every = [value for values in finite for value in values]
    low, high = min(every), max(every)
    if chart.scale == "share":
        return {"yaxis": {"range": [-0.02, 1.02], "tickformat": ".0%"}}
    if chart.scale == "log" and low > 0:
        return {"yaxis": {"type": "log", "dtick": 1, "exponentformat": "power"}}
    axis: dict[str, Any] = {"exponentformat": "power" if high < 1e-3 else "none"}
    if chart.scale == "percent":
        axis = {"tickformat": ".1~%"}
    if low == high:  # plotly would draw a constant on an axis from -1 to 1, however small it is
        return {"yaxis": axis | {"range": [min(0.0, 1.3 * low), max(0.0, 1.3 * high)] if low else [0.0, 1.0]}}
    if chart.scale in ("free", "zero") and not chart.exact:
        held = [0.0] * (chart.scale == "zero") + [line] * (line is not None)
        ends = [end for values in finite for end in _bulk(values)] + held
        bulk = max(ends) - min(ends)
        if 0 < _WIDE * bulk < max(high, *ends) - min(low, *ends):
            pad = 0.05 * bulk
            shown = (min(ends) - (pad if min(ends) else 0.0), max(ends) + pad)
            return {"yaxis": axis | {"range": list(shown)}, "annotations": [_outside(every, *shown)]}
    return {"yaxis": axis if chart.scale == "free" else axis | {"rangemode": "tozero"}}


def _bulk(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the values without those beyond three quartile distances from the quartiles (Tukey's far outliers), of
    which at most a twentieth is left out at either end."""
    few, first, third, most = np.quantile(values, [0.05, 0.25, 0.75, 0.95])
    reach = 3.0 * (third - first)
    inside = [value for value in values if first - reach <= value <= third + reach]
    return min(float(few), *inside), max(float(most), *inside)


def _outside(values: Sequence[float], low: float, high: float) -> dict[str, Any]:
    """The note of values outside the axis."""
    above, below = [v for v in values if v > high], [v for v in values if v < low]
    notes = [f"{len(above)} above, up to {max(above):.3g}"] if above else []
    notes += [f"{len(below)} below, down to {min(below):.3g}"] if below else []
    place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "top"}
    return {"text": f"{'; '.join(notes)} (double-click)", "showarrow": False, "font": {"size": 10}, **place}
