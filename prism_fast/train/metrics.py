"""Metrics of a run: ``metrics.jsonl`` (the record) and TensorBoard events (the view)."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from prism_fast.models.writing import append_whole
from prism_fast.train.checkpoint import CheckpointError


class MetricsWriter:
    """Appends one JSON object per line and mirrors it to TensorBoard.

    Keys that start with ``time/`` are wall-clock; the rest is equal, bit for bit, for equal seeds on one machine.
    A metric without a value on some step is absent from its line: no placeholders.
    """

    def __init__(self, folder: Path, *, keep_bytes: int = 0):
        """``keep_bytes``: what a resumed run keeps of the file; the steps behind it are done again.

        Raises:
            CheckpointError: the file is shorter than that.
        """
        self.path = folder / "metrics.jsonl"
        if keep_bytes > (self.path.stat().st_size if self.path.exists() else 0):
            raise CheckpointError(
                f"{self.path} is shorter than when the checkpoint was saved ({keep_bytes} bytes); "
                "put the whole file back or start a new run"
            )
        self.path.touch()
        os.truncate(self.path, keep_bytes)
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        self._events = board / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        self._add(Event(file_version="brain.Event:2"))

    def write(self, stage: str, step: int, values: dict[str, float | int | str | None]) -> None:
        """Add a line.

        Raises:
            ValueError: a number is not finite.
            DiskFullError: no room for it; the lines before it stay and nothing of it is left.
        """
        record: dict[str, float | int | str] = {"stage": stage, "step": step}
        shown = []
        for key, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"metric {key!r} of {stage} step {step} is {value}")
            record[key] = value
            if not isinstance(value, str):
                shown.append(Summary.Value(tag=f"{stage}/{key}", simple_value=float(value)))
        self._add(Event(step=step, summary=Summary(value=shown)))
        append_whole(self.path, (json.dumps(record) + "\n").encode())  # last: what stands here has been written whole

    def _add(self, event: Event) -> None:
        # TensorBoard's own writer has a thread, whose errors on a full disk appear beside the one message of a run.
        event.wall_time, framed = time.time(), io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        append_whole(self._events, framed.getvalue())

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size
