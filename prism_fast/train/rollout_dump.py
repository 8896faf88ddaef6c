"""Dumps of rollouts: every few steps, and always when a step fails with a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from prism_fast.engine.finite import NonFiniteError
from prism_fast.train.discriminator_trainer import GroupScores
from prism_fast.train.rollout_gap import RolloutGapError
from prism_fast.train.rollout_log import RolloutLog
from prism_fast.train.rollout_record import RolloutGroup, training_records
from prism_fast.train.rollouts import StepRollouts
from prism_fast.train.state import StageState


@dataclass
class Findings:
    """Results of a step about its rollouts, filled in as it computes them."""

    advantage: Tensor | None = None  # [B]
    scores: dict[str, Tensor] | None = None  # by span, [B]
    teacher_scores: dict[str, Tensor] | None = None  # by span, [G]

    def note_scores(self, spans: Sequence[str], scores: GroupScores) -> None:
        """Set the discriminator's scores."""
        self.scores = dict(zip(spans, scores.student.unbind(dim=1), strict=True))
        self.teacher_scores = dict(zip(spans, scores.teacher.unbind(dim=1), strict=True))


@contextmanager
def dumped(
    state: StageState, rollouts: StepRollouts, *, last_step: int, also: Sequence[RolloutGroup] = ()
) -> Iterator[Findings]:
    """Dump the rollouts after the block if the step is the first, the last or due, and always on NonFiniteError and
    RolloutGapError.

    Args:
        rollouts: those that the step trains on.
        also: groups that the step sampled but does not train on; a replay needs them.

    Raises:
        NonFiniteError, RolloutGapError: that of the block, with the path of the dump.
    """
    findings = Findings()
    try:
        yield findings
    except (NonFiniteError, RolloutGapError) as error:
        write_step(state.log, state.step, rollouts, findings, also)
        raise type(error)(f"{error}. The rollouts of the step are the last ones in {state.log.path}") from error
    if state.step % state.run.config.dump_rollouts_every == 0 or state.step in (1, last_step):
        write_step(state.log, state.step, rollouts, findings, also)


def write_step(
    log: RolloutLog, step: int, rollouts: StepRollouts, findings: Findings, also: Sequence[RolloutGroup] = ()
) -> None:
    """Joint. Append the records of a step: those of ``rollouts`` in their order, rank by rank, then ``also``."""
    trained = [_shown(group, log) for group in rollouts.groups]
    flat = [record for group in trained for record in group]
    for b in range(len(rollouts.completions)):
        g = int(rollouts.group[b])
        valid = rollouts.splits[b].valid
        flat[b] |= {
            "advantage": None if findings.advantage is None else float(findings.advantage[b]),
            "scores": {k: float(v[b]) for k, v in findings.scores.items()} if findings.scores and valid else {},
            "teacher_scores": findings.teacher_scores and {k: float(v[g]) for k, v in findings.teacher_scores.items()},
        }
    ranks = log.world.gather([trained, [_shown(group, log) for group in also]])
    groups = [group for kind in zip(*ranks, strict=True) for of_rank in kind for group in of_rank]
    records = [{**record, "group": g} for g, group in enumerate(groups) for record in group]
    log.world.on_first(lambda: log.write(step, records))


def _shown(group: RolloutGroup, log: RolloutLog) -> list[dict]:
    """The training records of a group, with the fields that the report shows."""
    task = group.task
    shared = {
        "group": 0,  # its place among all, given when it is written
        "question": task.question,
        "kind": task.kind,
        "images": [log.image(image) for image in task.images],
        "ground_truth": task.ground_truth,
        "teacher": {"caption": task.teacher_caption, "reasoning": task.teacher_cot} if task.teacher_caption else None,
    }
    return [
        {
            **record,
            **shared,
            "text": split.text,
            "valid": split.valid,
            "spans": {name: list(span) for name, span in split.char_spans.items()},
            "tokens": len(completion.token_ids),
        }
        for record, split, completion in zip(training_records(group), group.splits, group.completions, strict=True)
    ]
