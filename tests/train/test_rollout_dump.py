"""A step that fails on its numbers leaves its rollouts, whatever was not finite and in whichever stage."""

from __future__ import annotations

import pytest
import torch

from prism_fast.engine.finite import NonFiniteError
from prism_fast.report.html import write_report
from prism_fast.train.discriminator_trainer import DiscriminatorTrainer
from prism_fast.train.policy_trainer import PolicyTrainer
from prism_fast.train.rollout_log import RolloutReader, dump_path
from tests.train.conftest import SMALL, run_small


@pytest.fixture(scope="session")
def stages_behind_sft(small_data, finished) -> list[str]:
    export = finished / "export"
    models = [f"model.policy={export / 'sft'}", f"model.discriminator={export / 'discriminator-warmup'}"]
    return [*small_data, *SMALL, *models, "data.eval=null", "dump_rollouts_every=100", "align.steps=4", "rlvr.steps=4"]


def _poison_policy(engine):
    engine.module.lm_head.weight.data[3, 5] = torch.nan


def _poison_gradient(engine):
    parameter = engine.module.lm_head.weight
    parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def _poison_critic(engine):
    engine.module.v_head[1].weight.data.fill_(torch.nan)


def _infinite_scores(engine):
    dropout, linear = engine.module.v_head
    linear.weight.data.fill_(1.0)
    dropout.register_forward_hook(lambda module, inputs, output: output + torch.inf)


TRAINERS = {
    "policy": (PolicyTrainer, "accumulate"),
    "discriminator": (DiscriminatorTrainer, "score_and_accumulate"),
}
INFINITE = "align step 2.*not finite: teacher_scores.*inf.*student_scores"  # the loss of clamped scores is finite
CASES = [
    ("align", "discriminator", _poison_critic, (), "align step 2, micro-batch 1 of"),
    ("align", "discriminator", _infinite_scores, ("align.discriminator.score_reg=0",), INFINITE),
    ("align", "policy", _poison_policy, (), "align step 2.*logp"),
    ("align", "policy", _poison_gradient, (), "align step 2: the gradient norm is"),
    ("rlvr", "policy", _poison_policy, (), "rlvr step 2.*logp"),
]


@pytest.mark.parametrize(("stage", "model", "poison", "settings", "message"), CASES)
def test_the_rollouts_of_a_failed_step_are_kept(
    stage, model, poison, settings, message, stages_behind_sft, tmp_path, monkeypatch
):
    trainer, method = TRAINERS[model]
    inner = getattr(trainer, method)

    def poisoned(self, *arguments):
        if self.engine.where.endswith("step 2"):
            poison(self.engine)
        return inner(self, *arguments)

    monkeypatch.setattr(trainer, method, poisoned)
    folder = tmp_path / "run"
    more = [f"stages=[{stage}]", "rlvr.dynamic_sampling.enabled=true"]
    with pytest.raises(NonFiniteError, match=f"{message}.*last ones in .*{stage}") as failure:
        run_small(folder, [*stages_behind_sft, *more, *settings])
    path = dump_path(folder, stage)
    assert str(path) in str(failure.value)
    records = RolloutReader(path).step(2)  # not due: neither the first nor the last step
    assert len(records) >= 8
    for record in records:
        assert len(record["token_ids"]) == len(record["logprobs"]) == record["tokens"] > 0
        assert record["finish"] in ("stop", "length") and record["reward"]["decided_by"]
    if model == "policy":
        assert sum(record.get("advantage") is not None for record in records) == 8
    if model == "policy" and stage == "align":
        assert all(set(r["scores"]) == {"caption", "reasoning"} for r in records if r["valid"])
    assert write_report(folder).is_file(), "the report of a run that failed shows them"
