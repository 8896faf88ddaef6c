"""The report's answer to whether an expert serves a kind of span, and what was learned for each kind."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

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


def test_a_routing_bias_and_two_heads_are_shown(run_dir):
    bias = torch.zeros(2, 2, 2)  # layers, kinds, experts
    bias[1, 0] = torch.tensor([-1.0, 2.0])  # what they share, 0.5, is left out
    bias[0, 1] = torch.tensor([3.0, 3.0])
    folder = run_dir / "export" / "discriminator"
    folder.mkdir(parents=True)
    save_file({"routing_bias": bias}, folder / "model.safetensors")
    steps = []
    for step, (size, cosine) in enumerate([(0.0, 1.0), (0.25, 0.9)], start=4):
        values = {
            "disc/routing_bias_caption": size,
            "disc/routing_bias_reasoning": 2 * size,
            "disc/heads_cosine": cosine,
        }
        values |= {"disc/acc_caption": 0.75, "disc/margin_caption": 0.5}  # no reasoning differed at these steps
        steps.append({"stage": "align", "step": step, **values})
    append_lines(run_dir / "metrics.jsonl", steps)
    page = parse(write_report(run_dir).read_text(encoding="utf-8"))
    found = {chart.title: (chart.note, figure) for chart, figure in expert_charts(read_run(run_dir), "align")}
    assert list(found) == ["Routing bias", "Routing bias by layer", "Two score heads"]
    assert all(title in titles(page) for title in found)
    assert all(figure in figures(page).values() for _, figure in found.values())
    assert [trace["y"] for trace in found["Routing bias"][1]["data"]] == [[0.0, 0.25], [0.0, 0.5]]
    note, figure = found["Routing bias by layer"]
    (heat,) = figure["data"]
    assert heat["z"] == [[0.0, 0.0, 0.0, 0.0], [-1.5, 1.5, 0.0, 0.0]] and heat["zmax"] == 1.5 == -heat["zmin"]
    assert heat["x"] == ["caption 0", "caption 1", "reasoning 0", "reasoning 1"] and heat["y"] == ["layer 1", "layer 2"]
    assert "-1.5 in layer 2, sends caption tokens away from expert 0" in note
    note, figure = found["Two score heads"]
    assert figure["data"][0]["y"] == [1.0, 0.9]
    assert "the caption head puts the teacher on top in 75% of the last step's pairs, by 0.50 on average" in note
    assert "the reasoning head" in note, "of the last step that had such pairs"
    assert not any("routing_bias" in text.text or "heads_cosine" in text.text for text in page.all("p", css="note"))


def test_a_warm_ups_heads_are_judged_by_held_out_pairs(run_dir):
    values = {"warmup/heads_cosine": 0.5, "warmup/acc_caption": 0.1, "warmup/margin_caption": -1.0}
    values |= {"warmup/heldout_acc_caption": 0.875, "warmup/heldout_margin_caption": 1.25}
    append_lines(run_dir / "metrics.jsonl", [{"stage": "warmup", "step": 1, **values}])
    ((chart, _),) = expert_charts(read_run(run_dir), "warmup")
    assert "the caption head puts the teacher on top in 88% of held-out pairs, by 1.25 on average" in chart.note
    assert "reasoning head puts" not in chart.note


def test_a_bias_without_an_export_yet_has_its_size_alone(run_dir):
    values = {"warmup/routing_bias_caption": 0.5, "warmup/routing_bias_reasoning": 0.25}
    append_lines(run_dir / "metrics.jsonl", [{"stage": "warmup", "step": 1, **values}])
    assert [chart.title for chart, _ in expert_charts(read_run(run_dir), "warmup")] == ["Routing bias"]
