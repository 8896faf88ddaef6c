"""The discriminator's update: one forward gives both the scores that reward the policy and the gradient.

A prompt costs its own tokens plus those of its distinct spans: prompt, image and equal spans are computed once. The
loss couples the spans of a group, so a group that does not fit into one micro-batch takes two passes: the first scores
it without gradient and takes the loss's gradient at the head's inputs, the second computes the rows again and
backpropagates it (`_Step.learn_in_two_passes`). ``disc/tokens_repeated`` counts those tokens; a larger token budget
avoids them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.scored import as_scored
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config
from prism_fast.engine.protocol import Engine
from prism_fast.models.discriminator import Discriminator, expert_choices, load_balance_loss
from prism_fast.models.experts import chosen_experts
from prism_fast.models.transfer import moved
from prism_fast.ops import PairwiseStats
from prism_fast.track.metrics import Metrics
from prism_fast.train.batching import Batching, missing_passes, update_weights
from prism_fast.train.expert_shares import ExpertShares
from prism_fast.train.layouts import BatchPlan, Ends, MicroBatch
from prism_fast.train.passes import counted_passes
from prism_fast.train.scored_group import ScoredGroup, Span, span_lengths
from prism_fast.train.self_check import self_check


@dataclass(frozen=True)
class DiscriminatorLoss:
    """Settings of the discriminator's loss.

    ``score_clip``, ``score_reg``, ``spread``: of ``algorithms.alignment_loss``. ``length_penalty``: b in
    score - b * log(1 + tokens of the span), which enters both loss and rewards. ``aux_coef``: weight of the
    load-balancing loss over the routers of all layers.
    """

    semantics: str = "prism_fast"
    score_clip: float | None = 10.0
    score_reg: float = 0.001
    length_penalty: float = 0.0
    spread: float = 0.0
    aux_coef: float = 0.0


def discriminator_loss_of(config: Config, *, warmup: bool = False) -> DiscriminatorLoss:
    """The loss of a recipe; settings that it leaves open come from its semantics."""
    semantics, recipe = SEMANTICS[config.semantics], config.align.discriminator
    clip, reg = semantics.score_clip, semantics.score_reg
    if warmup and not semantics.warmup_shapes_scores:
        clip, reg = None, 0.0
    return DiscriminatorLoss(
        semantics=config.semantics,
        score_clip=clip if recipe.score_clip is None else recipe.score_clip,
        score_reg=reg if recipe.score_reg is None else recipe.score_reg,
        length_penalty=recipe.length_penalty,
        spread=recipe.spread,
        aux_coef=config.warmup.aux_coef if warmup and semantics.warmup_balances else 0.0,
    )


class GroupScores(NamedTuple):
    """Scores before the update, float32, on the CPU: ``student`` [B, K] (0 where the response is invalid) and
    ``teacher`` [G, K]. ``metrics``: of the forward and of its pairs."""

    student: Tensor
    teacher: Tensor
    metrics: Metrics


def end_states(plan: BatchPlan, batch: MicroBatch) -> tuple[Tensor, list[int]]:
    """For ``train.self_check``: the hidden states [M, H] at the spans' ends, which are scored; one per span."""
    hidden = plan.ends(batch).hidden
    return hidden, [1] * len(hidden)


class DiscriminatorTrainer:
    """`score_and_accumulate` scores groups and adds the gradient of their loss, `step` updates the weights.

    Scores, loss and gradient do not depend on the cut into micro-batches, except under semantics that divide by counts
    of a micro-batch.

    Args:
        engine: of a ``Discriminator``.
        spans: names of the K scores.
        prefix: of the metrics' names, e.g. ``disc/``.
    """

    def __init__(
        self, engine: Engine, batching: Batching, loss: DiscriminatorLoss, *, spans: Sequence[str], prefix: str
    ) -> None:
        self.engine, self.batching, self.loss = engine, batching, loss
        self.spans, self.prefix = tuple(spans), prefix

    def score_and_accumulate(self, groups: Sequence[ScoredGroup]) -> GroupScores:
        """Score ``groups`` in train mode and add the gradient of their loss to the engine's.

        Raises:
            NonFiniteError: the loss or a score is NaN or infinite; the gradient is dropped.
            StepTooLargeError: the largest indivisible item does not fit into memory.
        """
        self.engine.module.train()
        return self._run(groups, self.prefix, learn=True, poll=lambda: None)

    def score(
        self, groups: Sequence[ScoredGroup], *, prefix: str, poll: Callable[[], None] = lambda: None
    ) -> GroupScores:
        """Score ``groups`` in eval mode, without gradient. ``prefix``: of the metrics' names. ``poll`` is called before
        each micro-batch and may raise to stop. Raises StepTooLargeError as above."""
        self.engine.module.eval()
        return self._run(groups, prefix, learn=False, poll=poll)

    def step(self) -> Metrics:
        """Update the weights. Raises NonFiniteError if the gradient norm is not finite; nothing is updated then."""
        return update_weights(self.engine, self.prefix) | self.batching.budget_metrics(self.prefix)

    def _run(self, groups: Sequence[ScoredGroup], prefix: str, *, learn: bool, poll: Callable[[], None]) -> GroupScores:
        backbone = self.engine.module.backbone
        computed = [group.computed() for group in groups]
        packing_error = self_check(self.engine, self.batching, backbone, computed, end_states)

        def attempt(tokens: int) -> tuple[_Step, Metrics]:
            with counted_passes(backbone) as passes:
                plan = self.batching.plan(backbone, computed, tokens, lockstep=self.engine.lockstep)
                step = _Step(self, groups, plan, prefix, poll)
                with torch.set_grad_enabled(learn):
                    step.run(learn=learn)
            return step, passes.metrics("discriminator")

        step, passes = self.batching.run(attempt, computed, self.engine)
        self.engine.verify()  # before the scores reward anything
        student, teacher = step.scores()
        metrics = step.metrics | passes
        if learn:
            metrics |= self.batching.work(backbone.config, computed, vocabulary=False)
            if packing_error is not None:
                metrics.last(f"{prefix}packing_error", packing_error)
        return GroupScores(student, teacher, metrics)


