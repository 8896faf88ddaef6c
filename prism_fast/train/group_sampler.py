"""The groups an RLVR step trains on: one round of generation, or with dynamic sampling as many as it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.algorithms.dynamic_sampling import UsefulShare, useful_groups
from prism_fast.algorithms.overlong import overlong_penalty
from prism_fast.config import RlvrConfig
from prism_fast.data.order import SampleOrder
from prism_fast.track.metrics import Metrics
from prism_fast.train.grading import Grader
from prism_fast.train.rollout_record import RolloutGroup, training_records
from prism_fast.train.rollouts import RolloutSource, StepRollouts


class NoUsefulGroupError(RuntimeError):
    """Every group that a step generated has equal rewards: there is nothing to learn from."""


@dataclass(frozen=True)
class SampledGroups:
    """A step's groups: those it trains on, and all that were generated in it (``unused``: not trained on now)."""

    trained: StepRollouts
    generated: StepRollouts
    metrics: Metrics

    @property
    def unused(self) -> list[RolloutGroup]:
        trained = {group.origin for group in self.trained.groups}
        return [group for group in self.generated.groups if group.origin not in trained]


def training_reward(rollouts: StepRollouts, config: RlvrConfig) -> Tensor:
    """[B] float32: the checked reward, less the punishment of responses close to the length limit if there is one."""
    return torch.tensor([reward.score for reward in rollouts.rewards]) + length_penalty(rollouts, config)


def length_penalty(rollouts: StepRollouts, config: RlvrConfig) -> Tensor:
    """[B] float32, 0 or less; 0 where ``overlong_buffer`` is 0."""
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
    """Takes a step's groups from ``source``, tasks in the order of ``order``, and has them graded by ``grader``.

    With dynamic sampling a step has ``prompts`` useful groups. Useful ones that a round gave beyond that are kept and
    go first into the next step: they were paid for. By then the policy has moved on, so they are trained on with their
    importance ratio (see ``update_policy``). None waits long: a step generates only when less than a step's worth is
    kept, and at most ``max_oversampling`` steps' worth at once.

    The kept groups and the running share are the state, for checkpoints.
    """

    def __init__(self, source: RolloutSource, grader: Grader, order: SampleOrder, config: RlvrConfig):
        self.source, self.grader, self.order, self.config = source, grader, order, config
        self.kept: list[RolloutGroup] = []
        self.share = UsefulShare()

    def take(self, step: int) -> SampledGroups:
        """
        Raises:
            NoUsefulGroupError: dynamic sampling found no useful group at all.
        """
        if not self.config.dynamic_sampling.enabled:
            rollouts = self._graded(self.config.prompts, step=step)
            return SampledGroups(rollouts, rollouts, Metrics())
        wanted, dynamic = self.config.prompts, self.config.dynamic_sampling
        useful, rounds = self.kept, []
        while len(useful) < wanted and len(rounds) < dynamic.max_rounds:
            count = min(self.share.to_generate(wanted - len(useful)), int(dynamic.max_oversampling * wanted))
            rounds.append(self._graded(count, step=step, round=len(rounds)))
            found = self._useful(rounds[-1])
            self.share.observe(count, len(found))
            useful = [*useful, *found]
        generated = join(rounds)
        if not useful:
            raise NoUsefulGroupError(
                f"rlvr step {step}: in none of the {len(generated.groups)} groups generated in {len(rounds)} rounds do "
                "the rewards differ: every answer right, or every answer wrong. Take harder or easier tasks, more "
                "rollouts per prompt (rlvr.rollout.n), or more rounds (rlvr.dynamic_sampling.max_rounds)"
            )
        trained, self.kept = useful[:wanted], useful[wanted:]
        new = len([group for group in useful if group.origin.step == step])
        ages = [step - group.origin.step for group in trained]
        metrics = Metrics()
        metrics.sum("sampling/generated", len(generated.groups))
        metrics.mean("sampling/useful_share", new, len(generated.groups))
        metrics.mean("sampling/expected_share", self.share.share)
        metrics.max("sampling/rounds", len(rounds))
        metrics.sum("sampling/missing", wanted - len(trained))
        metrics.sum("sampling/banked", len(self.kept))
        metrics.mean("sampling/age_mean", sum(ages), len(ages))
        metrics.max("sampling/age_max", max(ages))
        return SampledGroups(StepRollouts(trained), generated, metrics)

    def _graded(self, count: int, *, step: int, round: int = 0) -> StepRollouts:
        return self.grader.grade(self.source.take(self.order.next_indices(count), step=step, round=round))

    def _useful(self, rollouts: StepRollouts) -> list[RolloutGroup]:
        reward = training_reward(rollouts, self.config)
        useful = useful_groups(reward, rollouts.group, len(rollouts.groups)).tolist()
        return [group for group, keep in zip(rollouts.groups, useful, strict=True) if keep]

    def state_dict(self) -> dict:
        """A text per kept group, not nested lists: cheap to copy before every step."""
        return {"share": self.share.state_dict(), "kept": [json.dumps(training_records(group)) for group in self.kept]}

    def load_state_dict(self, state: dict) -> None:
        """ValueError if a kept group's task is not in the data any more."""
        self.share.load_state_dict(state["share"])
        self.kept = [self.source.restore(json.loads(text)) for text in state["kept"]]


def join(rounds: Sequence[StepRollouts]) -> StepRollouts:
    """Rounds of generation as one; their times add up."""
    time: dict[str, float] = {}
    for rollouts in rounds:
        for key, seconds in rollouts.time.items():
            time[key] = time.get(key, 0.0) + seconds
    return StepRollouts([group for rollouts in rounds for group in rollouts.groups], time)
