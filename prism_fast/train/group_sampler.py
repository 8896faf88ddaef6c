"""The groups an RLVR step trains on: from one round of generation, or with dynamic sampling from several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.algorithms.dynamic_sampling import UsefulShare, useful_groups
from prism_fast.algorithms.overlong import overlong_penalty
from prism_fast.config import RlvrConfig
from prism_fast.data.order import MixedOrder, SampleOrder
from prism_fast.track.metrics import Metrics
from prism_fast.train.grading import Grader
from prism_fast.train.rollout_record import RolloutGroup, training_records
from prism_fast.train.rollouts import RolloutSource, StepRollouts


class NoUsefulGroupError(RuntimeError):
    """Every group that a step generated has equal rewards: there is nothing to learn from."""


@dataclass(frozen=True)
class SampledGroups:
    """A step's groups: those it trains on, and all that it generated (``unused``: those it does not train on)."""

    trained: StepRollouts
    generated: StepRollouts
    metrics: Metrics

    @property
    def unused(self) -> list[RolloutGroup]:
        trained = {group.origin for group in self.trained.groups}
        return [group for group in self.generated.groups if group.origin not in trained]


def training_reward(rollouts: StepRollouts, config: RlvrConfig) -> Tensor:
    """The checked reward plus `length_penalty`, [B] float32; a reward without a score counts as 0 here."""
    return torch.tensor([reward.score or 0.0 for reward in rollouts.rewards]) + length_penalty(rollouts, config)


def length_penalty(rollouts: StepRollouts, config: RlvrConfig) -> Tensor:
    """Penalty of responses close to the length limit, [B] float32, 0 or less; 0 where ``overlong_buffer`` is 0."""
    length = torch.tensor([len(completion.token_ids) for completion in rollouts.completions])
    if config.overlong_buffer == 0:
        return torch.zeros(len(length))
    return overlong_penalty(
        length,
        max_length=config.rollout.max_new_tokens,
        buffer=config.overlong_buffer,
        factor=config.overlong_factor,
    )


class GroupSampler:
    """Samples a step's groups from ``source``, takes tasks from ``order``, and grades with ``grader``.

    With dynamic sampling a step has ``prompts`` useful groups. Surplus useful groups are kept and go first into the
    next step, because generating them was expensive. They are off-policy by then (see ``PolicyTrainer``), but never by
    many steps: a step generates only if fewer than ``prompts`` groups are kept, and at most ``max_oversampling`` times
    ``prompts`` at once.

    Checkpoints hold the surplus groups and the running share of useful ones.
    """

    def __init__(self, source: RolloutSource, grader: Grader, order: SampleOrder | MixedOrder, config: RlvrConfig):
        self.source, self.grader, self.order, self.config = source, grader, order, config
        self.surplus: list[RolloutGroup] = []
        self.share = UsefulShare()

    def take(self, step: int) -> SampledGroups:
        """The groups of a step.

        Raises:
            NoUsefulGroupError: dynamic sampling found no useful group at all.
        """
        if not self.config.dynamic_sampling.enabled:
            rollouts = self._graded(self.config.prompts, step=step)
            return SampledGroups(rollouts, rollouts, Metrics())
        wanted, dynamic = self.config.prompts, self.config.dynamic_sampling
        useful, rounds = self.surplus, []
        while len(useful) < wanted and len(rounds) < dynamic.max_rounds:
            count = min(self.share.to_generate(wanted - len(useful)), int(dynamic.max_oversampling * wanted))
            rounds.append(self._graded(count, step=step, round=len(rounds)))
            new = self._useful(rounds[-1])
            self.share.observe(count, len(new))
            useful = [*useful, *new]
        generated = join(rounds)
        if not useful:
            raise NoUsefulGroupError(
                f"{self.source.stage} step {step}: in none of the {len(generated.groups)} groups generated in "
                f"{len(rounds)} rounds do the rewards differ: every answer right, or every answer wrong. Take harder "
                "or easier tasks, more rollouts per prompt (rlvr.rollout.n), or more rounds "
                "(rlvr.dynamic_sampling.max_rounds)"
            )
        trained, self.surplus = useful[:wanted], useful[wanted:]
        sampled_now = sum(group.origin.step == step for group in useful)
        ages = [step - group.origin.step for group in trained]
        metrics = Metrics()
        metrics.sum("sampling/generated", len(generated.groups))
        metrics.mean("sampling/useful_share", sampled_now, len(generated.groups))
        metrics.mean("sampling/expected_share", self.share.share)
        metrics.max("sampling/rounds", len(rounds))
        metrics.sum("sampling/missing", wanted - len(trained))
        metrics.sum("sampling/banked", len(self.surplus))
        metrics.mean("sampling/age_mean", sum(ages), len(ages))
        metrics.max("sampling/age_max", max(ages))
        return SampledGroups(StepRollouts(trained), generated, metrics)

    def _graded(self, count: int, *, step: int, round: int = 0) -> StepRollouts:
        return self.grader.grade(self.source.take(self.order.next_indices(count), step=step, round=round))

    def _useful(self, rollouts: StepRollouts) -> list[RolloutGroup]:
        reward = training_reward(rollouts, self.config)
        scored = torch.ones_like(reward, dtype=torch.bool) if rollouts.scored is None else rollouts.scored
        useful = useful_groups(reward[scored], rollouts.group[scored], len(rollouts.groups)).tolist()
        return [group for group, keep in zip(rollouts.groups, useful, strict=True) if keep]

    def state_dict(self) -> dict:
        """One JSON text per surplus group instead of nested lists: it is copied before every step."""
        texts = [json.dumps(training_records(group)) for group in self.surplus]
        return {"share": self.share.state_dict(), "kept": texts}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the task of a surplus group is not in the data any more."""
        self.share.load_state_dict(state["share"])
        self.surplus = [self.source.restore(json.loads(text)) for text in state["kept"]]


def join(rounds: Sequence[StepRollouts]) -> StepRollouts:
    """Rounds of generation as one; their times add up."""
    time: dict[str, float] = {}
    for rollouts in rounds:
        for key, seconds in rollouts.time.items():
            time[key] = time.get(key, 0.0) + seconds
    return StepRollouts([group for rollouts in rounds for group in rollouts.groups], time)
