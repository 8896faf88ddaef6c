"""Records which stages of a run are complete, and where a resumed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prism_fast.models.writing import write_whole
from prism_fast.train.checkpoint import Checkpoint, CheckpointError, latest_checkpoint

RECORD = "record.json"


@dataclass
class RunRecord:
    """``record.json`` of a run directory; rewritten atomically when a stage or the sampling of pairs is complete."""

    completed: list[str] = field(default_factory=list)
    policy: str | None = None  # newest policy, relative to the run directory if inside
    discriminator: str | None = None
    metrics_bytes: int = 0

    def write(self, folder: Path) -> None:
        write_whole(folder / RECORD, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class Resume:
    """Where to go on: the run's record, and the checkpoint inside the unfinished stage, if there is one."""

    record: RunRecord
    checkpoint: Checkpoint | None

    def checkpoint_of(self, stage: str) -> Checkpoint | None:
        return self.checkpoint if self.checkpoint is not None and self.checkpoint.state["stage"] == stage else None

    def metrics_bytes(self) -> int:
        """Bytes of ``metrics.jsonl`` to keep; later lines belong to steps that are done again."""
        return self.record.metrics_bytes if self.checkpoint is None else self.checkpoint.state["metrics_bytes"]


def new_run() -> Resume:
    return Resume(RunRecord(), None)


def read_resume(folder: Path, *, tell: Callable[[str], None]) -> Resume:
    """Where the run in ``folder`` can go on; ``tell`` gets a message for every damaged checkpoint.

    Raises:
        CheckpointError: ``record.json`` is damaged.
    """
    path = folder / RECORD
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else RunRecord()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start a new run") from error
    checkpoint = latest_checkpoint(folder / "checkpoints", tell=tell)
    if checkpoint is not None and checkpoint.state["stage"] in record.completed:
        checkpoint = None
    return Resume(record, checkpoint)
