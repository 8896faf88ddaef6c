"""Learning rates by update, and stages whose length is said in epochs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from prism_fast.config import ConfigError, load_config
from prism_fast.engine.adamw import learning_rate
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.schedule import planned
from prism_fast.train.length import stage_length
from tests.train.conftest import run_small


def rates(config: OptimizerConfig, updates: int) -> list[float]:
    plan = planned(config, updates)
    return [learning_rate(plan["config"], plan["schedule"], t) for t in range(updates)]


@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_share": 0.11}, {}])
def test_rates_are_those_of_transformers_after_the_rise(name, theirs, warmup):
    """In its rise theirs is 0 at the first update, ours never."""
    updates, rise = 20, 3 if warmup else 0
    ours = rates(OptimizerConfig(lr=0.5, schedule=name, **warmup), updates)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = theirs(optimizer, num_warmup_steps=rise, num_training_steps=updates)
    expected = []
    for _ in range(updates):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours[rise:] == pytest.approx(expected[rise:])
    assert ours[:rise] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5][:rise])
    assert min(ours) > 0


def test_a_constant_rate_is_untouched_and_a_share_is_rounded_up():
    assert planned(OptimizerConfig(warmup_steps=4), 2) == {"config": OptimizerConfig(warmup_steps=4), "schedule": None}
    assert rates(OptimizerConfig(lr=0.4, warmup_share=0.1), 31) == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 28)


def test_a_rise_as_long_as_the_stage_is_refused():
    with pytest.raises(ValueError, match=r"rises over 5 updates.*the stage has 5"):
        planned(OptimizerConfig(warmup_steps=5, schedule="cosine"), 5)


def test_epochs_are_whole_steps_rounded_up():
    assert [stage_length(7, epochs, 48, 16) for epochs in (None, 1.0, 0.5, 1.01, 0.001)] == [7, 3, 2, 4, 1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sft.epochs=1"], "sft.epochs must be left out with sft.ends=plateau"),
        (["sft.optimizer.schedule=cosine"], "sft.optimizer.schedule must be 'constant' with sft.ends=plateau"),
        (["sft.optimizer.warmup_share=0.1"], "sft.optimizer.warmup_share must be 0 with sft.ends=plateau"),
        (
            ["rlvr.optimizer.warmup_share=0.1", "rlvr.optimizer.warmup_steps=2"],
            "rlvr.optimizer.warmup_steps must be 0 where rlvr.optimizer.warmup_share=0.1",
        ),
        (
            ["align.discriminator.optimizer.warmup_share=0.1", "align.discriminator.optimizer.warmup_steps=2"],
            "align.discriminator.optimizer.warmup_steps must be 0",
        ),
        (["align.epochs=1"], "align.epochs must be left out with sft_continued, rlvr_direct in stages"),
        (
            ["stages=[rlvr]", "rlvr.epochs=1", "rlvr.dynamic_sampling.enabled=true"],
            "rlvr.epochs must be left out with dynamic sampling",
        ),
        (["stages=[rlvr]", "rlvr.epochs=0"], "rlvr.epochs must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        load_config("digits", overrides)


def records_of(folder: Path, stage: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == stage and record["step"] > 0]


def test_sft_as_published_runs_its_epochs_along_a_cosine(small_run, tmp_path):
    published = ["sft.ends=updates", "sft.epochs=2", "sft.optimizer.schedule=cosine"]
    rise = ["sft.optimizer.warmup_steps=0", "sft.optimizer.warmup_share=0.2"]
    run_small(tmp_path / "run", [*small_run, "stages=[sft]", "eval.limit=1", *published, *rise])
    sft = records_of(tmp_path / "run", "sft")
    assert [record["sft/lr"] for record in sft] == pytest.approx(  # 48 demonstrations in batches of 16
        [4e-3 * scale for scale in (0.5, 1.0, *((1 + math.cos(math.pi * p / 4)) / 2 for p in range(4)))]
    )
    assert "sft/val_loss" in sft[-1]


def test_the_other_stages_follow_their_schedules(small_run, finished, tmp_path):
    settings = {
        "stages": "[warmup,align,rlvr]",
        "model.policy": finished / "export" / "sft",
        "eval.limit": 1,
        "warmup.max_updates": 4,
        "align.epochs": 0.08,  # 48 tasks, 2 in a step
        "rlvr.epochs": 1,  # 8 tasks, 2 in a step
        **{f"{name}.optimizer.schedule": "linear" for name in ("warmup", "align", "align.discriminator", "rlvr")},
        **{f"{name}.optimizer.lr": 1e-3 for name in ("warmup", "align", "align.discriminator", "rlvr")},
    }
    run_small(tmp_path / "run", [*small_run, *(f"{key}={value}" for key, value in settings.items())])
    rates = {
        (stage, metric): [r.get(metric) for r in records_of(tmp_path / "run", stage)]
        for stage, metric in [
            ("warmup", "warmup/lr"),
            ("align", "disc/lr"),
            ("align", "policy/lr"),
            ("rlvr", "policy/lr"),
        ]
    }
    assert rates["warmup", "warmup/lr"] == pytest.approx([1e-3, 0.75e-3])  # evaluated at 2: the margin is reached
    for where in (("align", "disc/lr"), ("align", "policy/lr")):
        assert rates[where] == pytest.approx([1e-3, 0.5e-3]), where
    assert len(rates["rlvr", "policy/lr"]) == 4
    made = [rate for rate in rates["rlvr", "policy/lr"] if rate is not None]  # none where no response had an advantage
    assert len(made) >= 2 and made == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3][: len(made)])
