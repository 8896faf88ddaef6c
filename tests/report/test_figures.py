"""Axes and smoothing of learning curves."""

from __future__ import annotations

import math

import pytest

from prism_fast.report.charts import CHARTS, Chart
from prism_fast.report.figures import curve_figure, running_mean
from prism_fast.report.rundir import Series

LOSS = Chart("Loss", (("x", "loss"),))


def draw(values: list[float], chart: Chart = LOSS, line: float | None = None) -> dict:
    return curve_figure(chart, [("loss", Series(tuple(range(1, len(values) + 1)), tuple(values)))], line)


def test_a_steep_start_does_not_flatten_the_rest() -> None:
    """From 8 to 0.5 within 50 steps, then slowly to 0.4."""
    loss = [0.5 + 7.5 * math.exp(-step / 10) for step in range(50)] + [0.5 - 0.1 * step / 950 for step in range(950)]
    figure = draw(loss)
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 0.4 and 0.55 < high < 1.0
    (note,) = figure["layout"]["annotations"]
    above = sum(value > high for value in loss)
    assert note["text"] == f"{above} above, up to 8 (double-click)" and above < 50
    assert max(figure["data"][0]["y"]) == 8.0, "outliers stay in the figure, for whoever zooms out"


def test_a_spike_outside_the_axis_does_not_lift_its_neighbours_mean() -> None:
    values = [1.0] * 150 + [900.0] + [1.0 + step % 2 for step in range(149)]
    raw, mean = draw(values)["data"]
    assert raw["y"][150] == 900.0 and 1.0 <= min(mean["y"]) and max(mean["y"]) < 2.0
    assert running_mean([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert running_mean([5.0, 6.0, 1.0, 2.0], 1, (0.0, 3.0)) == [None, None, 1.0, 2.0]


@pytest.mark.parametrize("scale", ["free", "zero"])
def test_single_spikes_are_outside_and_counted(scale: str) -> None:
    values = [1.0 + 0.1 * math.sin(step) for step in range(100)]
    values[30], values[60] = 500.0, -70.0
    figure = draw(values, Chart("Gradient norm", (), scale=scale))
    low, high = figure["layout"]["yaxis"]["range"]
    assert (low == 0 if scale == "zero" else 0.8 < low < 0.9) and 1.1 < high < 1.2
    assert figure["layout"]["annotations"][0]["text"] == "1 above, up to 500; 1 below, down to -70 (double-click)"


def test_an_axis_without_outliers_is_left_alone() -> None:
    for values in ([float(step % 7) for step in range(90)], [3.0, 1.0, 0.5], [0.0] * 60 + [1.0], [0.3] * 40):
        assert "annotations" not in draw(values)["layout"], values
    with_target = draw([0.001 * step for step in range(90)] + [0.5], line=1.0)["layout"]
    assert "annotations" not in with_target, "the line at 1.0 must be seen, so 0.5 is too"


def test_schedules_are_drawn_as_logged() -> None:
    """A warm-up from 0 begins at 0, and the decay is no outlier."""
    rates = [1e-3 * step / 20 for step in range(20)] + [1e-3] * 480
    chart = next(chart for chart in CHARTS["sft"] if chart.title == "Learning rate")
    (trace,) = draw(rates, chart)["data"]
    assert trace["y"] == pytest.approx(rates) and "range" not in draw(rates, chart)["layout"]["yaxis"]
    smoothed = draw(rates)["data"]
    assert len(smoothed) == 2 and smoothed[1]["y"][0] > 0
    schedules = {key for charts in CHARTS.values() for chart in charts if chart.exact for key, _ in chart.series}
    rates_drawn = {key for charts in CHARTS.values() for chart in charts for key, _ in chart.series if "/lr" in key}
    assert schedules == rates_drawn == {"sft/lr", "policy/lr", "warmup/lr", "disc/lr"}


def test_curves_name_their_axis() -> None:
    assert draw([1.0, 2.0])["layout"]["xaxis"] == {"title": {"text": "step"}, "dtick": 1}
    assert draw([1.0] * 6)["layout"]["xaxis"] == {"title": {"text": "step"}}
