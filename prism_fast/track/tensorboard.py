"""TensorBoard events: a view of the metrics that needs no other package."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from prism_fast.models.writing import append_whole


class TensorBoard:
    """Writes into ``<run directory>/tensorboard``, one file per process."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, purge_from: int = 0):
        """``purge_from``: TensorBoard drops the values of earlier processes at this step and later ones."""
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names, so a new one must sort after the others.
        older = [int(path.name.split(".")[3]) for path in board.glob("events.out.tfevents.*")]
        stamp = max([int(time.time()), *(number + 1 for number in older)])
        self._events = board / f"events.out.tfevents.{stamp}.{os.getpid()}"
        self._add(Event(file_version="brain.Event:2"))
        # The first session of a directory purges nothing; each later one purges from its step on.
        self._add(Event(step=purge_from, session_log=SessionLog(status=SessionLog.START)))

    def show(self, step: int, values: Mapping[str, int | float]) -> None:
        shown = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=shown)))

    def close(self, *, failed: bool) -> None:
        """Nothing to do: every event is written at once."""

    def _add(self, event: Event) -> None:
        # TensorBoard's own writer has a thread that prints errors of its own on a full disk, beside the run's message.
        event.wall_time, framed = time.time(), io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        append_whole(self._events, framed.getvalue())
