"""RLVR with every loss, dynamic sampling and overlong shaping on a very small policy; what a dump holds; resume."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.algorithms.presets import PRESETS
from prism_fast.config import load_config
from prism_fast.engine.finite import NonFiniteError
from prism_fast.report.figures import stage_curves
from prism_fast.report.rundir import read_run
from prism_fast.rewards import AnswerChecker, Reward
from prism_fast.track.metrics import reproducible
from prism_fast.train.pipeline import run_stages
from prism_fast.train.policy_trainer import PolicyTrainer
from prism_fast.train.rlvr import mini_batches
from prism_fast.train.rollout_log import RolloutReader, dump_path
from prism_fast.train.rollouts import RolloutSource, StepRollouts
from prism_fast.train.signals import Stopped
from tests.train.conftest import SMALL, run_small

DYNAMIC = ["rlvr.dynamic_sampling.enabled=true", "rlvr.prompts=3"]


@pytest.fixture(scope="session")
def rlvr_only(small_data, finished) -> list[str]:
    """RLVR alone, from the small run's SFT policy, every step dumped."""
    start = ["stages=[rlvr]", f"model.policy={finished / 'export/sft'}", "data.eval=null", "dump_rollouts_every=1"]
    return [*small_data, *SMALL, *start]


def _steps(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records if record["stage"] == "rlvr"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "rlvr" / "model.safetensors")


def _dump(folder: Path, step: int) -> list[dict]:
    return RolloutReader(dump_path(folder, "rlvr")).step(step)


def _trained(records: list[dict]) -> list[list[dict]]:
    """Records of the groups that were trained on, by group."""
    groups: dict[int, list[dict]] = {}
    for record in records:
        if record.get("advantage") is not None:
            groups.setdefault(record["group"], []).append(record)
    return list(groups.values())


LONG = ("prism", "grpo", "bnpo", "sapo")  # no step of their own beside dapo, gspo, dr_grpo and cispo