class _Step:
    """One pass over the groups of a step. The host does not wait for the device before `scores`."""

    def __init__(
        self,
        trainer: DiscriminatorTrainer,
        groups: Sequence[ScoredGroup],
        plan: BatchPlan,
        prefix: str,
        poll: Callable[[], None],
    ) -> None:
        self.engine, self.loss, self.spans = trainer.engine, trainer.loss, trainer.spans
        self.discriminator: Discriminator = trainer.engine.module
        self.divide_by_micro_batch = SEMANTICS[self.loss.semantics].divide_by_micro_batch
        self.groups, self.plan, self.prefix, self.poll = groups, plan, prefix, poll
        self.device = self.discriminator.backbone.device
        spans = [group.spans() for group in groups]
        self.keys, self.columns = [list(s) for s in spans], [list(s.values()) for s in spans]
        text = self.discriminator.backbone.config.text_config
        self.experts = (text.num_experts, text.num_experts_per_tok)
        self.shares = ExpertShares(self.spans, text.num_experts)
        self.metrics = Metrics()
        self.weight: float | None = None  # of losses
        self.missing = missing_passes(self.engine, plan)
        self.metrics.mean(f"{prefix}loss", 0.0, 1 / self.engine.ranks)  # micro-batches add their totals with count 0
        self.metrics.sum(f"{prefix}tokens_repeated", 0)
        self._rewards: dict[int, tuple[Tensor, Tensor]] = {}  # by group: of the teacher [K], of the students [n, K]
        valid = sum(1 for group in groups for framed in group.students if framed)
        students = sum(len(group.students) for group in groups)
        self._students, valid, teachers = self.engine.sum([students, valid, len(groups)])
        # The loss is divided by counts of the whole step, over all ranks, so that no cut matters.
        self.counts: dict[str, float] = {}
        if not self.divide_by_micro_batch:
            columns = len(self.spans)
            self.counts = {"denominator": max(1, valid), "l2_denominator": columns * (teachers + valid)}
        # The load-balancing loss is a product of two means over the step. The first, each expert's share of the
        # choices, must be known before a micro-batch can add its part of the second, which carries the gradient.
        cut = self.engine.ranks > 1 or len(plan.micro_batches) > 1
        self.choices = self._count_choices() if self.loss.aux_coef and cut else None

    def run(self, *, learn: bool) -> None:
        """Score all groups; with ``learn`` add their gradient."""
        bounds = self.plan.bound()
        if not self.engine.lockstep:
            for bound in bounds:
                if learn and len(bound) > 1:
                    self.learn_in_two_passes(bound)
                else:
                    self.score(bound, learn=learn)
        elif self.engine.agree(all(len(bound) == 1 for bound in bounds)):
            for bound in bounds:
                self.score(bound, learn=learn)
            for _ in range(self.missing):
                self._idle().score(bounds[-1], learn=learn)
        else:  # somewhere a group was cut: all ranks take the passes in one order, as if all groups were bound
            everything = [batch for bound in bounds for batch in bound]
            if learn:
                self.learn_in_two_passes(everything)
            else:
                self.score(everything, learn=False, idle=self.missing)

    def _idle(self) -> _Step:
        """A step whose passes leave nothing behind: losses have weight 0, metrics and rewards go nowhere."""
        idle = copy(self)
        idle.weight, idle.metrics, idle._rewards = 0.0, Metrics(), {}
        idle.shares = ExpertShares(self.spans, self.experts[0])
        return idle

    def _backward(self, loss: Tensor, **made_of: Tensor) -> None:
        self.engine.backward(loss if self.weight is None else loss * self.weight, **made_of)

    def score(self, bound: Sequence[MicroBatch], *, learn: bool, idle: int = 0) -> None:
        """Score whole groups with one forward per micro-batch; with ``learn`` add their gradient. ``idle``: further
        forwards, which other ranks need."""
        hidden, aux = self._forward(bound)
        self._idle_forwards(bound, idle)
        loss, scores = self._loss(hidden, bound)
        loss = loss + aux
        self._add_loss(loss)
        if learn:
            self._backward(loss, **scores)
        for batch in bound:
            self.plan.finish(batch, self.engine.backward if learn else None)

    def learn_in_two_passes(self, bound: Sequence[MicroBatch]) -> None:
        """Learn from groups that are cut over several micro-batches. Their loss needs the scores of all of them: a pass
        without gradient gives the scores and the exact gradient of the loss at the spans' ends; a second pass
        backpropagates it, micro-batch by micro-batch."""
        self.plan.announce(bound)
        with torch.no_grad():
            hidden, _ = self._forward(bound)
            self._idle_forwards(bound, self.missing)
        hidden.requires_grad_()
        loss, scores = self._loss(hidden, bound)
        self._add_loss(loss)
        self.engine.backward(loss, **scores)
        for batch, gradient in zip(bound, hidden.grad.split([len(b.branches) for b in bound]), strict=True):
            self.poll()
            computed = self._ends(self.plan, batch)
            aux = self._balance(computed)
            self.engine.backward((computed.hidden * gradient).sum() + aux)
            self.plan.finish(batch, self.engine.backward)
            if self.loss.aux_coef:
                self._add_loss(aux)
            self.metrics.sum(f"{self.prefix}tokens_repeated", batch.tokens)
        for _ in range(self.missing):
            computed = self._ends(self.plan, bound[-1])
            self._idle()._backward(computed.hidden.sum() + self._balance(computed))

    def _idle_forwards(self, bound: Sequence[MicroBatch], count: int) -> None:
        for _ in range(count):
            self._idle()._forward(bound[-1:])

    def scores(self) -> tuple[Tensor, Tensor]:
        """Joint. Rewards of the students [B, K] and of the teacher [G, K], float32, on the CPU; completes the
        metrics."""
        order = range(len(self.groups))
        teacher = torch.stack([self._rewards[g][0] for g in order]).cpu()
        student = torch.cat([self._rewards[g][1] for g in order]).cpu()
        if self.engine.ranks > 1:
            self.shares.join(self.engine.sum)
        self.shares.add_to(self.metrics, self.prefix)
        return student, teacher

    def _ends(self, plan: BatchPlan, batch: MicroBatch) -> Ends:
        wanted = {"output_router_logits": True} if self.loss.aux_coef else {}
        return self.engine.run(lambda: plan.ends(batch, **wanted))

    def _forward(self, bound: Sequence[MicroBatch]) -> tuple[Tensor, Tensor | float]:
        """Final-norm hidden states [M, H] at the spans' ends, and these micro-batches' load-balancing loss."""
        hidden, aux = [], 0.0
        for batch in bound:
            self.poll()
            with chosen_experts(self.discriminator.backbone) as chosen:
                computed = self._ends(self.plan, batch)
            columns = [self.columns[g][k] for g, k in batch.branches]
            self.shares.add(chosen, columns, computed.branch, computed.weight)
            hidden.append(computed.hidden)
            aux = aux + self._balance(computed)
            self.metrics.sum(f"{self.prefix}tokens", batch.tokens)
        return torch.cat(hidden), aux

    def _balance(self, computed: Ends) -> Tensor | float:
        """A micro-batch's part of the load-balancing loss, times ``aux_coef``; 0.0 without that loss."""
        if not self.loss.aux_coef:
            return 0.0
        loss = load_balance_loss(computed.router_logits, *self.experts, computed.weight, choices=self.choices)
        return self.loss.aux_coef * loss

    @torch.no_grad()
    def _count_choices(self) -> Tensor:
        """How often each expert is chosen for the step's tokens, [E], over all ranks; takes a pass without gradient."""
        plan, counts = self.plan.copy(), []
        for batch in self.plan.micro_batches:
            computed = self._ends(plan, batch)
            counts.append(expert_choices(computed.router_logits, *self.experts, computed.weight))
        for _ in range(self.missing):
            self._ends(plan, plan.micro_batches[-1])
        choices = torch.stack(counts).sum(0)
        if self.engine.ranks > 1:
            choices = moved(torch.tensor(self.engine.sum(choices.tolist()), dtype=choices.dtype), self.device)
        return choices

    def _loss(self, hidden: Tensor, bound: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss 0-d of whole groups from the hidden states [M, H] at their spans' ends, and the scores that it is
        made of, by name; stores the rewards."""
        members = list(dict.fromkeys(g for batch in bound for g, _ in batch.branches))
        groups = [self.groups[g] for g in members]
        place = {(g, self.keys[g][k]): i for i, (g, k) in enumerate(key for b in bound for key in b.branches)}
        learned, reward = self._scores(hidden, members, place)
        group_of = moved(torch.tensor([i for i, group in enumerate(groups) for _ in group.students]), self.device)
        valid = moved(torch.tensor([framed is not None for group in groups for framed in group.students]), self.device)
        options: dict[str, object] = {}
        if penalty := self.loss.length_penalty:
            lengths = span_lengths(groups, self.device)
            options = {"lengths": lengths, "length_penalty": penalty}
            clip = self.loss.score_clip if SEMANTICS[self.loss.semantics].clips_before_penalty else None
            shaped = partial(as_scored, penalty=penalty, clip=clip, clip_first=True)
            reward = [shaped(score, n) for score, n in zip(reward, lengths, strict=True)]
            self._add_length_penalty(penalty * lengths[1].log1p(), valid)
        loss, stats = discriminator_loss(
            *learned,
            group_of,
            valid,
            semantics=self.loss.semantics,
            score_clip=self.loss.score_clip,
            score_reg=self.loss.score_reg,
            spread=self.loss.spread,
            **self.counts,
            **options,
        )
        if self.divide_by_micro_batch:  # divided by its own counts, so weighted by its share of the students
            loss = loss * (len(valid) / self._students)
        self._add_pairs(stats)
        students = reward[1].float().split([len(group.students) for group in groups])
        for g, teacher, student in zip(members, reward[0].float(), students, strict=True):
            self._rewards[g] = (teacher, student)
        return loss, {"teacher_scores": learned[0], "student_scores": learned[1]}

    def _scores(
        self, hidden: Tensor, members: Sequence[int], place: dict[tuple[int, Span], int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Teacher [G, K] and student [B, K] scores of the groups ``members``, twice: to learn from, and as rewards,
        without gradient and head dropout. ``place``: the row of ``hidden`` [M, H] of each span."""
        teacher = [[place[g, span] for span in self.groups[g].teacher] for g in members]
        invalid = [-1] * len(self.spans)
        student = [
            [place[g, span] for span in framed] if framed else invalid
            for g in members
            for framed in self.groups[g].students
        ]

        def gathered() -> list[Tensor]:
            score = self.discriminator.score_hidden(hidden)  # [M]
            index = moved(torch.tensor(student), score.device)
            of_students = torch.where(index >= 0, score[index.clamp(min=0)], 0.0)
            return [score[moved(torch.tensor(teacher), score.device)], of_students]

        learned = self.engine.run(gathered)
        if self.discriminator.training and self.discriminator.v_head[0].p > 0:
            # The published head has dropout, which must not act on rewards; the backbone has none.
            self.discriminator.v_head.eval()
            with torch.no_grad():
                reward = self.engine.run(gathered)
            self.discriminator.v_head.train()
            return learned, reward
        return learned, [scores.detach() for scores in learned]

    def _add_loss(self, loss: Tensor) -> None:
        self.metrics.mean(f"{self.prefix}loss", loss.detach(), 0)

    def _add_length_penalty(self, penalty: Tensor, valid: Tensor) -> None:
        """Add the mean over valid responses of ``penalty`` [B, K], which is subtracted from the students' scores."""
        total = torch.where(valid[:, None], penalty, 0.0).sum(0)
        for k, span in enumerate(self.spans):
            self.metrics.mean(f"{self.prefix}length_penalty_{span}", total[k], valid.sum())

    def _add_pairs(self, stats: PairwiseStats) -> None:
        """Add margin and accuracy of the pairs whose scores differ: equal texts tie exactly and tell nothing."""
        differ = stats.pairs - stats.ties  # [K]
        margin = torch.where(stats.pairs > 0, stats.margin * stats.pairs, 0.0)
        for k, span in enumerate(self.spans):
            self.metrics.mean(f"{self.prefix}margin_{span}", margin[k], differ[k])
            self.metrics.mean(f"{self.prefix}acc_{span}", stats.correct[k], differ[k])
            self.metrics.sum(f"{self.prefix}pairs_{span}", differ[k])
            self.metrics.sum(f"{self.prefix}ties_{span}", stats.ties[k])
