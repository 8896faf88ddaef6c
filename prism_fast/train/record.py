"""Records which stages of a run are complete, and where a resumed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prism_fast.models.writing import write_whole
from prism_fast.train.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, trusted_checkpoint
from prism_fast.train.recipe_changes import LENGTHS, changed_keys, raised_lengths, why_not_longer

RECORD = "record.json"
CONVERT = (
    "Sums are then rounded in another order, so the run goes on within rounding and not with the same bits; to do so, "
    "ask for it: prism-fast resume RUN --convert-ranks"
)


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
    # What each stage began with, policy and discriminator: where it begins again if it is made longer.
    began: dict[str, list[str | None]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_whole(folder / RECORD, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class Resume:
    """Where to go on: the run's record, and the checkpoint inside the unfinished stage, if there is one."""

    record: RunRecord
    checkpoint: Checkpoint | None
    longer: bool = False  # whether a stage gets more steps than it began with
    convert: bool = False  # whether the checkpoint may be of another number of ranks or of another engine

    def checkpoint_of(self, stage: str) -> Checkpoint | None:
        return self.checkpoint if self.checkpoint is not None and self.checkpoint.state["stage"] == stage else None

    def plain(self) -> dict:
        """For :func:`told`."""
        path = None if self.checkpoint is None else str(self.checkpoint.path)
        return {"record": asdict(self.record), "checkpoint": path, "longer": self.longer, "convert": self.convert}

    def metrics_bytes(self) -> int:
        """Bytes of ``metrics.jsonl`` to keep; later lines belong to steps that are done again."""
        return self.record.metrics_bytes if self.checkpoint is None else self.checkpoint.state["metrics_bytes"]


def told(plain: dict) -> Resume:
    """What the rank that read the run directory found, whose checkpoint is not checked again."""
    path = plain["checkpoint"]
    checkpoint = None if path is None else trusted_checkpoint(Path(path))
    return Resume(RunRecord(**plain["record"]), checkpoint, plain["longer"], plain["convert"])


def new_run(config: str) -> Resume:
    """``config``: as YAML."""
    return Resume(RunRecord(config=config), None)


def refuse_changes(folder: Path, before: str, now: str, owner: str, *, convert: bool = False) -> None:
    """Raise CheckpointError if the configuration ``now`` of the run in ``folder`` is not that of ``owner``, ``before``
    (both YAML). A stage may have got more steps, where its learning rate does not depend on their number. ``convert``:
    ``engine.*`` may differ."""
    changed = {key: values for key, values in changed_keys(before, now).items() if not (convert and engine_key(key))}
    for key, (old, new) in raised_lengths(before, now).items():
        if (reason := why_not_longer(key, now)) is not None:
            raise CheckpointError(
                f"{key}={new} (was {old}) cannot be raised: {reason}. Put it back, or start a new run"
            )
        del changed[key]
    if changed and all(map(engine_key, changed)):
        shown = ", ".join(f"{key}={new} (was {old})" for key, (old, new) in changed.items())
        raise CheckpointError(f"{owner} was of another engine: {shown}. {CONVERT}")
    if changed:
        shown = ", ".join(f"{key}={new} (was {old})" for key, (old, new) in changed.items())
        raise CheckpointError(
            f"{folder / 'config.yaml'} is not that of {owner}: {shown}. The steps before and after would be of two "
            "recipes: put it back, or start a new run from an export (model.policy=PATH)"
        )


def _reopen(record: RunRecord, key: str, checkpoint: Checkpoint | None) -> None:
    """Let the stage of ``key`` go on where it was complete.

    Raises:
        CheckpointError: a later stage has begun from its export, or its last checkpoint is gone.
    """
    stage = LENGTHS[key]
    if stage not in record.completed:
        return
    newest = None if checkpoint is None else checkpoint.state["stage"]
    if record.completed[-1] != stage or newest != stage or stage not in record.began:
        raise CheckpointError(
            f"{key} cannot be raised: {stage} is complete, and a later stage has begun from its export or its last "
            "checkpoint is gone. Start a new run from the export (model.policy=PATH)"
        )
    record.completed.remove(stage)
    record.policy, record.discriminator = record.began[stage]


def engine_key(key: str) -> bool:
    return key.startswith("engine.")


def read_resume(
    folder: Path, config: str, *, tell: Callable[[str], None], ranks: int = 1, convert: bool = False
) -> Resume:
    """Where the run in ``folder`` can go on with ``config`` (YAML) on so many ``ranks``; ``tell`` gets a message for
    every damaged checkpoint. ``convert``: also from a checkpoint of another number of ranks or of another engine.

    Raises:
        CheckpointError: ``record.json`` is damaged, the run began with another configuration, or its newest checkpoint
            is of another number of ranks.
    """
    path = folder / RECORD
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else RunRecord()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start a new run") from error
    if record.config is not None:
        refuse_changes(folder, record.config, config, "the run's beginning", convert=convert)
    raised = {} if record.config is None else raised_lengths(record.config, config)
    record.config = config if convert or raised else record.config or config
    checkpoint = latest_checkpoint(folder / "checkpoints", tell=tell)
    for key in raised:
        _reopen(record, key, checkpoint)
    if checkpoint is not None and checkpoint.state["stage"] in record.completed:
        checkpoint = None
    if checkpoint is not None and not convert and (before := checkpoint.state.get("ranks", 1)) != ranks:
        raise CheckpointError(f"{checkpoint.path.name} was saved by {before} rank(s), now there are {ranks}. {CONVERT}")
    return Resume(record, checkpoint, bool(raised), convert)
