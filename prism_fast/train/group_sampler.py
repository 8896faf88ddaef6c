"""The groups an RLVR step trains on: from one round of generation, or with dynamic sampling from several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.algorithms.dynamic_sampling import UsefulShare, useful_groups
from prism_fast.algorithms.overlong import overlong_penalty
from prism_fast.config import RlvrConfig
from prism_fast.data.order import MixedOrder, SampleOrder
from prism_fast.engine.world import World
from prism_fast.track.metrics import Metrics
from prism_fast.train.grading import Grader
from prism_fast.train.rollout_record import Origin, RolloutGroup, training_records
from prism_fast.train.rollouts import RolloutSource, StepRollouts


class NoUsefulGroupError(RuntimeError):
    """Too few groups that a step generated have rewards that differ: there is nothing to learn from."""


@dataclass(frozen=True)
class SampledGroups:
    """This rank's groups of a step: those it trains on, and those that it generated (``unused``: those that no rank
    trains on). ``origins``: of the groups that all ranks train on; every rank has ``per_rank`` of them or one more."""

    trained: StepRollouts
    generated: StepRollouts
    origins: frozenset[Origin]
    per_rank: int
    metrics: Metrics

    @property
    def unused(self) -> list[RolloutGroup]:
        return [group for group in self.generated.groups if group.origin not in self.origins]


class Useful(NamedTuple):
    """A group whose rewards differ: the group, or where another rank sampled it the JSON text of its records."""

    origin: Origin
    group: RolloutGroup | None
    text: str | None


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

    Ranks sample their shares of a round and then all know all useful groups, in one order, so that each trains on as
    many of them as the others, and any number of ranks keeps the same surplus.
    """

    def __init__(
        self,
        source: RolloutSource,
        grader: Grader,
        order: SampleOrder | MixedOrder,
        config: RlvrConfig,
        world: World | None = None,
    ) -> None:
        """``world``: None: of one rank."""
        self.source, self.grader, self.order, self.config = source, grader, order, config
        self.world = World() if world is None else world
        self.surplus: list[Useful] = []
        self.share = UsefulShare()

    def take(self, step: int) -> SampledGroups:
        """Joint. The groups of a step.

        Raises:
            NoUsefulGroupError: dynamic sampling found no useful group at all, or not one for each rank.
        """
        if not self.config.dynamic_sampling.enabled:
            rollouts = self._graded(self.config.prompts, step=step)
            origins = frozenset(group.origin for group in rollouts.groups)  # nothing else is generated
            return SampledGroups(rollouts, rollouts, origins, len(rollouts.groups), Metrics())
        wanted, dynamic = self.config.prompts, self.config.dynamic_sampling
        useful, rounds, generated_everywhere = self.surplus, [], 0
        while len(useful) < wanted and len(rounds) < dynamic.max_rounds:
            count = min(self.share.to_generate(wanted - len(useful)), int(dynamic.max_oversampling * wanted))
            count = -(-count // self.world.size) * self.world.size
            rounds.append(self._graded(count, step=step, round=len(rounds)))
            generated_everywhere += count
            new = self._everywhere(self._useful(rounds[-1]))
            self.share.observe(count, len(new))
            useful = [*useful, *new]
        generated = join(rounds)
        if len(useful) < self.world.size:
            found = "none" if not useful else f"only {len(useful)}"
            each = "" if not useful else f", and each of {self.world.size} ranks needs one"
            raise NoUsefulGroupError(
                f"{self.source.stage} step {step}: in {found} of the {generated_everywhere} groups generated in "
                f"{len(rounds)} rounds do the rewards differ{each}: every answer right, or every answer wrong. Take "
                "harder or easier tasks, more rollouts per prompt (rlvr.rollout.n), or more rounds "
                "(rlvr.dynamic_sampling.max_rounds)"
            )
        trained, self.surplus = useful[:wanted], useful[wanted:]
        sampled_now = sum(one.origin.step == step for one in useful)
        ages = [step - one.origin.step for one in trained]
        metrics = Metrics()
        metrics.sum("sampling/generated", len(generated.groups))
        metrics.mean("sampling/useful_share", sampled_now, generated_everywhere)
        metrics.mean("sampling/expected_share", self.share.share)
        metrics.max("sampling/rounds", len(rounds))
        metrics.last("sampling/missing", wanted - len(trained))
        metrics.last("sampling/banked", len(self.surplus))
        metrics.mean("sampling/age_mean", sum(ages), len(ages))
        metrics.max("sampling/age_max", max(ages))
        mine = StepRollouts([self._group(one) for one in self.world.share(trained)])
        origins = frozenset(one.origin for one in trained)
        return SampledGroups(mine, generated, origins, len(trained) // self.world.size, metrics)

    def _graded(self, count: int, *, step: int, round: int = 0) -> StepRollouts:
        return self.grader.grade(self.source.take(self.order.next_indices(count), step=step, round=round))

    def _useful(self, rollouts: StepRollouts) -> list[RolloutGroup]:
        reward = training_reward(rollouts, self.config)
        scored = torch.ones_like(reward, dtype=torch.bool) if rollouts.scored is None else rollouts.scored
        useful = useful_groups(reward[scored], rollouts.group[scored], len(rollouts.groups)).tolist()
        return [group for group, keep in zip(rollouts.groups, useful, strict=True) if keep]

    def _everywhere(self, groups: Sequence[RolloutGroup]) -> list[Useful]:
        """Joint. The useful groups of all ranks."""
        mine = [Useful(group.origin, group, None) for group in groups]
        if self.world.size == 1:
            return mine
        of_ranks = self.world.gather([[asdict(group.origin), json.dumps(training_records(group))] for group in groups])
        of_ranks = [[Useful(Origin(**origin), None, text) for origin, text in of_rank] for of_rank in of_ranks]
        of_ranks[self.world.rank] = mine
        return [useful for of_rank in of_ranks for useful in of_rank]

    def _group(self, useful: Useful) -> RolloutGroup:
        return self.source.restore(json.loads(useful.text)) if useful.group is None else useful.group

    def state_dict(self) -> dict:
        """One JSON text per surplus group instead of nested lists: it is copied before every step."""
        texts = [json.dumps(training_records(one.group)) if one.text is None else one.text for one in self.surplus]
        return {"share": self.share.state_dict(), "kept": texts}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the task of a surplus group is not in the data any more."""
        self.share.load_state_dict(state["share"])
        groups = [self.source.restore(json.loads(text)) for text in state["kept"]]
        self.surplus = [Useful(group.origin, group, None) for group in groups]


def join(rounds: Sequence[StepRollouts]) -> StepRollouts:
    """Rounds of generation as one; their times add up."""
    time: dict[str, float] = {}
    for rollouts in rounds:
        for key, seconds in rollouts.time.items():
            time[key] = time.get(key, 0.0) + seconds
    return StepRollouts([group for rollouts in rounds for group in rollouts.groups], time)
