"""Figures for plotly.js as plain dictionaries: learning curves, accuracies, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_fast.report.axes import y_axis
from prism_fast.report.charts import CHARTS, SCORED, Chart, reward_parts
from prism_fast.report.rundir import RunDirectory, Series
from prism_fast.report.statistics import Interval
from prism_fast.report.summary import Summary, stage_name
from prism_fast.track.metrics import WALL_CLOCK

# Distinct with every common kind of colour blindness, and legible on white and on near-black.
COLOURS = ("#3b82d6", "#e08a1e", "#1f9e77", "#c8509b", "#8a79d6", "#8b949e")
STAGE_COLOURS = {
    "sft": COLOURS[0],
    "sft_continued": COLOURS[5],
    "rlvr_direct": COLOURS[4],
    "align": COLOURS[1],
    "rlvr": COLOURS[2],
}
_SMOOTH_FROM = 30  # points; below, the raw curve is legible by itself


@dataclass(frozen=True)
class StageCurves:
    """Charts of one stage with data: (chart, figure), and the metrics that were expected but never logged."""

    charts: tuple[tuple[Chart, dict[str, Any]], ...]
    absent: tuple[str, ...]
    extra: tuple[str, ...]  # logged, but in no chart


def stage_curves(run: RunDirectory, stage: str) -> StageCurves:
    charts, absent, asked = [], [], set()
    whole = ((run.config or {}).get("align") or {}).get("discriminate") == "response"
    unscored = SCORED[:2] if whole else SCORED[2:]
    for chart in (*CHARTS.get(stage, ()), *reward_parts(run.keys(stage))):
        expected = [(key, label) for key, label in chart.series if not key.endswith(unscored)]
        found = [(label, run.series(stage, key)) for key, label in expected]
        if not chart.optional:
            absent += [key for key, _ in expected if run.series(stage, key) is None]
        asked |= {key for key, _ in expected}
        drawn = [(label, series) for label, series in found if series is not None]
        if drawn:
            charts.append((chart, curve_figure(chart, drawn, _line_of(run, chart))))
    extra = [key for key in run.keys(stage) if key not in asked and not key.startswith((*WALL_CLOCK, "passes/"))]
    return StageCurves(tuple(charts), tuple(absent), tuple(extra))


def _line_of(run: RunDirectory, chart: Chart) -> float | None:
    if not isinstance(chart.line, str):
        return chart.line
    value: Any = run.config
    for part in chart.line.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def curve_figure(chart: Chart, drawn: Sequence[tuple[str, Series]], line: float | None = None) -> dict[str, Any]:
    """A plotly figure: raw values thin, their running mean bold where there are many; ``line``: dotted, horizontal."""
    traces = []
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "step"}}, "showlegend": len(drawn) > 1}
    if max(series.steps[-1] - series.steps[0] for _, series in drawn) < 5:
        layout["xaxis"]["dtick"] = 1  # there is no step 1.5
    layout |= y_axis(chart, [series.values for _, series in drawn], line)
    # A spike outside the axis would lift the mean of all its neighbours out of sight.
    inside = layout["yaxis"]["range"] if "annotations" in layout else None
    for index, (label, series) in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        base = {"type": "scatter", "x": list(series.steps), "name": plotly_text(label), "legendgroup": label}
        many = len(series.steps) >= _SMOOTH_FROM
        smooth = many and not chart.exact
        raw = {**base, "y": [_short(value) for value in series.values], "mode": "lines" if many else "lines+markers"}
        raw["line"] = {"color": colour, "width": 1 if smooth else 2}
        if smooth:
            raw |= {"opacity": 0.4, "showlegend": False, "hoverinfo": "skip"}
            means = [_short(value) for value in running_mean(series.values, len(series.values) // 15, inside)]
            traces += [raw, {**base, "y": means, "mode": "lines", "line": {"color": colour, "width": 2}}]
        else:
            traces.append(raw | {"marker": {"color": colour, "size": 5}})
    if line is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": line,
                "y1": line,
                "layer": "below",
                "line": {"color": COLOURS[5], "width": 1.5, "dash": "dot"},
                "label": {"text": chart.line_name, "textposition": "end", "font": {"size": 10, "color": COLOURS[5]}},
            }
        ]
    return {"data": traces, "layout": layout}


def accuracy_figure(summary: Summary) -> dict[str, Any]:
    """Accuracy per question kind after each stage: dots with 95 % intervals, stages side by side within a kind."""
    kinds = [plotly_text(kind) for kind in summary.kinds]
    traces = []
    for index, entry in enumerate(summary.stages):
        x, y, intervals, items = (
            ["all questions"],
            [entry.accuracy.mean],
            [entry.accuracy.interval],
            [entry.accuracy.items],
        )
        for kind, shown in zip(summary.kinds, kinds, strict=True):
            if kind in entry.kinds:
                x.append(shown)
                y.append(entry.kinds[kind].mean)
                intervals.append(entry.kinds[kind].interval)
                items.append(entry.kinds[kind].items)
        colour = STAGE_COLOURS.get(entry.stage, COLOURS[(index + 3) % len(COLOURS)])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plotly_text(stage_name(entry.stage)),
                "x": x,
                "y": [_short(value) for value in y],
                "customdata": items,
                "marker": {"color": colour, "size": 9},
                "error_y": _error_bars(y, intervals, colour),
                "hovertemplate": "%{x}: %{y:.1%} of %{customdata}<extra>%{fullData.name}</extra>",
            }
        )
    axis = {"tickformat": ".0%", "range": [0, 1.02]}
    categories = {"type": "category", "categoryorder": "array", "categoryarray": ["all questions", *kinds]}
    return {
        "data": traces,
        "layout": {"scattermode": "group", "scattergap": 0.35, "yaxis": axis, "xaxis": categories, "showlegend": True},
    }


def difference_figure(summary: Summary) -> dict[str, Any] | None:
    """Paired differences in percentage points with 95 % intervals against a line at zero; None where there is none."""
    rows = [
        (f"{stage_name(entry.stage)} − {stage_name(control)}", entry, value)
        for entry in summary.stages
        for control, value in entry.against.items()
    ]
    if not rows:
        return None
    rows.reverse()  # plotly counts categories upwards
    means = [100.0 * value.mean for _, _, value in rows]
    colours = [STAGE_COLOURS.get(entry.stage, COLOURS[3]) for _, entry, _ in rows]
    intervals = [
        None if value.interval is None else Interval(*(100.0 * part for part in value.interval)) for _, _, value in rows
    ]
    ends = [0.0, *means, *(end for interval in intervals if interval is not None for end in interval[1:])]
    left, right = min(ends), max(ends)
    pad = 0.04 * (right - left) or 1.0  # so that the line at zero is inside the picture, not on its border
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "showlegend": False,
            "x": [_short(mean)],
            "y": [plotly_text(label)],
            "marker": {"color": colour, "size": 10},
            "error_x": _error_bars([mean], [interval], colour),
            "hovertemplate": "%{y}: %{x:+.1f} points<extra></extra>",
        }
        for (label, _, _), mean, colour, interval in zip(rows, means, colours, intervals, strict=True)
    ]
    return {
        "data": traces,
        "layout": {
            "showlegend": False,
            "xaxis": {
                "title": {"text": "percentage points"},
                "zeroline": True,
                "zerolinewidth": 2,
                "range": [left - pad, right + pad],
            },
            "yaxis": {"automargin": True, "type": "category"},
        },
    }


def running_mean(values: Sequence[float], window: int, inside: Sequence[float] | None = None) -> list[float | None]:
    """Centred mean over ``2 * (window // 2) + 1`` values; at the borders over those that exist.

    Values that are not finite or not ``inside`` (low, high) do not count; None where none does.
    """
    low, high = inside or (-math.inf, math.inf)
    half = max(window, 1) // 2
    sums, counts = [0.0], [0]
    for value in values:
        counts_in = math.isfinite(value) and low <= value <= high
        sums.append(sums[-1] + (value if counts_in else 0.0))
        counts.append(counts[-1] + counts_in)
    out: list[float | None] = []
    for index in range(len(values)):
        first, end = max(0, index - half), min(len(values), index + half + 1)
        count = counts[end] - counts[first]
        out.append((sums[end] - sums[first]) / count if count else None)
    return out


def plotly_text(text: str) -> str:
    """Plotly draws a subset of HTML in labels; names from data must show as they are."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _error_bars(means: Sequence[float], intervals: Sequence[Interval | None], colour: str) -> dict[str, Any]:
    pairs = list(zip(means, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "color": colour,
        "thickness": 1.5,
        "width": 4,
        "array": [None if interval is None else _short(interval.high - mean) for mean, interval in pairs],
        "arrayminus": [None if interval is None else _short(mean - interval.low) for mean, interval in pairs],
    }


def _short(value: float | None) -> float | None:
    """``value`` with six digits, more than a screen shows; None, a gap, where it is not finite (JSON has no NaN)."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
