"""Reinforcement learning with verifiable rewards: GRPO and its relatives on the rule-checked answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.advantages import outcome_advantage
from prism_fast.algorithms.presets import policy_options, reward_normalization
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import RlvrConfig
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Task
from prism_fast.engine.local import LocalEngine
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.grading import Grader
from prism_fast.train.group_sampler import GroupSampler, length_penalty, training_reward
from prism_fast.train.layouts import prepare
from prism_fast.train.policy_update import PolicyBatch, response_metrics, update_policy
from prism_fast.train.resume import StageState
from prism_fast.train.rollout_dump import dumped
from prism_fast.train.rollouts import RolloutSource, StepRollouts
from prism_fast.train.seeds import derive_seed

Numbers = dict[str, float | int | None]


def rlvr(run: Run, policy, processor: Processor, tasks: Sequence[Task]) -> Path:
    """Run the stage; returns the folder of the exported policy."""
    config = run.config.rlvr
    options = policy_options(config.loss, max_response=config.rollout.max_new_tokens)
    singleton = SEMANTICS[run.config.semantics].singleton
    prepare(run.config.layout, policy)
    engine = LocalEngine(policy, config.optimizer)
    order = SampleOrder(len(tasks), seed=derive_seed(run.config.seed, "rlvr", "order"))
    generator = run.rollout_engine(policy, processor)
    source = RolloutSource(run, "rlvr", generator, processor, tasks, config.rollout)
    sampler = GroupSampler(source, Grader(run.checker), order, config)
    budgets = {"policy": config.tokens_per_micro_batch}
    state = StageState(
        run, "rlvr", engines={"policy": engine}, budgets=budgets, order=order, extra=sampler, with_rollouts=True
    )
    with run.progress.bar("rlvr", config.steps, done=state.step) as bar:
        while state.step < config.steps:
            step = state.begin_step()
            sampled = sampler.take(step)
            rollouts = sampled.trained
            with dumped(state, rollouts, last_step=config.steps, also=sampled.unused) as kept:
                reward = training_reward(rollouts, config)
                advantage = outcome_advantage(
                    reward, rollouts.group, normalize=reward_normalization(config.loss), singleton=singleton
                )
                kept.advantage = advantage
                started = time.perf_counter()
                updates = [
                    update_policy(
                        engine,
                        batch,
                        options,
                        temperature=config.rollout.temperature,
                        pad_id=processor.pad_id,
                        budget=state.budgets["policy"],
                        device=run.device,
                        layout=run.config.layout,
                        banned=processor.banned_ids,
                        released=run.config.semantics == "released",
                    )
                    for batch in mini_batches(rollouts, advantage, step, config.updates_per_step)
                ]
                numbers = merge_updates(updates) | sampled.numbers | group_metrics(advantage, rollouts)
                if sampled.generated.groups:
                    numbers |= generation_metrics(sampled.generated, config)
                run.metrics.write(
                    "rlvr", step, numbers | sampled.generated.time | {"time/update": time.perf_counter() - started}
                )
            bar.advance(
                acc=numbers.get("reward/acc"),
                format=numbers.get("reward/format"),
                length=numbers.get("response_length/mean"),
                entropy=numbers.get("policy/entropy"),
            )
            state.end_step(last=step == config.steps)
    return run.export("rlvr", policy, partial(save_policy, policy, processor))


def mini_batches(rollouts: StepRollouts, advantage: Tensor, step: int, count: int) -> list[PolicyBatch]:
    """A step's groups, ``count`` at most equal shares in their order; fresh are the rows that the weights of now gave.

    Rows behind the first update, and of groups kept from an earlier step, are stale.
    """
    groups = len(rollouts.groups)
    count = min(count, groups)
    borders = [groups * i // count for i in range(count + 1)]
    batches = []
    for part, (low, high) in enumerate(pairwise(borders)):
        share = StepRollouts(rollouts.groups[low:high])
        rows = (rollouts.group >= low) & (rollouts.group < high)
        stale = [part > 0 or share.groups[g].origin.step < step for g in share.group.tolist()]
        batches.append(PolicyBatch(share.prompts, share.group.tolist(), share.completions, advantage[rows], stale))
    return batches


def merge_updates(updates: Sequence[Numbers]) -> Numbers:
    """The numbers of a step's updates as one: counts add up, maxima are the largest, the rest are means."""
    merged: Numbers = {}
    for key in dict.fromkeys(key for numbers in updates for key in numbers):
        values = [numbers[key] for numbers in updates if numbers.get(key) is not None]
        if key in ("policy/rows", "policy/tokens", "policy/bad_values") or key.startswith("passes/"):
            merged[key] = sum(values)
        elif not values:
            merged[key] = None
        elif key == "policy/token_budget":
            merged[key] = values[-1]
        elif key.endswith("_max") or len(values) == 1:
            merged[key] = max(values)
        else:
            merged[key] = sum(values) / len(values)
    return merged


def group_metrics(advantage: Tensor, rollouts: StepRollouts) -> Numbers:
    """Of the groups trained on."""
    carries = torch.zeros(len(rollouts.groups)).index_add(0, rollouts.group, (advantage != 0).float())
    return {"advantage/zero_groups": int((carries == 0).sum())}


def generation_metrics(rollouts: StepRollouts, config: RlvrConfig) -> Numbers:
    """What the policy of now does: of all rollouts generated in the step, those not trained on as well."""
    numbers: Numbers = rollouts.reward_metrics() | response_metrics(rollouts.completions)
    if config.overlong_buffer:
        penalty = length_penalty(rollouts, config)
        numbers["reward/overlong_penalty"] = float(penalty.mean())
        numbers["reward/overlong_share"] = float((penalty < 0).float().mean())
    return numbers
