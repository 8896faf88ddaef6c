"""Charts of the discriminator's experts by kind of token: does any expert specialise in captions or reasonings?"""

from __future__ import annotations

import re
from typing import Any

from prism_fast.report.charts import Chart
from prism_fast.report.figures import COLOURS, curve_figure
from prism_fast.report.rundir import RunDirectory, Series

_INFORMATION = "expert_span_information"
_SHARE = re.compile(r"(?P<table>experts(_top)?)_(?P<kind>[a-z]+)_(?P<expert>\d+)")
# Bits of the most specialised layer. Two kinds whose shares of two of four experts differ by 10 points have 0.02.
_SAME, _APART = 0.05, 0.3
_PREFIXES = ("disc", "warmup")


def expert_charts(run: RunDirectory, stage: str) -> list[tuple[Chart, dict[str, Any]]]:
    """Shares of the experts by kind of token at the last step that logged them, and the information over the steps;
    [] where the stage logged none of it."""
    record = next((r for r in reversed(run.steps.get(stage, [])) if any(map(_share, r))), None)
    charts = [] if record is None else [_shares(record)]
    names = ((_INFORMATION, "mean of layers"), (f"{_INFORMATION}_top", "most specialised layer"))
    note = "bits that the choice of an expert tells about a token: caption or reasoning? 1: no expert serves both"
    charts += _curves(run, stage, names, Chart("Experts and spans", (), note, "zero"))
    return charts


def _any(run: RunDirectory, stage: str, name: str) -> Series | None:
    """The metric with the prefix of any stage."""
    found = (run.series(stage, f"{prefix}/{name}") for prefix in _PREFIXES)
    return next((series for series in found if series is not None), None)


def _curves(
    run: RunDirectory, stage: str, names: tuple[tuple[str, str], ...], chart: Chart
) -> list[tuple[Chart, dict[str, Any]]]:
    """One chart of these metrics over the steps, [] where there are none."""
    drawn = [(label, series) for name, label in names if (series := _any(run, stage, name)) is not None]
    return [(chart, curve_figure(chart, drawn))] if drawn else []


def is_expert_metric(key: str) -> bool:
    """Whether these charts show the metric."""
    return key.rpartition("/")[2].startswith("expert_span_") or _share(key) is not None


def _share(key: str) -> re.Match[str] | None:
    return _SHARE.fullmatch(key.rpartition("/")[2])


def _shares(record: dict[str, Any]) -> tuple[Chart, dict[str, Any]]:
    tables: dict[str, dict[str, dict[int, float]]] = {}
    values = {key.rpartition("/")[2]: value for key, value in record.items()}
    for key, value in values.items():
        found = _share(key)
        if found is not None:
            kinds = tables.setdefault(found["table"], {})
            kinds.setdefault(found["kind"], {})[int(found["expert"])] = value
    name = "experts_top" if "experts_top" in tables else "experts"
    table = tables[name]
    traces = [
        {
            "type": "bar",
            "name": kind,
            "x": [f"expert {e}" for e in shares],
            "y": [float(f"{value:.6g}") for value in shares.values()],
            "marker": {"color": COLOURS[index % len(COLOURS)]},
        }
        for index, (kind, shares) in enumerate(table.items())
    ]
    layout = {"barmode": "group", "showlegend": True, "yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    note = f"share of each kind's choices at step {record['step']}, mean over layers"
    if name == "experts_top":
        note = _sentence(record["step"], values, table)
    return Chart("Experts by kind of token", (), note), {"data": traces, "layout": layout}


def _sentence(step: int, values: dict[str, Any], table: dict[str, dict[int, float]]) -> str:
    top, mean = values[f"{_INFORMATION}_top"], values[_INFORMATION]
    layer, caption, reasoning = values["expert_span_layer_top"], table["caption"], table["reasoning"]
    expert = max(caption, key=lambda e: abs(caption[e] - reasoning[e]))
    verdict = "no expert is perception or reasoning"
    if top >= _APART:
        verdict = "experts divide captions and reasonings between them"
    elif top >= _SAME:
        verdict = "experts lean towards a span, none serves one alone"
    return (
        f"step {step}, layer {layer}, which tells the spans apart best: expert {expert} takes "
        f"{caption[expert]:.0%} of the choices of caption tokens and {reasoning[expert]:.0%} of those of reasoning "
        f"tokens; one choice tells {top:.2g} bits of 1 about the span ({mean:.2g} in the mean over layers): {verdict}"
    )