@pytest.mark.parametrize("loss", [pytest.param(p, marks=pytest.mark.long) if p in LONG else p for p in PRESETS])
def test_every_loss_takes_two_real_steps(loss, rlvr_only, finished, tmp_path):
    settings = [f"rlvr.loss={loss}", "rlvr.updates_per_step=2", *DYNAMIC]
    run = run_small(tmp_path / "run", [*rlvr_only, *settings])
    first, second = _steps(run)
    for step in (first, second):
        assert step["policy/grad_norm"] > 0 and step["advantage/zero_groups"] == 0
    # The second update of a step sees rollouts of the weights before the first one.
    assert first["policy/ratio_max"] > 1.001
    if loss == "gspo":
        assert first["policy/clip_fraction"] > 0, "a range of 4e-4 is left by one update"
    before, after = load_file(finished / "export" / "sft" / "model.safetensors"), _weights(run)
    assert all(after[name].isfinite().all() for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for group in _trained(_dump(run, 1)):
        reward = torch.tensor([r["reward"]["score"] for r in group], dtype=torch.float64)
        wanted = reward - reward.mean()
        if loss != "dr_grpo":
            wanted = wanted / (reward.std() + 1e-6)
        torch.testing.assert_close(torch.tensor([r["advantage"] for r in group]).double(), wanted, rtol=1e-5, atol=1e-6)


def by_letters(self, judged) -> list[Reward]:
    """Rewards that differ wherever texts do: most groups are useful, whatever the policy has learnt."""
    return [Reward(0.1 * (sum(map(ord, item.text)) % 9), 0.0, 1.0, "letters") for item in judged]


@pytest.fixture(scope="session")
def dynamic_run(rlvr_only, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic") / "run"
    settings = [*DYNAMIC, "rlvr.steps=4", "rlvr.loss=dapo", "rlvr.overlong_buffer=40", "checkpoint_every=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerChecker, "score", by_letters)
        return run_small(folder, [*rlvr_only, *settings, "keep_checkpoints=4"])


def test_the_dump_holds_every_generated_group_and_the_kept_ones_again(dynamic_run):
    steps, seen = _steps(dynamic_run), set()
    assert any(step["sampling/banked"] for step in steps) and any(step["sampling/age_max"] for step in steps)
    for number, step in enumerate(steps, start=1):
        records = _dump(dynamic_run, number)
        origins = {tuple(r["sampled"].values()) for r in records}
        new = {origin for origin in origins if origin[0] == number}
        assert len(new) == step["sampling/generated"]
        assert origins - new <= seen, "a kept group was generated before"
        trained = _trained(records)
        assert len(trained) == 3 - step["sampling/missing"]
        ages = [number - group[0]["sampled"]["step"] for group in trained]
        assert step["sampling/age_max"] == max(ages) and sorted(ages, reverse=True) == ages
        assert ("policy/ratio_max" in step) == (max(ages) > 0)
        seen |= new


def test_the_report_draws_what_dynamic_sampling_wrote_and_misses_nothing_elsewhere(dynamic_run, finished):
    drawn, plain = (stage_curves(read_run(folder), "rlvr") for folder in (dynamic_run, finished))
    assert not [key for key in drawn.extra if key.startswith(("sampling/", "reward/"))]
    titles, others = ({chart.title for chart, _ in curves.charts} for curves in (drawn, plain))
    dynamic = {"Groups sampled", "Useful groups", "Rounds of generation", "Age of groups", "Clipped tokens"}
    assert dynamic | {"Overlong penalty"} <= titles and not dynamic & others
    assert not [key for key in plain.absent if key.startswith("sampling/")]


def test_the_advantage_is_that_of_the_shaped_reward(dynamic_run):
    penalties = []
    for number in range(1, 5):
        for group in _trained(_dump(dynamic_run, number)):
            length = torch.tensor([len(r["token_ids"]) for r in group], dtype=torch.float64)
            penalty = -(length - (72 - 40)).clamp(min=0) / 40
            reward = torch.tensor([r["reward"]["score"] for r in group]) + penalty
            wanted = (reward - reward.mean()) / (reward.std() + 1e-6)
            found = torch.tensor([r["advantage"] for r in group], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            penalties += penalty.tolist()
    assert min(penalties) < 0
    first = _steps(dynamic_run)[0]
    generated = [r for r in _dump(dynamic_run, 1)]
    penalty = [-max(0, len(r["token_ids"]) - 32) / 40 for r in generated]
    assert first["reward/overlong_penalty"] == pytest.approx(sum(penalty) / len(penalty), rel=1e-5)
    assert first["reward/overlong_share"] == pytest.approx(sum(p < 0 for p in penalty) / len(penalty), rel=1e-5)
    assert first["reward/mean"] == pytest.approx(sum(r["reward"]["score"] for r in generated) / len(generated))


@pytest.mark.parametrize("which", [0, pytest.param(-1, marks=pytest.mark.long)])
def test_a_resumed_run_goes_on_to_the_bit_with_its_kept_groups(dynamic_run, tmp_path, monkeypatch, which):
    monkeypatch.setattr(AnswerChecker, "score", by_letters)
    at = [step["step"] for step in _steps(dynamic_run)[:3] if step["sampling/banked"]][which]
    folder = tmp_path / "run"
    shutil.copytree(dynamic_run, folder)
    for number in range(at + 1, 5):
        shutil.rmtree(folder / "checkpoints" / f"rlvr-{number:06d}")
    shutil.rmtree(folder / "export")
    (folder / "record.json").unlink()
    run_stages(load_config(str(folder / "config.yaml"), [f"out={folder}"]), Console(quiet=True), resume=True)
    assert _steps(folder) == _steps(dynamic_run)
    ours, theirs = _weights(folder), _weights(dynamic_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert dump_path(folder, "rlvr").read_bytes() == dump_path(dynamic_run, "rlvr").read_bytes()


def test_a_stop_while_generating_loses_only_that_step_and_no_kept_group(dynamic_run, tmp_path, monkeypatch):
    monkeypatch.setattr(AnswerChecker, "score", by_letters)
    folder = tmp_path / "run"
    config = load_config(str(dynamic_run / "config.yaml"), [f"out={folder}", "checkpoint_every=100"])
    steps, generate = _steps(dynamic_run), RolloutSource._generate
    last = next(r["step"] for r, s in pairwise(steps) if r["sampling/banked"] and s["sampling/generated"])

    def stopped(self, prompts, origins, complete):
        self.run.stop.requested = origins[0].step == last + 1
        return generate(self, prompts, origins, complete)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"rlvr step {last + 1}, while generating"):
        patch.setattr(RolloutSource, "_generate", stopped)
        run_stages(config, Console(quiet=True))
    assert _steps(folder) == steps[:last]
    run_stages(config, Console(quiet=True), resume=True)
    assert _steps(folder) == _steps(dynamic_run)
    assert dump_path(folder, "rlvr").read_bytes() == dump_path(dynamic_run, "rlvr").read_bytes()


@pytest.mark.parametrize("score", [0.9, 1 / 3])
def test_equal_fractional_rewards_teach_nothing(score, rlvr_only, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(AnswerChecker, "score", lambda self, judged: [Reward(score, 1.0, 0.0, "number")] * len(judged))
    run = run_small(tmp_path / "run", [*rlvr_only, "rlvr.steps=1"])
    (step,) = _steps(run)
    assert step["advantage/zero_groups"] == 2 and step["policy/rows"] == 0 and "policy/grad_norm" not in step
    before, after = load_file(finished / "export" / "sft" / "model.safetensors"), _weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_that_is_not_finite_leaves_its_rollouts(rlvr_only, tmp_path, monkeypatch):
    accumulate = PolicyTrainer.accumulate

    def poisoned(trainer, batch):
        if trainer.engine.updates == 1:
            trainer.policy.lm_head.weight.data[3, 5] = torch.nan
        return accumulate(trainer, batch)

    monkeypatch.setattr(PolicyTrainer, "accumulate", poisoned)
    folder = tmp_path / "run"
    settings = [*DYNAMIC, "rlvr.steps=4", "dump_rollouts_every=100"]
    with pytest.raises(NonFiniteError, match=r"rlvr step 2.*last ones in .*rlvr\.jsonl\.zst"):
        run_small(folder, [*rlvr_only, *settings])
    records = _dump(folder, 2)  # not due: neither the first nor the last step
    assert {len(group) for group in _trained(records)} == {4} and len(_trained(records)) == 3
    for record in records:
        assert len(record["token_ids"]) == len(record["logprobs"]) == record["tokens"] > 0
    assert len(_steps(folder)) == 1


def test_mini_batches_share_the_groups_out_and_know_what_is_off_policy():
    def group(step: int):
        return SimpleNamespace(
            prompt=object(), completions=["a", "b"], origin=SimpleNamespace(step=step), splits=[], rewards=[]
        )

    rollouts = StepRollouts([group(step) for step in (6, 6, 7, 7, 7)])
    advantage = torch.arange(10.0)
    (whole,) = mini_batches(rollouts, advantage, 7, 1)
    assert whole.off_policy == [True] * 4 + [False] * 6 and torch.equal(whole.advantage, advantage)
    parts = mini_batches(rollouts, advantage, 7, 3)
    assert [len(part.prompts) for part in parts] == [1, 2, 2]
    assert torch.equal(torch.cat([part.advantage for part in parts]), advantage)
    assert [part.off_policy for part in parts] == [[True] * 2, [True] * 4, [True] * 4]
    assert [part.off_policy for part in mini_batches(rollouts, advantage, 8, 9)] == [[True] * 2] * 5
