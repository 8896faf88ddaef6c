"""PRISM alignment: the policy plays against the discriminator, and both are updated every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.advantages import alignment_advantage
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import Config
from prism_fast.data.framing import frame_student, frame_teacher
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Task
from prism_fast.models.discriminator import Discriminator, save_discriminator
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.discriminator_update import SpanGroup, discriminator_step
from prism_fast.train.engine import LocalEngine
from prism_fast.train.policy_update import PolicyBatch, response_metrics, update_policy
from prism_fast.train.resume import StageState
from prism_fast.train.rollouts import StepRollouts, roll_out, rollout_record
from prism_fast.train.seeds import derive_seed
from prism_fast.train.warmup import SPANS, pair_margins


def align(
    run: Run, policy, discriminator: Discriminator, processor: Processor, tasks: Sequence[Task]
) -> tuple[Path, Path]:
    """Run the stage; returns the folders of the exported policy and discriminator."""
    config, semantics = run.config.align, run.config.semantics
    options = policy_options(config.loss, max_response=config.rollout.max_new_tokens)
    policy_engine = LocalEngine(policy, config.optimizer)
    critic_engine = LocalEngine(discriminator, config.discriminator.optimizer)
    order = SampleOrder(len(tasks), seed=derive_seed(run.config.seed, "align", "order"))
    engines = {"policy": policy_engine, "discriminator": critic_engine}
    budgets = {
        "policy": config.tokens_per_micro_batch,
        "discriminator": config.discriminator.tokens_per_micro_batch,
    }
    state = StageState(run, "align", engines=engines, budgets=budgets, order=order, with_rollouts=True)
    with run.progress.bar("align", config.steps, done=state.step) as bar:
        while state.step < config.steps:
            step = state.begin_step()
            chunk = [tasks[i] for i in order.next_indices(config.prompts)]
            rollouts = roll_out(run, policy, processor, chunk, config.rollout, stage="align", step=step)
            started = time.perf_counter()
            groups = frame_groups(rollouts, processor, semantics)
            discriminator.train()
            scores, loss = discriminator_step(
                discriminator,
                groups,
                backward=critic_engine.backward,
                pad_id=processor.pad_id,
                device=run.device,
                semantics=semantics,
                score_clip=config.discriminator.score_clip,
                score_reg=config.discriminator.score_reg,
                tokens_per_micro_batch=config.discriminator.tokens_per_micro_batch,
                positions="text" if semantics == "released" else "mrope",
            )
            valid = torch.tensor([split.valid for split in rollouts.splits])
            advantage = step_advantage(run.config, rollouts, scores.student)
            numbers: dict[str, float | int | None] = {"disc/loss": float(loss), "disc/tokens": scores.tokens}
            if valid.any() or semantics == "released":
                numbers["disc/grad_norm"] = critic_engine.step()
            else:  # no valid rollout, no pair: nothing to learn from
                critic_engine.discard()
            rollouts.time["time/discriminator"] = time.perf_counter() - started
            numbers |= {f"disc/{key}": value for key, value in pair_margins(groups, scores).items()}
            for k, span in enumerate(SPANS):
                ties = sum(p is not None and p[k] == g.teacher[k] for g in groups for p in g.students)
                numbers[f"disc/ties_{span}"] = ties
                numbers[f"score/{span}"] = float(scores.student[valid, k].mean()) if valid.any() else None
            started = time.perf_counter()
            numbers |= update_policy(
                policy_engine,
                PolicyBatch(rollouts.prompts, rollouts.group.tolist(), rollouts.completions, advantage),
                options,
                temperature=config.rollout.temperature,
                pad_id=processor.pad_id,
                budget=state.budgets["policy"],
                device=run.device,
            )
            rollouts.time["time/update"] = time.perf_counter() - started
            numbers |= rollouts.reward_metrics() | response_metrics(rollouts.completions) | rollouts.time
            run.metrics.write("align", step, numbers)
            if step % run.config.dump_rollouts_every == 0 or step in (1, config.steps):
                state.log.write(
                    step,
                    [
                        rollout_record(
                            rollouts,
                            b,
                            state.log,
                            advantage=float(advantage[b]),
                            scores=dict(zip(SPANS, scores.student[b].tolist(), strict=True)) if valid[b] else {},
                            teacher_scores=dict(zip(SPANS, scores.teacher[rollouts.group[b]].tolist(), strict=True)),
                        )
                        for b in range(len(rollouts.completions))
                    ],
                )
            bar.advance(
                acc=numbers["reward/acc"],
                format=numbers["reward/format"],
                margin_caption=numbers.get("disc/margin_caption"),
                margin_reasoning=numbers.get("disc/margin_reasoning"),
                d_acc=numbers.get("disc/acc_reasoning"),
            )
            state.end_step(last=step == config.steps)
    policy_folder, critic_folder = run.export_folder("align"), run.export_folder("discriminator")
    save_policy(policy, processor, policy_folder)
    save_discriminator(discriminator, processor, critic_folder)
    return policy_folder, critic_folder


def step_advantage(config: Config, rollouts: StepRollouts, scores: Tensor) -> Tensor:
    """[B] advantages from the students' scores [B, 2], in the configured form.

    ``released``: an invalid response takes part with its group's lowest valid score minus 1, and a group without a
    valid one is pushed down as a whole. ``prism_fast``: an invalid response stays out of its group's mean and deviation
    and gets the format penalty; a group without a valid response has nothing to compare and gets 0.
    """
    align = config.align
    clip = align.discriminator.score_clip
    caption, reasoning = scores.clamp(-clip, clip).unbind(dim=1)
    valid = torch.tensor([split.valid for split in rollouts.splits])
    published = config.semantics == "released"
    advantage = alignment_advantage(
        caption,
        reasoning,
        rollouts.group,
        valid=valid,
        accuracy=torch.tensor([r.accuracy for r in rollouts.rewards]),
        format=torch.tensor([r.format for r in rollouts.rewards]),
        mode=align.advantage,
        weights=tuple(align.weights),
        format_penalty=align.format_penalty,
        invalid="below_min" if published else "exclude",
        singleton="identity" if published else "zero",
    )
    if published:
        return advantage
    any_valid = torch.zeros(len(rollouts.tasks), dtype=torch.int64).index_add(0, rollouts.group, valid.long()) > 0
    return torch.where(any_valid[rollouts.group], advantage, 0.0)


def frame_groups(rollouts: StepRollouts, processor: Processor, semantics: str) -> list[SpanGroup]:
    """The discriminator's view of a step's rollouts."""
    groups = []
    for g, task in enumerate(rollouts.tasks):
        students = [
            frame_student(split, completion.token_ids, processor, semantics) if split.valid else None
            for split, completion in rollouts.of_group(g)
        ]
        teacher = tuple(frame_teacher(text, processor, semantics) for text in (task.teacher_caption, task.teacher_cot))
        groups.append(SpanGroup(rollouts.prompts[g], teacher, students))
    return groups
