"""PRISM alignment: the policy plays against the discriminator, and both are updated every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.advantages import alignment_advantage
from prism_fast.algorithms.presets import policy_options
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config
from prism_fast.data.framing import SPANS, frame_student, frame_teacher, side_texts
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Task
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import Discriminator, save_discriminator
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.discriminator_update import SpanGroup, discriminate, loss_options
from prism_fast.train.grading import Grader
from prism_fast.train.layouts import prepare
from prism_fast.train.policy_update import PolicyBatch, response_metrics, update_policy
from prism_fast.train.resume import StageState
from prism_fast.train.rollout_dump import dumped
from prism_fast.train.rollouts import RolloutSource, StepRollouts
from prism_fast.train.seeds import derive_seed
from prism_fast.train.warmup import pair_margins


def align(
    run: Run, policy, discriminator: Discriminator, processor: Processor, tasks: Sequence[Task]
) -> tuple[Path, Path]:
    """Run the stage; returns the folders of the exported policy and discriminator."""
    config, semantics, spans = run.config.align, run.config.semantics, SPANS[run.config.align.discriminate]
    options = policy_options(config.loss, max_response=config.rollout.max_new_tokens)
    for model in (policy, discriminator.backbone):
        prepare(run.config.layout, model)
    policy_engine = LocalEngine(policy, config.optimizer)
    critic_engine = LocalEngine(discriminator, config.discriminator.optimizer)
    order = SampleOrder(len(tasks), seed=derive_seed(run.config.seed, "align", "order"))
    engines = {"policy": policy_engine, "discriminator": critic_engine}
    budgets = {
        "policy": config.tokens_per_micro_batch,
        "discriminator": config.discriminator.tokens_per_micro_batch,
    }
    state = StageState(run, "align", engines=engines, budgets=budgets, order=order, with_rollouts=True)
    generator = run.rollout_engine(policy, processor)
    source = RolloutSource(run, "align", generator, processor, tasks, config.rollout)
    grader = Grader(run.checker)
    critic = {"pad_id": processor.pad_id, "device": run.device, "layout": run.config.layout, **loss_options(run.config)}
    critic |= {"positions": SEMANTICS[semantics].positions}
    with run.progress.bar("align", config.steps, done=state.step) as bar:
        while state.step < config.steps:
            step = state.begin_step()
            rollouts = grader.grade(source.take(order.next_indices(config.prompts), step=step))
            with dumped(state, rollouts, last_step=config.steps) as kept:
                started = time.perf_counter()
                groups = frame_groups(rollouts, processor, semantics, spans)
                valid = torch.tensor([split.valid for split in rollouts.splits])
                learns = bool(valid.any()) or semantics == "released"  # no valid rollout, no pair: nothing to learn
                discriminator.train()
                scores, loss = discriminate(
                    critic_engine, groups, state.budgets["discriminator"], learn=learns, **critic
                )
                kept.scores = dict(zip(spans, scores.student.unbind(dim=1), strict=True))
                kept.teacher_scores = dict(zip(spans, scores.teacher.unbind(dim=1), strict=True))
                advantage = step_advantage(run.config, rollouts, scores.student)
                kept.advantage = advantage
                numbers: dict[str, float | int | None] = {
                    "disc/loss": float(loss) if learns else None,
                    "disc/grad_norm": critic_engine.step().grad_norm if learns else None,
                    **{f"disc/{key}": value for key, value in scores.numbers().items()},
                }
                passes = scores.passes
                for _ in range(config.discriminator.updates - 1 if learns else 0):
                    again, _ = discriminate(critic_engine, groups, state.budgets["discriminator"], learn=True, **critic)
                    critic_engine.step()
                    numbers["disc/tokens"] += again.tokens
                    passes += again.passes
                numbers |= passes.numbers("discriminator")
                numbers["disc/token_budget"] = state.budgets["discriminator"].change()
                rollouts.time["time/discriminator"] = time.perf_counter() - started
                numbers |= {f"disc/{key}": value for key, value in pair_margins(groups, scores, spans).items()}
                for k, span in enumerate(spans):
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
                    layout=run.config.layout,
                    banned=processor.banned_ids,
                    released=semantics == "released",
                )
                rollouts.time["time/update"] = time.perf_counter() - started
                numbers |= rollouts.reward_metrics() | response_metrics(rollouts.completions) | rollouts.time
                run.metrics.write("align", step, numbers)
            bar.advance(
                acc=numbers["reward/acc"],
                format=numbers["reward/format"],
                **{f"margin_{span}": numbers.get(f"disc/margin_{span}") for span in spans},
                d_acc=numbers.get(f"disc/acc_{spans[-1]}"),
            )
            state.end_step(last=step == config.steps)
    return (
        run.export("align", policy, partial(save_policy, policy, processor)),
        run.export("discriminator", discriminator, partial(save_discriminator, discriminator, processor)),
    )


def step_advantage(config: Config, rollouts: StepRollouts, scores: Tensor) -> Tensor:
    """[B] advantages from the students' scores [B, K], in the configured form.

    ``released``: an invalid response takes part with its group's lowest valid score minus 1, and a group without a
    valid one is pushed down as a whole. ``prism_fast``: an invalid response stays out of its group's mean and deviation
    and gets the format penalty; a group without a valid response has nothing to compare and gets 0. ``paper``: the
    weighted sum of the scores is normalised, and there is no format penalty.
    """
    align, terms = config.align, SEMANTICS[config.semantics]
    clip = loss_options(config)["score_clip"]
    valid = torch.tensor([split.valid for split in rollouts.splits])
    advantage = alignment_advantage(
        scores if clip is None else scores.clamp(-clip, clip),
        rollouts.group,
        valid=valid,
        accuracy=torch.tensor([r.accuracy for r in rollouts.rewards]),
        format=torch.tensor([r.format for r in rollouts.rewards]),
        mode=align.advantage,
        weights=(1.0,) if align.discriminate == "response" else tuple(align.weights),
        format_penalty=terms.format_penalty if align.format_penalty is None else align.format_penalty,
        normalize=terms.normalize,
        eps=terms.eps,
        invalid=terms.invalid,
        singleton=terms.singleton,
    )
    if terms.all_invalid == "penalty":
        return advantage
    any_valid = torch.zeros(len(rollouts.tasks), dtype=torch.int64).index_add(0, rollouts.group, valid.long()) > 0
    return torch.where(any_valid[rollouts.group], advantage, 0.0)


def frame_groups(rollouts: StepRollouts, processor: Processor, semantics: str, spans: Sequence[str]) -> list[SpanGroup]:
    """The discriminator's view of a step's rollouts.

    Raises:
        ValueError: a task lacks the teacher's text of a span.
    """
    groups = []
    for g, task in enumerate(rollouts.tasks):
        students = [
            tuple(frame_student(span, split, completion.token_ids, processor, semantics) for span in spans)
            if split.valid
            else None
            for split, completion in rollouts.of_group(g)
        ]
        texts = zip(spans, side_texts(task, "teacher", spans), strict=True)
        teacher = tuple(frame_teacher(span, text, processor, semantics) for span, text in texts)
        groups.append(SpanGroup(rollouts.prompts[g], teacher, students))
    return groups
