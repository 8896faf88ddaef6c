"""Replay: the rollouts and rewards of another run in place of new ones, so nothing is generated or graded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config, load_config, sampling_of
from prism_fast.data.samples import Task
from prism_fast.models.processor import Processor, Prompt
from prism_fast.train.context import grading_rules
from prism_fast.train.rollout_log import RolloutLogError, RolloutReader, dump_path, image_digest
from prism_fast.train.rollout_record import Origin, RolloutGroup, group_from_records


def check_replay(config: Config) -> None:
    """Raise RolloutLogError if the run that ``config.replay`` names cannot be replayed in a stage of this one."""
    for stage in ("align", "rlvr", "rlvr_direct"):
        if config.replay is not None and stage in config.stages:
            Replay(Path(config.replay), stage, config)


def _grading(config: Config) -> dict[str, object]:
    """The settings that decide whether an answer is right. Limits of time and memory are not among them: a recorded
    timeout is replayed."""
    reward = config.reward
    judge = (reward.judge.url, reward.judge.model)
    return {
        "rules": grading_rules(config),
        "reward.max_answer_chars": reward.max_answer_chars,
        "reward.judge": judge,
        "reward.functions": dict(reward.functions),
    }


class Replay:
    """The groups that the run in ``folder`` sampled in a stage, by origin."""

    def __init__(self, folder: Path, stage: str, config: Config):
        """``config``: of the run that replays.

        Raises:
            RolloutLogError: that run has no rollouts of the stage, or sampled or graded with other settings.
        """
        recorded = folder / "config.yaml"
        if not recorded.is_file():
            raise RolloutLogError(f"replay: {folder} is not a run directory (it has no config.yaml)")
        theirs = load_config(str(recorded))
        sampling = sampling_of(config, stage)
        if (used := sampling_of(theirs, stage)) != sampling:
            raise RolloutLogError(f"replay: {folder} sampled {stage} with {used}, this run asks for {sampling}")
        if (used := _grading(theirs)) != (asked := _grading(config)):
            raise RolloutLogError(
                f"replay: {folder} graded its answers with {used}, this run asks for {asked}; recorded rewards are "
                "not graded again"
            )
        self.stage, self.sampling = stage, sampling
        self._published = SEMANTICS[config.semantics].published_grammar
        self._reader = RolloutReader(dump_path(folder, stage))
        self._step, self._records = 0, []

    def groups(
        self,
        indices: Sequence[int],
        tasks: Sequence[Task],
        prompts: Sequence[Prompt],
        origins: Sequence[Origin],
        processor: Processor,
        *,
        everywhere: int,
    ) -> list[RolloutGroup]:
        """The recorded groups of ``origins`` (of one round of one step), checked to be those of ``tasks``.
        ``everywhere``: how many groups the round has on all ranks together.

        Raises:
            RolloutLogError: the step is missing or damaged, or holds other tasks, prompts, images or counts.
        """
        step, round = origins[0].step, origins[0].round
        where = f"{self._reader.path}, step {step}"
        if step != self._step:
            self._step, self._records = step, self._reader.step(step)
        recorded = self._of_round(step, round)
        if len(recorded) != everywhere or not set(origins) <= set(recorded):
            raise RolloutLogError(
                f"{where}: round {round} holds {len(recorded)} groups where this run has {len(origins)}: "
                "other prompts per step or other sampling of groups"
            )
        groups = []
        for index, task, prompt, origin in zip(indices, tasks, prompts, origins, strict=True):
            records = recorded[origin]
            if len(records) != self.sampling.n:
                raise RolloutLogError(f"{where}: uid {task.uid!r} has {len(records)} of {self.sampling.n} rollouts")
            try:
                group = group_from_records(records, task, prompt, processor, published=self._published)
            except ValueError as error:
                raise RolloutLogError(f"{where}: {error}") from error
            if group.index != index or records[0]["images"] != [image_digest(image) for image in task.images]:
                raise RolloutLogError(f"{where}: uid {task.uid!r} has another row or another image in this run's data")
            groups.append(group)
        return groups

    def _of_round(self, step: int, round: int) -> dict[Origin, list[dict]]:
        """Records by origin, without groups that an earlier step sampled and this one only trained on."""
        groups: dict[Origin, list[dict]] = {}
        for record in self._records:
            origin = Origin(**record["sampled"])
            if (origin.step, origin.round) == (step, round):
                groups.setdefault(origin, []).append(record)
        return groups
