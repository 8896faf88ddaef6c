"""Warm-up pairs that a run samples itself: the student's texts for the run's own alignment tasks.

A line names its task and holds only the student's texts; prompt, images and teacher come from the task, so that nothing
is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prism_fast.config import ConfigError
from prism_fast.data.samples import Pair, Samples, Task
from prism_fast.models.writing import write_whole


@dataclass(frozen=True)
class OwnPair:
    """The policy's response number ``response`` to task ``index``, cut into the spans of ``data.framing``."""

    index: int
    uid: str
    response: int
    student_caption: str
    student_cot: str
    student_response: str


def write_own_pairs(path: Path, pairs: Iterable[OwnPair]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))


def read_own_pairs(path: Path, tasks: Samples[Task]) -> OwnPairs:
    """The pairs of ``write_own_pairs``, joined with the tasks they were sampled for.

    Raises:
        ConfigError: the tasks are not those of the pairs.
    """
    pairs = [OwnPair(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for pair in pairs:
        uid = tasks.without_images(pair.index).uid if pair.index < len(tasks) else "none"
        if uid != pair.uid:
            raise ConfigError(
                f"{path} was sampled for data.align with task {pair.uid!r} in place {pair.index}, now it is {uid!r}: "
                "give the run its own data.align again, or start a new run"
            )
    return OwnPairs(pairs, tasks)


class OwnPairs(Sequence[Pair]):
    """Pairs in order; indexing one decodes the images of its task."""

    def __init__(self, pairs: Sequence[OwnPair], tasks: Sequence[Task]) -> None:
        self._pairs, self._tasks = pairs, tasks

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        own = self._pairs[index]
        task = self._tasks[own.index]
        return Pair(
            uid=f"{own.uid}-{own.response}",
            messages=task.messages,
            images=task.images,
            teacher_caption=task.teacher_caption,
            student_caption=own.student_caption,
            teacher_cot=task.teacher_cot,
            student_cot=own.student_cot,
            teacher_response=task.teacher_response,
            student_response=own.student_response,
        )
