"""The report's answer to whether an expert serves a kind of span, and what was learned for each kind."""

from __future__ import annotations

import pytest

from prism_fast.report.experts import expert_charts
from prism_fast.report.html import write_report
from prism_fast.report.rundir import read_run
from tests.report.page import figures, parse
from tests.report.synthetic import append_lines, write_run

TITLES = ("Experts by kind of token", "Experts and spans")


def shares(prefix: str, **kinds: list[float]) -> dict[str, float]:
    return {f"{prefix}_{kind}_{e}": share for kind, row in kinds.items() for e, share in enumerate(row)}


def logged(bits: float) -> dict[str, float]:
    """Of two experts; the values of the mean differ from those of the layer."""
    return {
        **shares("disc/experts", prompt=[0.5, 0.5], caption=[0.55, 0.45], reasoning=[0.5, 0.5]),
        **shares("disc/experts_top", prompt=[0.5, 0.5], caption=[0.25, 0.75], reasoning=[0.625, 0.375]),
        "disc/expert_span_information": bits / 4,
        "disc/expert_span_information_top": bits,
        "disc/expert_span_layer_top": 3,
    }


def titles(page) -> list[str]:
    return [caption.one("b").text for caption in page.all("figcaption") if caption.all("b")]


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run", stages=["sft", "align"], items=24, steps=3, rollouts=False)


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [
        (0.01, "no expert is perception or reasoning"),
        (0.1, "experts lean towards a span"),
        (0.9, "experts divide captions and reasonings between them"),
    ],
)
def test_shares_information_and_a_sentence(run_dir, bits, verdict):
    steps = [{"stage": "align", "step": 4, **logged(bits / 2)}, {"stage": "align", "step": 5, **logged(bits)}]
    append_lines(run_dir / "metrics.jsonl", steps)
    page = parse(write_report(run_dir).read_text(encoding="utf-8"))
    assert all(title in titles(page) for title in TITLES)
    note = next(c.text for c in page.all("figcaption") if TITLES[0] in c.text)
    assert "step 5, layer 3" in note and verdict in note
    assert "expert 0 takes 25% of the choices of caption tokens and 62% of those of reasoning tokens" in note
    bars, curve = [figure for _, figure in expert_charts(read_run(run_dir), "align")]
    assert {trace["name"]: trace["y"] for trace in bars["data"]} == {
        "prompt": [0.5, 0.5],
        "caption": [0.25, 0.75],
        "reasoning": [0.625, 0.375],
    }
    assert [trace["y"] for trace in curve["data"]] == [[bits / 8, bits / 4], [bits / 2, bits]]
    assert bars in figures(page).values() and curve in figures(page).values()
    assert "disc/expert" not in "".join(note.text for note in page.all("p", css="note"))


def test_whole_responses_have_shares_alone(run_dir):
    values = shares("warmup/experts", prompt=[0.5, 0.5], response=[0.25, 0.75])
    append_lines(run_dir / "metrics.jsonl", [{"stage": "warmup", "step": 1, **values}])
    ((chart, figure),) = expert_charts(read_run(run_dir), "warmup")
    assert [trace["name"] for trace in figure["data"]] == ["prompt", "response"] and "mean over layers" in chart.note


def test_many_experts_have_the_information_alone(run_dir):
    values = {key: value for key, value in logged(0.2).items() if "span" in key}
    append_lines(run_dir / "metrics.jsonl", [{"stage": "align", "step": 4, **values}])
    assert [chart.title for chart, _ in expert_charts(read_run(run_dir), "align")] == [TITLES[1]]


def test_a_run_that_logged_none_shows_none(run_dir):
    page = parse(write_report(run_dir).read_text(encoding="utf-8"))
    assert not any(title in titles(page) for title in TITLES) and expert_charts(read_run(run_dir), "align") == []
