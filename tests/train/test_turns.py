"""Rollout engine and trainers take turns: who is awake when, with which weights, by an engine that writes it down."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from prism_fast.engine.local import LocalEngine
from prism_fast.rollout.engines import ENGINES
from prism_fast.rollout.hf import HFRollout
from prism_fast.train.rollout_gap import RolloutGapError
from prism_fast.train.rollout_log import RolloutReader, dump_path
from prism_fast.train.state import StageState
from tests.train.conftest import run_small

NUMBERS = ("perf/free_generating_mib", "perf/free_training_mib", "time/wake", "time/push", "time/sleep")


class Recording(HFRollout):
    """Has weights of its own: those that were pushed."""

    log: ClassVar[list[str]] = []

    def note(self, event: str) -> None:
        self.log.append(event)

    def attach(self, policy, processor):
        super().attach(policy, processor)
        self.note("attach")

    def wake(self):
        self.note("wake")

    def sleep(self):
        self.note("sleep")

    def sync(self, weights: Iterator):
        self.pushed = {name: tensor.clone() for name, tensor in weights}
        self.note("push")

    def generate(self, *arguments, **options):
        self.note("generate")
        if "push" in self.log[len(self.log) - self.log[::-1].index("wake") :]:
            own = dict(self._policy.named_parameters())
            assert own.keys() == self.pushed.keys()
            assert all(torch.equal(own[name], tensor) for name, tensor in self.pushed.items()), "old weights"
        return super().generate(*arguments, **options)


@pytest.fixture
def log(monkeypatch):
    """The run's events in their order; ``update`` is an optimizer step, of any engine."""
    log = []
    monkeypatch.setattr(Recording, "log", log)
    monkeypatch.setitem(ENGINES, "hf", Recording)
    for name, event in (("step", "update"), ("offload", "offload"), ("reload", "reload"), ("save", "save")):
        original = getattr(LocalEngine, name)

        def noted(self, *arguments, original=original, event=event):
            log.append(event)
            return original(self, *arguments)

        monkeypatch.setattr(LocalEngine, name, noted)
    begin = StageState._begin_step

    def begun(self):
        log.append("step")
        begin(self)

    monkeypatch.setattr(StageState, "_begin_step", begun)
    return log


@pytest.fixture
def stages(small_run, finished):
    exports = finished / "export"
    policies = [f"model.policy={exports / 'sft'}", f"model.discriminator={exports / 'discriminator-warmup'}"]
    short = ["stages=[warmup,align,rlvr]", "warmup.max_updates=2", "rlvr.steps=1", "eval.limit=2"]
    return [*small_run, *policies, *short]


def turns_of(log: list[str]) -> list[str]:
    """The stretches of the log between a wake and its sleep; refuses work outside of its turn."""
    awake, turns = False, []
    for event in log:
        if event == "wake":
            assert not awake
            awake = True
            turns.append("")
        elif event == "sleep":
            awake = False
        elif event == "update":
            assert not awake, "the rollout engine is awake while weights are updated"
        elif event in ("push", "generate"):
            assert awake, f"{event} while the rollout engine sleeps"
            turns[-1] += event[0]
    assert not awake
    return turns


def test_the_generator_sleeps_while_weights_change_and_has_the_new_ones_when_it_wakes(stages, log, tmp_path):
    folder = run_small(tmp_path / "run", stages)
    turns = turns_of(log)
    assert {"g", "pg"} == set(turns), "pairs and evaluation generate from the module attached, steps from a push"
    assert turns.count("pg") == 3 and "offload" not in log
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] in ("align", "rlvr") and line["step"]]
    assert len(steps) == 3 and all(line[name] >= 0 for line in steps for name in NUMBERS)
    assert all(line["perf/free_training_mib"] > 0 for line in steps)


def test_offload_moves_the_trainers_away_before_the_generator_wakes(stages, log, tmp_path):
    settings = ["stages=[align]", "align.steps=1", "rollout.offload=true"]
    folder = run_small(tmp_path / "run", [*stages, *settings])
    step = log[log.index("step") :]
    assert step[: step.index("update")] == [
        *("step", "offload", "offload", "wake", "push", "generate", "sleep", "reload", "reload")
    ]
    plain = run_small(tmp_path / "plain", [*stages, *settings[:2]])
    for name in ("policy", "discriminator"):
        weights = [
            (of / "export" / {"policy": "align"}.get(name, name) / "model.safetensors") for of in (folder, plain)
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_failure_while_generating_leaves_everybody_in_place(stages, log, tmp_path, monkeypatch):
    def failing(self, *arguments, **options):
        raise OSError("played")

    monkeypatch.setattr(Recording, "generate", failing)
    with pytest.raises(OSError, match="played"):
        run_small(tmp_path / "run", [*stages, "stages=[align]", "rollout.offload=true"])
    assert log[-3:] == ["sleep", "reload", "reload"]


class Drifting(HFRollout):
    """Reports log-probs of other weights."""

    def generate(self, *arguments, finished=None, **options):
        groups = [
            [replace(c, logprobs=tuple(logprob - 0.1 for logprob in c.logprobs)) for c in group]
            for group in super().generate(*arguments, **options)
        ]
        for place, group in enumerate(groups if finished else ()):
            finished(place, group)
        return groups


def test_a_generator_that_drifts_ends_the_run_at_its_first_step_and_the_rollouts_stay(stages, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "hf", Drifting)
    settings = [*stages, "stages=[align]", "align.steps=1"]
    with pytest.raises(RolloutGapError, match=r"align step 1: .* by 0\.1 nats .*push.*The rollouts .* last ones in"):
        run_small(tmp_path / "run", settings)
    assert len(RolloutReader(dump_path(tmp_path / "run", "align")).step(1)) == 8
    folder = run_small(tmp_path / "open", [*settings, "rollout.gap_stop=1", "rollout.importance=truncated"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["stage"] == "align"]
    assert step["rollout/logprob_gap_mean"] == pytest.approx(0.1, abs=1e-4)
    assert step["importance/weight_mean"] == pytest.approx(math.exp(0.1), rel=1e-4)
