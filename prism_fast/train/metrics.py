"""Metrics of a run: ``metrics.jsonl`` (the record) and TensorBoard events (the view)."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from prism_fast.models.writing import disk_full
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
        self._file = self.path.open("ab", buffering=0)  # what a write did not take is known at once
        self._file.truncate(keep_bytes)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: dict[str, float | int | str | None]) -> None:
        record: dict[str, float | int | str] = {"stage": stage, "step": step}
        for key, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"metric {key!r} of {stage} step {step} is {value}")
            record[key] = value
            if not isinstance(value, str):
                self._board.add_scalar(f"{stage}/{key}", value, step)
        self._append((json.dumps(record) + "\n").encode())

    def _append(self, line: bytes) -> None:
        """Raises DiskFullError, with the lines before untouched and nothing of this one left."""
        size = self.size()
        with disk_full(self.path, len(line)):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(size)
                raise

    def size(self) -> int:
        """Bytes written so far."""
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()
        self._board.close()
