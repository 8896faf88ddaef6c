"""What the discriminator has made of captions and reasonings: is any of its experts really perception or reasoning?

Where its experts get their tokens from, and where it was given a routing bias or a score head for each kind of span
(``align.discriminator.routing_bias``, ``.heads``), what it has learned there.
"""

from __future__ import annotations

import re
from typing import Any

from prism_fast.report.charts import Chart
from prism_fast.report.figures import COLOURS, curve_figure
from prism_fast.report.rundir import RunDirectory, Series

_INFORMATION = "expert_span_information"
_SHARE = re.compile(r"(?P<table>experts(_top)?)_(?P<kind>[a-z]+)_(?P<expert>\d+)")
# Bits of the most specialised layer. Two kinds that differ by 10 points in two of four experts' shares are at 0.02.
_SAME, _APART = 0.05, 0.3
_KINDS = ("caption", "reasoning")
_BIAS, _COSINE = "routing_bias", "heads_cosine"
_PREFIXES = ("disc", "warmup")
_EXPORTS = {"warmup": "discriminator-warmup", "align": "discriminator"}  # where a stage's discriminator lies


def expert_charts(run: RunDirectory, stage: str) -> list[tuple[Chart, dict[str, Any]]]:
    """Shares of the experts by kind of token at the last step that logged them, and the information over the steps;
    the routing bias and the score heads of the kinds where there are any; [] where the stage logged none of it.

    Raises:
        ValueError: the exported discriminator is damaged.
    """
    record = next((r for r in reversed(run.steps.get(stage, [])) if any(map(_share, r))), None)
    charts = [] if record is None else [_shares(record)]
    names = ((_INFORMATION, "mean of layers"), (f"{_INFORMATION}_top", "most specialised layer"))
    note = "bits that the choice of an expert tells about a token: caption or reasoning? 1: no expert serves both"
    charts += _curves(run, stage, names, Chart("Experts and spans", (), note, "zero"))
    note = "root mean square over layers and experts, before the step's update; logits"
    sizes = tuple((f"{_BIAS}_{kind}", kind) for kind in _KINDS)
    charts += _curves(run, stage, sizes, Chart("Routing bias", (), note, "zero"))
    if _any(run, stage, f"{_BIAS}_{_KINDS[0]}") is not None:
        charts += _bias_by_layer(run, stage)
    charts += _curves(run, stage, ((_COSINE, "cosine"),), Chart("Two score heads", (), _heads_note(run, stage)))
    return charts


def _any(run: RunDirectory, stage: str, name: str) -> Series | None:
    """The metric, whichever stage's prefix it has."""
    found = (run.series(stage, f"{prefix}/{name}") for prefix in _PREFIXES)
    return next((series for series in found if series is not None), None)


def _curves(
    run: RunDirectory, stage: str, names: tuple[tuple[str, str], ...], chart: Chart
) -> list[tuple[Chart, dict[str, Any]]]:
    """One chart of these metrics over the steps, [] where there are none."""
    drawn = [(label, series) for name, label in names if (series := _any(run, stage, name)) is not None]
    return [(chart, curve_figure(chart, drawn))] if drawn else []


def is_expert_metric(key: str) -> bool:
    """Whether these charts stand for the metric."""
    return key.rpartition("/")[2].startswith(("expert_span_", f"{_BIAS}_", _COSINE)) or _share(key) is not None


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


def _bias_by_layer(run: RunDirectory, stage: str) -> list[tuple[Chart, dict[str, Any]]]:
    """The bias that the stage's exported discriminator has learned; [] while there is none."""
    from prism_fast.models.checkpoints import find_tensor, open_weights  # these bring transformers and torch
    from prism_fast.models.scorer import BIAS_KEY
    from prism_fast.train.expert_shares import centred

    folder = run.path / "export" / _EXPORTS.get(stage, "")
    file = find_tensor(folder, BIAS_KEY) if stage in _EXPORTS and folder.is_dir() else None
    if file is None:
        return []
    with open_weights(file) as tensors:
        bias = centred(tensors.get_tensor(BIAS_KEY))  # [layers, kinds, E]
    layers, _, experts = bias.shape
    limit = float(bias.abs().max()) or 1.0
    trace = {
        "type": "heatmap",
        "x": [f"{kind} {expert}" for kind in _KINDS for expert in range(experts)],
        "y": [f"layer {layer + 1}" for layer in range(layers)],
        "z": [[float(f"{value:.4g}") for value in row] for row in bias.flatten(1).tolist()],
        "colorscale": "RdBu",
        "zmin": -limit,
        "zmax": limit,
    }
    layer, kind, expert = (int(index) for index in (bias.abs() == bias.abs().max()).nonzero()[0])
    largest = float(bias[layer, kind, expert])
    direction = "to" if largest > 0 else "away from"
    note = (
        f"logits that the exported discriminator adds for the tokens of a kind, what all experts share left out; the "
        f"largest, {largest:+.3g} in layer {layer + 1}, sends {_KINDS[kind]} tokens {direction} expert {expert}"
    )
    return [
        (Chart("Routing bias by layer", (), note), {"data": [trace], "layout": {"yaxis": {"autorange": "reversed"}}})
    ]


def _heads_note(run: RunDirectory, stage: str) -> str:
    """What each head does by itself: held-out pairs where the stage has some, otherwise those of its last step."""
    held = _any(run, stage, f"heldout_acc_{_KINDS[0]}") is not None
    prefix, pairs = ("heldout_", "held-out pairs") if held else ("", "the last step's pairs")
    parts = ["cosine of the heads of captions and reasonings; 1: as one"]
    for kind in _KINDS:
        accuracy, margin = (_any(run, stage, f"{prefix}{name}_{kind}") for name in ("acc", "margin"))
        if accuracy is not None and margin is not None:
            on_top, by = accuracy.values[-1], margin.values[-1]
            parts.append(f"the {kind} head puts the teacher on top in {on_top:.0%} of {pairs}, by {by:.2f} on average")
    return "; ".join(parts)
