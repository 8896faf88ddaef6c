"""PRISM alignment: the policy plays against the discriminator, and both are updated every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.advantages import alignment_advantage, alignment_terms, outcome_advantage
from prism_fast.algorithms.credit import span_credit
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config
from prism_fast.data.framing import SPANS, frame_student, frame_teacher, side_texts
from prism_fast.data.order import order_of
from prism_fast.data.samples import Samples, Task
from prism_fast.engine.schedule import planned
from prism_fast.models.discriminator import Discriminator, save_discriminator
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.rewards import RewardFunctionError
from prism_fast.track.metrics import Metrics
from prism_fast.train.batching import Batching
from prism_fast.train.context import Run
from prism_fast.train.discriminator_trainer import DiscriminatorTrainer, GroupScores, discriminator_loss_of, end_states
from prism_fast.train.grading import Grader
from prism_fast.train.layouts import use_layout
from prism_fast.train.length import stage_length
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer, response_metrics, response_states, trainer_of
from prism_fast.train.reference import Reference
from prism_fast.train.rollout_dump import dumped
from prism_fast.train.rollouts import RolloutSource, StepRollouts
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.seeds import derive_seed
from prism_fast.train.self_check import check_before_sharding
from prism_fast.train.state import StageState
from prism_fast.train.step_evaluation import StepEvaluation
from prism_fast.train.turns import Turns


def align(
    run: Run,
    policy,
    discriminator: Discriminator,
    processor: Processor,
    tasks: Samples[Task],
    held_out: Samples[Task] | None = None,
) -> tuple[Path, Path]:
    """Run the stage; returns the folders of the exported policy and discriminator. ``held_out``: what is answered
    inside the stage."""
    config, spans = run.config.align, SPANS[run.config.align.discriminate]
    order = order_of(tasks, derive_seed(run.config.seed, "align", "order"))
    use_layout(run.config.layout, policy)
    reference = Reference(policy) if config.loss_terms.kl_coef else None
    steps = stage_length(config.steps, config.epochs, len(tasks), config.prompts)
    generator = run.rollout_engine(policy, processor, learns=True)  # before the engines shard what it loads
    check_models(run.config, policy, discriminator, processor, tasks)
    engines = {
        "policy": run.engine(policy, **planned(config.optimizer, steps)),
        "discriminator": run.engine(
            discriminator, **planned(config.discriminator.optimizer, steps * config.discriminator.updates)
        ),
    }
    budgets = {"policy": config.tokens_per_micro_batch, "discriminator": config.discriminator.tokens_per_micro_batch}
    best = partial(run.export, "align-best", engines["policy"], partial(save_policy, policy, processor))
    evaluation = StepEvaluation(run, "align", processor, held_out, best)
    state = StageState(
        run, "align", engines=engines, budgets=budgets, order=order, evaluation=evaluation, with_rollouts=True
    )
    grader, turns = Grader(run.checker), Turns(generator, engines, state.timer, offload=run.config.rollout.offload)
    source = RolloutSource(run, "align", generator, processor, tasks, config.rollout, finished=grader.begin)
    policy_trainer, discriminator_trainer = alignment_trainers(run.config, state, processor, reference)
    shown = {"acc": "reward/acc", "format": "reward/format", "d_acc": f"disc/acc_{spans[-1]}"}
    shown |= {f"margin_{span}": f"disc/margin_{span}" for span in spans}
    for step in state.steps(steps, shown=shown, done=evaluation.enough):
        metrics = Metrics()
        with turns.generating(metrics):
            rollouts = grader.grade(source.take(order.next_indices(config.prompts), step=step))
        with dumped(state, rollouts, last_step=steps) as dump:
            groups = frame_groups(rollouts, processor, run.config.semantics, spans)
            with state.timer.part("discriminator", learns=True):
                scores, learned = update_discriminator(discriminator_trainer, groups, run.config)
            metrics |= learned
            dump.note_scores(spans, scores)
            advantage, token_advantage, credit = step_advantage(run.config, rollouts, scores.student)
            dump.advantage = advantage
            with state.timer.part("update", learns=True):
                metrics |= policy_trainer.accumulate(PolicyBatch.of(rollouts, advantage, token_advantage))
                metrics |= policy_trainer.step()
            metrics |= score_metrics(scores, rollouts, spans) | credit
            metrics |= rollouts.reward_metrics() | response_metrics(rollouts.completions)
        metrics |= evaluation.measure(step, generator, turns)
        state.end_step(metrics, rollouts.time)
    return (
        run.export("align", engines["policy"], partial(save_policy, policy, processor)),
        run.export("discriminator", engines["discriminator"], partial(save_discriminator, discriminator, processor)),
    )


def check_models(
    config: Config, policy, discriminator: Discriminator, processor: Processor, tasks: Samples[Task]
) -> None:
    """`check_before_sharding` of both models."""
    align, positions = config.align, SEMANTICS[config.semantics].positions
    budget = align.tokens_per_micro_batch
    check_before_sharding(config, policy.model, tasks, processor, response_states, budget=budget)
    budget = align.discriminator.tokens_per_micro_batch
    backbone = discriminator.backbone
    check_before_sharding(config, backbone, tasks, processor, end_states, budget=budget, positions=positions)


def alignment_trainers(
    config: Config, state: StageState, processor: Processor, reference: Reference | None
) -> tuple[PolicyTrainer, DiscriminatorTrainer]:
    """Both trainers of the stage."""
    align, semantics = config.align, SEMANTICS[config.semantics]
    discriminator = state.engines["discriminator"]
    use_layout(config.layout, discriminator.module.backbone)
    return (
        trainer_of(align, state, processor, reference),
        DiscriminatorTrainer(
            discriminator,
            Batching(
                config.layout,
                state.budgets["discriminator"],
                processor.pad_id,
                positions=semantics.positions,
                whole_groups=True,
            ),
            discriminator_loss_of(config),
            spans=SPANS[align.discriminate],
            prefix="disc/",
        ),
    )


def update_discriminator(
    discriminator: DiscriminatorTrainer, groups: Sequence[ScoredGroup], config: Config
) -> tuple[GroupScores, Metrics]:
    """Make this step's updates of the discriminator; returns the scores before them.

    Without a valid response on any rank there is no pair, so nothing is learned.
    """
    pairs = any(framed for group in groups for framed in group.students)
    pairs = not discriminator.engine.agree(not pairs)
    if not (pairs or SEMANTICS[config.semantics].learns_without_pairs):
        scores = discriminator.score(groups, prefix="disc/")
        return scores, scores.metrics.only("disc/tokens", "disc/expert", "passes/")
    scores = discriminator.score_and_accumulate(groups)
    metrics = scores.metrics | discriminator.step()
    for _ in range(config.align.discriminator.updates - 1):
        again = discriminator.score_and_accumulate(groups)  # its pairs are scored by weights that have seen them
        discriminator.step()
        metrics |= again.metrics.only("disc/tokens", "passes/", "perf/")
    return scores, metrics


def step_advantage(
    config: Config, rollouts: StepRollouts, scores: Tensor
) -> tuple[Tensor, list[Tensor] | None, Metrics]:
    """Advantages [B] from the students' scores [B, K]; with ``align.credit=span`` also one for every token of each
    response; and their metrics.

    ``released``: an invalid response enters its group's mean and deviation with the lowest valid score minus 1, and a
    group without a valid one gets a negative advantage as a whole. ``prism_fast``: an invalid response is left out of
    its group's mean and deviation and gets the format penalty; a group without a valid response gets 0, because nothing
    can be compared. ``paper``: the weighted sum of the scores is normalised, and there is no format penalty.
    """
    align, semantics, metrics = config.align, SEMANTICS[config.semantics], Metrics()
    clip = discriminator_loss_of(config).score_clip
    scores = scores if clip is None else scores.clamp(-clip, clip)
    unscored = any(reward.score is None for reward in rollouts.rewards)
    if unscored and (align.advantage != "default" or align.answer_credit == "verifier"):
        verified = align.answer_credit == "verifier"
        setting = "align.answer_credit=verifier" if verified else f"align.advantage={align.advantage}"
        raise RewardFunctionError(
            f"a reward function gave None, but {setting} needs the accuracy of every response: let it give a number "
            "(reward/unscored counts its None)"
        )
    valid = torch.tensor([split.valid for split in rollouts.splits])
    accuracy = torch.tensor([r.accuracy for r in rollouts.rewards])
    shared = {"valid": valid, "eps": semantics.eps, "invalid": semantics.invalid, "singleton": semantics.singleton}
    shared["weights"] = (1.0,) if align.discriminate == "response" else tuple(align.weights)
    advantage = alignment_advantage(
        scores,
        rollouts.group,
        accuracy=accuracy,
        format=torch.tensor([r.format for r in rollouts.rewards]),
        mode=align.advantage,
        format_penalty=semantics.format_penalty if align.format_penalty is None else align.format_penalty,
        normalize=semantics.normalize,
        **shared,
    )
    if semantics.all_invalid == "zero":
        any_valid = torch.zeros(len(rollouts.tasks), dtype=torch.int64).index_add(0, rollouts.group, valid.long()) > 0
        advantage = torch.where(any_valid[rollouts.group], advantage, 0.0)
    if align.credit == "response":
        return advantage, None, metrics
    score_advantages = alignment_terms(scores, rollouts.group, **shared)  # [B, K]
    answer = score_advantages.sum(1)
    if align.answer_credit == "verifier":
        answer = outcome_advantage(accuracy, rollouts.group, singleton=semantics.singleton)
    sections = [(split.caption_tokens, split.think_tokens) if split.valid else None for split in rollouts.splits]
    lengths = [len(completion.token_ids) for completion in rollouts.completions]
    credit = span_credit(score_advantages, answer, advantage, lengths, sections)
    for tokens, ends in zip(credit, sections, strict=True):
        if ends is not None:
            for name, section in zip(("caption", "think", "answer"), tokens.tensor_split(ends), strict=True):
                metrics.mean(f"advantage/{name}_abs", float(section.abs().sum()), len(section))
    return advantage, credit, metrics


def score_metrics(scores: GroupScores, rollouts: StepRollouts, spans: Sequence[str]) -> Metrics:
    """Mean of the valid responses' scores, and the mean standard deviation of scores within a prompt."""
    metrics = Metrics()
    valid = torch.tensor([split.valid for split in rollouts.splits])
    for k, span in enumerate(spans):
        metrics.mean(f"score/{span}", scores.student[valid, k].sum(), int(valid.sum()))
        for g in range(len(rollouts.groups)):
            of_group = scores.student[valid & (rollouts.group == g), k]
            if len(of_group) > 1:
                metrics.mean(f"score/{span}_std", of_group.std(), 1)
    return metrics


def frame_groups(
    rollouts: StepRollouts, processor: Processor, semantics: str, spans: Sequence[str]
) -> list[ScoredGroup]:
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
        groups.append(ScoredGroup(rollouts.prompts[g], teacher, students))
    return groups
