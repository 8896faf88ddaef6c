"""Reinforcement learning with verifiable rewards: GRPO and its relatives on the rule-checked answers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.advantages import outcome_advantage
from prism_fast.algorithms.presets import reward_normalization
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import RlvrConfig
from prism_fast.data.order import order_of
from prism_fast.data.samples import Samples, Task
from prism_fast.engine.schedule import planned
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.track.metrics import Metrics
from prism_fast.train.context import Run
from prism_fast.train.grading import Grader
from prism_fast.train.group_sampler import GroupSampler, length_penalty, training_reward
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, response_metrics, response_states, trainer_of
from prism_fast.train.reference import Reference
from prism_fast.train.rollout_dump import dumped
from prism_fast.train.rollouts import RolloutSource, StepRollouts
from prism_fast.train.seeds import derive_seed
from prism_fast.train.self_check import check_before_sharding
from prism_fast.train.state import StageState
from prism_fast.train.step_evaluation import StepEvaluation
from prism_fast.train.turns import Turns


def rlvr(
    run: Run,
    policy,
    processor: Processor,
    tasks: Samples[Task],
    *,
    stage: str,
    steps: int,
    held_out: Samples[Task] | None = None,
) -> Path:
    """Run ``steps`` of ``stage`` (rlvr or rlvr_direct); returns the folder of the exported policy. ``held_out``: what
    is answered inside the stage.

    Both stages take the tasks in the same order.
    """
    config, semantics = run.config.rlvr, SEMANTICS[run.config.semantics]
    use_layout(run.config.layout, policy)
    reference = Reference(policy) if config.loss_terms.kl_coef else None
    order = order_of(tasks, derive_seed(run.config.seed, "rlvr", "order"))
    generator = run.rollout_engine(policy, processor, learns=True)  # before the engine shards what it loads
    grader = Grader(run.checker)
    source = RolloutSource(run, stage, generator, processor, tasks, config.rollout, finished=grader.begin)
    sampler = GroupSampler(source, grader, order, config, run.world)
    budget = config.tokens_per_micro_batch
    check_before_sharding(run.config, policy.model, tasks, processor, response_states, budget=budget)
    engines = {"policy": run.engine(policy, **planned(config.optimizer, steps * config.updates_per_step))}
    budgets = {"policy": budget}
    save = partial(save_policy, policy, processor)
    best = partial(run.export, f"{stage}-best", engines["policy"], save)
    evaluation = StepEvaluation(run, stage, processor, held_out, best)
    state = StageState(
        run,
        stage,
        engines=engines,
        budgets=budgets,
        order=order,
        extra=sampler,
        evaluation=evaluation,
        with_rollouts=True,
    )
    turns = Turns(generator, engines, state.timer, offload=run.config.rollout.offload)
    trainer = trainer_of(config, state, processor, reference)
    normalize = reward_normalization(config.loss)
    shown = {"acc": "reward/acc", "format": "reward/format"}
    shown |= {"length": "response_length/mean", "entropy": "policy/entropy"}
    for step in state.steps(steps, shown=shown, done=evaluation.enough):
        metrics = Metrics()
        with turns.generating(metrics):
            sampled = sampler.take(step)
        rollouts = sampled.trained
        with dumped(state, rollouts, last_step=steps, also=sampled.unused) as dump:
            reward = training_reward(rollouts, config)
            how = {"normalize": normalize, "singleton": semantics.singleton}
            advantage = outcome_advantage(reward, rollouts.group, scored=rollouts.scored, **how)
            dump.advantage = advantage
            count = min(config.updates_per_step, sampled.per_rank)
            with state.timer.part("update", learns=True):
                for batch in mini_batches(rollouts, advantage, step, count):
                    metrics |= trainer.accumulate(batch)
                    metrics |= trainer.step()
            metrics |= sampled.metrics | group_metrics(advantage, rollouts)
            if sampled.generated.groups:
                metrics |= generation_metrics(sampled.generated, config)
        metrics |= evaluation.measure(step, generator, turns)
        state.end_step(metrics, sampled.generated.time)
    return run.export(stage, engines["policy"], save)


def mini_batches(rollouts: StepRollouts, advantage: Tensor, step: int, count: int) -> list[PolicyBatch]:
    """A step's groups in their order, in ``count`` batches of nearly equal size (fewer where there are fewer groups).

    The responses of all batches but the first are off-policy, and so are those of groups kept from an earlier step.
    """
    groups = len(rollouts.groups)
    count = min(count, groups)
    borders = [groups * i // count for i in range(count + 1)]
    batches = []
    for number, (low, high) in enumerate(pairwise(borders)):
        share = StepRollouts(rollouts.groups[low:high])
        rows = (rollouts.group >= low) & (rollouts.group < high)
        off_policy = [number > 0 or share.groups[g].origin.step < step for g in share.group.tolist()]
        batches.append(PolicyBatch.of(share, advantage[rows], off_policy=off_policy))
    return batches


def group_metrics(advantage: Tensor, rollouts: StepRollouts) -> Metrics:
    """Metrics of the groups trained on."""
    metrics = Metrics()
    carries = torch.zeros(len(rollouts.groups)).index_add(0, rollouts.group, (advantage != 0).float())
    metrics.sum("advantage/zero_groups", int((carries == 0).sum()))
    return metrics


def generation_metrics(rollouts: StepRollouts, config: RlvrConfig) -> Metrics:
    """Metrics of all rollouts generated in the step, trained on or not: they describe the current policy."""
    metrics = rollouts.reward_metrics() | response_metrics(rollouts.completions)
    if config.overlong_buffer:
        penalty = length_penalty(rollouts, config)
        metrics.mean("reward/overlong_penalty", penalty.double().sum(), len(penalty))
        metrics.mean("reward/overlong_share", int((penalty < 0).sum()), len(penalty))
    return metrics
