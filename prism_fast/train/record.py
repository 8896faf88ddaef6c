"""Records which stages of a run are complete, and where a resumed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prism_fast.models.writing import write_whole
from prism_fast.train.checkpoint import Checkpoint, CheckpointError, latest_checkpoint
from prism_fast.train.recipe_changes import changed_keys

RECORD = "record.json"


@dataclass
class RunRecord:
    """``record.json`` of a run directory; rewritten atomically when a stage or the sampling of pairs is complete.

    ``config``: the configuration that the run began with, as YAML.
    """

    completed: list[str] = field(default_factory=list)
    policy: str | None = None  # newest policy, relative to the run directory if inside
    discriminator: str | None = None
    metrics_bytes: int = 0
    config: str | None = None

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


def new_run(config: str) -> Resume:
    """``config``: as YAML."""
    return Resume(RunRecord(config=config), None)


def refuse_changes(folder: Path, before: str, now: str, owner: str) -> None:
    """Raise CheckpointError if the configuration ``now`` of the run in ``folder`` is not that of ``owner``, ``before``
    (both YAML)."""
    changed = changed_keys(before, now)
    if changed:
        shown = ", ".join(f"{key}={new} (was {old})" for key, (old, new) in changed.items())
        raise CheckpointError(
            f"{folder / 'config.yaml'} is not that of {owner}: {shown}. The steps before and after would be of two "
            "recipes: put it back, or start a new run from an export (model.policy=PATH)"
        )


def read_resume(folder: Path, config: str, *, tell: Callable[[str], None]) -> Resume:
    """Where the run in ``folder`` can go on with ``config`` (YAML); ``tell`` gets a message for every damaged
    checkpoint.

    Raises:
        CheckpointError: ``record.json`` is damaged, or the run began with another configuration.
    """
    path = folder / RECORD
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else RunRecord()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start a new run") from error
    if record.config is not None:
        refuse_changes(folder, record.config, config, "the run's beginning")
    record.config = record.config or config
    checkpoint = latest_checkpoint(folder / "checkpoints", tell=tell)
    if checkpoint is not None and checkpoint.state["stage"] in record.completed:
        checkpoint = None
    return Resume(record, checkpoint)
