"""Metrics of a run: ``metrics.jsonl`` (the record) and TensorBoard events (the view)."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Appends one JSON object per line and mirrors it to TensorBoard.

    Keys that start with ``time/`` are wall-clock; the rest is equal, bit for bit, for equal seeds on one machine.
    A metric without a value on some step is absent from its line: no placeholders.
    """

    def __init__(self, folder: Path, *, keep_bytes: int = 0):
        """``keep_bytes``: what a resumed run keeps of the file; the steps behind it are done again."""
        path = folder / "metrics.jsonl"
        self._file = path.open("a", encoding="utf-8")
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
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._board.close()
