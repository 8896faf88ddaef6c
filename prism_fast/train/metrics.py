"""Metrics of a run: ``metrics.jsonl`` (the record) and TensorBoard events (the view)."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from prism_fast.models.writing import append_whole, disk_full
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
        self._board_folder = folder / "tensorboard"
        self._board = SummaryWriter(str(self._board_folder))

    def write(self, stage: str, step: int, values: dict[str, float | int | str | None]) -> None:
        """Add a line.

        Raises:
            ValueError: a number is not finite.
            DiskFullError: no room for it; the lines before it stay and nothing of it is left.
        """
        record: dict[str, float | int | str] = {"stage": stage, "step": step}
        for key, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"metric {key!r} of {stage} step {step} is {value}")
            record[key] = value
            if not isinstance(value, str):
                with disk_full(self._board_folder):  # what its thread met while it wrote comes up here
                    self._board.add_scalar(f"{stage}/{key}", value, step)
        append_whole(self.path, (json.dumps(record) + "\n").encode())

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def close(self) -> None:
        with disk_full(self._board_folder):
            self._board.close()
