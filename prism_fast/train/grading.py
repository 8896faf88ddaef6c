"""Rewards of rollouts, by the reward functions of their data sources."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from prism_fast.data.samples import Task
from prism_fast.rewards import Judged, Reward, SourceRewards
from prism_fast.train.rollout_record import Origin, RolloutGroup
from prism_fast.train.rollouts import StepRollouts


class Grader:
    def __init__(self, checker: SourceRewards):
        self._checker = checker
        self._begun: dict[Origin, Future[list[Reward]]] = {}

    def begin(self, group: RolloutGroup) -> None:
        """Start grading ``group`` while others are generated; `grade` waits for it."""
        rewards = self._checker.begin([judged(group.task, split.text) for split in group.splits])
        if rewards is not None:
            self._begun[group.origin] = rewards

    def grade(self, rollouts: StepRollouts) -> StepRollouts:
        """The same rollouts, each with a reward. Groups with rewards (of a dump or a checkpoint) keep theirs."""
        started = time.perf_counter()
        if all(group.rewards is not None for group in rollouts.groups):
            return rollouts
        rollouts = StepRollouts([self._finished(group) for group in rollouts.groups], rollouts.time)
        ungraded = [group for group in rollouts.groups if group.rewards is None]
        rewards = iter(
            self.score(
                [group.task for group in ungraded for _ in group.splits],
                [split.text for group in ungraded for split in group.splits],
            )
        )
        groups = [
            group if group.rewards is not None else replace(group, rewards=[next(rewards) for _ in group.splits])
            for group in rollouts.groups
        ]
        return StepRollouts(groups, rollouts.time | {"time/reward": time.perf_counter() - started})

    def _finished(self, group: RolloutGroup) -> RolloutGroup:
        begun = self._begun.pop(group.origin, None)
        return group if begun is None else replace(group, rewards=begun.result())

    def score(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Reward]:
        """The reward of each of ``texts``, a response to the task in the same place."""
        return self._checker.score([judged(task, text) for text, task in zip(texts, tasks, strict=True)])


def judged(task: Task, text: str) -> Judged:
    """A response to a task, as reward functions get it."""
    return Judged(
        text,
        task.ground_truth,
        task.data_source,
        task.equivalent_answers,
        task.question,
        uid=task.uid,
        messages=task.messages,
        columns={"kind": task.kind, "cluster": task.cluster, **task.extra},
    )
