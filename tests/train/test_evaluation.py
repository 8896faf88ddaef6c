"""Several answers per item, evaluation inside a stage, the best policy and an early end."""

from __future__ import annotations

import itertools
import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.config import ConfigError, load_config
from prism_fast.track.metrics import reproducible
from prism_fast.train.evaluate import pass_at
from prism_fast.train.pipeline import run_eval, run_stages
from prism_fast.train.progress import Progress
from tests.train.conftest import run_small


@pytest.mark.parametrize(("k", "n", "right"), [(1, 4, 1), (2, 5, 2), (3, 5, 0), (4, 4, 1), (2, 4, 4)])
def test_pass_at_k_counts_draws(k, n, right):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def lines(folder: Path, stage: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records if record["stage"] == stage and record.get("step")]


@pytest.fixture(scope="module")
def start(finished) -> Path:
    return finished / "export" / "sft"


def test_several_answers_per_item(small_run, start, tmp_path):
    settings = ["eval.samples=4", "eval.temperature=1.2", "eval.top_p=0.9", "eval.limit=10", "stages=[]"]
    folder = tmp_path / "eval"
    settings += [f"model.policy={start}", f"out={folder}"]
    accuracy = run_eval(load_config("digits", [*small_run, *settings]), Console(quiet=True))
    items = [json.loads(line) for line in (folder / "evals" / "eval.jsonl").read_text().splitlines()]
    (found,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert len(items) == 10 and all(item["samples"] == 4 == len(item["texts"]) for item in items)
    assert any(len(set(item["texts"])) > 1 for item in items)
    assert accuracy == found["eval/accuracy"] == pytest.approx(sum(item["right"] for item in items) / 40)
    assert found["eval/pass@1"] == pytest.approx(accuracy)
    assert found["eval/pass@4"] == pytest.approx(sum(item["right"] > 0 for item in items) / 10)
    assert found["eval/pass@1"] <= found["eval/pass@2"] <= found["eval/pass@4"]


@pytest.mark.timeout(600)
def test_a_stage_ends_early_keeps_its_best_and_resumes_to_the_bit(small_run, start, tmp_path):
    """With almost no learning rate no evaluation is better than the first."""
    settings = ["stages=[rlvr]", "eval.limit=6", f"model.policy={start}", "rlvr.steps=9", "rlvr.optimizer.lr=1e-12"]
    settings += ["eval.every=1", "eval.keep_best=true", "eval.patience=2", "checkpoint_every=1", "keep_checkpoints=9"]
    whole = run_small(tmp_path / "whole", [*small_run, *settings])
    steps = lines(whole, "rlvr")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(0 <= step["eval/accuracy"] <= step["eval/best"] and step["eval/best_step"] == 1 for step in steps)
    best = load_file(whole / "export" / "rlvr-best" / "model.safetensors")
    saved = load_file(whole / "checkpoints" / "rlvr-000001" / "policy" / "engine.safetensors")
    assert all(torch.equal(weight, saved[f"model.{name}"]) for name, weight in best.items())

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / "checkpoints" / f"rlvr-{step:06d}")
    record = json.loads((cut / "record.json").read_text())
    (cut / "record.json").write_text(json.dumps(record | {"completed": [], "policy": str(start)}))
    run_stages(load_config(str(cut / "config.yaml"), [f"out={cut}"]), Console(quiet=True), resume=True)
    assert lines(cut, "rlvr") == steps and not list((cut / "evals").glob("*.chunks"))


def test_sets_are_told_apart_by_their_source(small_run, start, tmp_path):
    from prism_fast.train import evaluate

    records = [
        {"kind": "sum", "source": source, "correct": correct, "format": 1, "length": 3}
        for source, correct in (("a", 1), ("a", 0), ("b", 1))
    ]
    found = evaluate._metrics(records, [], 1)
    assert (found["eval/accuracy_on/a"], found["eval/accuracy_on/b"]) == (0.5, 1.0)
    assert not [name for name in evaluate._metrics(records[:2], [], 1) if "accuracy_on" in name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.samples=2"], "eval.samples must be 1 with eval.temperature=0"),
        (["eval.top_p=0.7"], "eval.top_p must be left out with eval.temperature=0"),
        (["eval.top_k=7"], "eval.top_k must be left out with eval.temperature=0"),
        (["eval.keep_best=true"], "eval.keep_best must be left out without eval.every"),
        (["eval.patience=2"], "eval.patience must be left out without eval.every"),
        (["eval.top_p=0", "eval.temperature=1"], "eval.top_p must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config("digits", overrides)


def test_a_log_file_tells_the_time_that_is_spent_and_left(monkeypatch):
    now = iter([0.0, 30.0, 60.0, 90.0, 120.0])
    monkeypatch.setattr("prism_fast.train.progress.time.monotonic", lambda: next(now))
    out = StringIO()
    progress = Progress(Console(file=out, width=200))
    with progress, progress.bar("rlvr", 6, done=2) as bar:  # resumed behind the second
        for _ in range(4):
            bar.advance(acc=0.5)
    shown = out.getvalue().splitlines()
    assert "rlvr 3/6  after 0:00:30, 0:01:30 left  acc 0.5" in shown[0]
    assert "rlvr 6/6  after 0:02:00  acc 0.5" in shown[3]
