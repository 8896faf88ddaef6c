"""A training step's rollouts: sampled by the policy or taken from another run's dump, and cut into their spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import SamplingConfig
from prism_fast.data.grammar import ResponseSplit, split_tokens
from prism_fast.data.samples import Task
from prism_fast.models.processor import Processor, Prompt
from prism_fast.rewards import Reward, failures, summed_parts
from prism_fast.rollout.protocol import Completion, Rollout, Sampling
from prism_fast.track.metrics import Metrics
from prism_fast.train.context import Run
from prism_fast.train.replay import Replay
from prism_fast.train.rollout_record import Origin, RolloutGroup, group_from_records
from prism_fast.train.seeds import derive_seed


@dataclass(frozen=True)
class StepRollouts:
    """The groups of a step. Flat views hold the B = groups x n rollouts, group by group."""

    groups: Sequence[RolloutGroup]
    time: dict[str, float] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> list[Task]:
        return [group.task for group in self.groups]

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.groups]

    @cached_property
    def group(self) -> Tensor:
        """[B] int64, index into groups."""
        return torch.tensor([g for g, group in enumerate(self.groups) for _ in group.completions], dtype=torch.int64)

    @cached_property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    @cached_property
    def splits(self) -> list[ResponseSplit]:
        return [split for group in self.groups for split in group.splits]

    @cached_property
    def rewards(self) -> list[Reward]:
        """Of graded groups (`grading.Grader`)."""
        return [reward for group in self.groups for reward in group.rewards]

    @cached_property
    def scored(self) -> Tensor | None:
        """[B] bool, rollouts whose reward has a score; None: all."""
        scored = [reward.score is not None for reward in self.rewards]
        return None if all(scored) else torch.tensor(scored)

    def of_group(self, g: int) -> list[tuple[ResponseSplit, Completion]]:
        return list(zip(self.groups[g].splits, self.groups[g].completions, strict=True))

    def reward_metrics(self) -> Metrics:
        metrics = Metrics()
        for reward in self.rewards:
            if reward.score is not None:
                metrics.mean("reward/mean", reward.score)
                metrics.mean("reward/acc", reward.accuracy)
            metrics.mean("reward/format", reward.format)
        for name, (total, count) in summed_parts(self.rewards).items():
            metrics.mean(f"reward/parts/{name}", total, count)
        for kind, count in failures(self.rewards).items():
            metrics.sum(f"reward/{kind}", count)
        return metrics


class RolloutSource:
    """Gives a stage its rollouts: sampled from the current policy, or with ``replay`` read from another run's dump.
    Sampled ones have no rewards yet; replayed ones have those of the dump."""

    def __init__(
        self,
        run: Run,
        stage: str,
        engine: Rollout,
        processor: Processor,
        tasks: Sequence[Task],
        sampling: SamplingConfig,
        *,
        finished: Callable[[RolloutGroup], None] | None = None,
    ):
        """``engine``: the run's rollout engine, attached to the stage's policy. ``finished``: called with each group
        while others are generated, where the engine can.

        Raises:
            RolloutLogError: ``replay`` names a run without rollouts of this stage, or with other sampling or grading.
        """
        self.run, self.stage, self.engine, self.processor = run, stage, engine, processor
        self.tasks, self.sampling = tasks, sampling
        self._finished = finished if engine.streams else None
        self._published = SEMANTICS[run.config.semantics].published_grammar
        folder = run.config.replay
        self.replay = None if folder is None else Replay(Path(folder), stage, run.config)

    def take(self, indices: Sequence[int], *, step: int, round: int = 0) -> StepRollouts:
        """``sampling.n`` responses to each of the tasks ``indices``, or on several ranks to this rank's share of them.
        A response does not depend on the number of ranks.

        Args:
            round: which of the step's calls this is, from 0.
        """
        started = time.perf_counter()
        everywhere = len(indices)
        origins = self.run.world.share([Origin(step, round, place) for place in range(everywhere)])
        indices = self.run.world.share(indices)
        tasks = [self.tasks[i] for i in indices]
        prompts = [self.processor.encode_prompt(task.messages, task.images) for task in tasks]
        if self.replay is not None:
            groups = self.replay.groups(indices, tasks, prompts, origins, self.processor, everywhere=everywhere)
            return StepRollouts(groups, {"time/replay": time.perf_counter() - started})
        groups: dict[int, RolloutGroup] = {}

        def complete(place: int, completions: list[Completion]) -> None:
            splits = [self._split(completion) for completion in completions]
            task, prompt, origin = tasks[place], prompts[place], origins[place]
            groups[place] = RolloutGroup(indices[place], task, prompt, completions, splits, origin)
            if self._finished is not None:
                self._finished(groups[place])

        self._generate(prompts, origins, complete)
        seconds = {"time/generate": time.perf_counter() - started}
        return StepRollouts([groups[place] for place in range(len(tasks))], seconds)

    def restore(self, records: Sequence[dict]) -> RolloutGroup:
        """A group of this stage from its records in a checkpoint.

        Raises:
            ValueError: the data has another task at that index.
        """
        index = records[0]["index"]
        if index >= len(self.tasks):
            raise ValueError(f"the checkpoint keeps rollouts of row {index}, the data has {len(self.tasks)} rows")
        task = self.tasks[index]
        prompt = self.processor.encode_prompt(task.messages, task.images)
        return group_from_records(records, task, prompt, self.processor, published=self._published)

    def _split(self, completion: Completion) -> ResponseSplit:
        return split_tokens(completion.token_ids, self.processor.tokenizer, published=self._published)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        origins: Sequence[Origin],
        finished: Callable[[int, list[Completion]], None],
    ) -> None:
        config, stop, seed = self.sampling, self.run.stop, self.run.config.seed
        self.engine.generate(
            prompts,
            Sampling(config.n, config.temperature, config.max_new_tokens),
            [derive_seed(seed, self.stage, "rollout", o.step, o.round, o.place) for o in origins],
            poll=lambda: stop.poll(f"{self.stage} step {origins[0].step}, while generating"),
            finished=finished,
        )
