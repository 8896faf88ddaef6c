"""Reinforcement learning with verifiable rewards: GRPO on the rule-checked answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from prism_fast.algorithms.advantages import outcome_advantage
from prism_fast.algorithms.presets import policy_options, reward_normalization
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Task
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.engine import LocalEngine
from prism_fast.train.policy_update import PolicyBatch, response_metrics, update_policy
from prism_fast.train.resume import StageState
from prism_fast.train.rollouts import roll_out, rollout_record
from prism_fast.train.seeds import derive_seed


def rlvr(run: Run, policy, processor: Processor, tasks: Sequence[Task]) -> Path:
    """Run the stage; returns the folder of the exported policy."""
    config = run.config.rlvr
    options = policy_options(config.loss, max_response=config.rollout.max_new_tokens)
    normalize = reward_normalization(config.loss)
    engine = LocalEngine(policy, config.optimizer)
    order = SampleOrder(len(tasks), seed=derive_seed(run.config.seed, "rlvr", "order"))
    budgets = {"policy": config.tokens_per_micro_batch}
    state = StageState(run, "rlvr", engines={"policy": engine}, budgets=budgets, order=order, with_rollouts=True)
    with run.progress.bar("rlvr", config.steps, done=state.step) as bar:
        while state.step < config.steps:
            step = state.begin_step()
            chunk = [tasks[i] for i in order.next_indices(config.prompts)]
            rollouts = roll_out(run, policy, processor, chunk, config.rollout, stage="rlvr", step=step)
            reward = torch.tensor([r.score for r in rollouts.rewards])
            advantage = outcome_advantage(reward, rollouts.group, normalize=normalize)
            started = time.perf_counter()
            numbers: dict[str, float | int | None] = update_policy(
                engine,
                PolicyBatch(rollouts.prompts, rollouts.group.tolist(), rollouts.completions, advantage),
                options,
                temperature=config.rollout.temperature,
                pad_id=processor.pad_id,
                budget=state.budgets["policy"],
                device=run.device,
            )
            rollouts.time["time/update"] = time.perf_counter() - started
            zero = (advantage.view(len(chunk), -1) == 0).all(dim=1)
            numbers["advantage/zero_groups"] = int(zero.sum())
            numbers |= rollouts.reward_metrics() | response_metrics(rollouts.completions) | rollouts.time
            run.metrics.write("rlvr", step, numbers)
            if step % run.config.dump_rollouts_every == 0 or step in (1, config.steps):
                state.log.write(
                    step,
                    [
                        rollout_record(
                            rollouts, b, state.log, advantage=float(advantage[b]), scores={}, teacher_scores=None
                        )
                        for b in range(len(rollouts.completions))
                    ],
                )
            bar.advance(
                acc=numbers["reward/acc"],
                format=numbers["reward/format"],
                length=numbers["response_length/mean"],
                entropy=numbers["policy/entropy"],
            )
            state.end_step(last=step == config.steps)
    folder = run.export_folder("rlvr")
    save_policy(policy, processor, folder)
    return folder
