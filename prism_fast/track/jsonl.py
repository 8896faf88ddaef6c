"""The record of a run's metrics: ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prism_fast.models.writing import append_whole

Value = int | float | str | None


class RecordError(RuntimeError):
    """``metrics.jsonl`` of a run to be resumed was changed; the message says what to do."""


class Record:
    """Appends lines, each whole or not at all."""

    def __init__(self, folder: Path, *, keep_bytes: int = 0):
        """``keep_bytes``: bytes of the file that a resumed run keeps; later steps are done again.

        Raises:
            RecordError: the file is shorter than that.
        """
        self.path = folder / "metrics.jsonl"
        self.path.touch()
        if keep_bytes > self.size():
            raise RecordError(
                f"{self.path} is shorter than when the checkpoint was saved ({keep_bytes} bytes); "
                "put the whole file back or start a new run"
            )
        with self.path.open("rb") as file:
            file.seek(keep_bytes)
            self.dropped = sum(line.endswith(b"\n") for line in file)  # lines that will be written again
        os.truncate(self.path, keep_bytes)

    def append(self, stage: str, step: int, values: Mapping[str, Value]) -> dict[str, int | float | str]:
        """Add a line, without the values that are None; returns the line.

        Raises:
            ValueError: a value is not finite.
            DiskFullError: no room for it; the lines before it stay, and no part of it is left.
        """
        line: dict[str, int | float | str] = {"stage": stage, "step": step}
        for key, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"metric {key!r} of {stage} step {step} is {value}")
            line[key] = value
        append_whole(self.path, (json.dumps(line) + "\n").encode())
        return line

    def lines(self) -> Iterator[dict[str, int | float | str]]:
        """Every line, from the first.

        Raises:
            RecordError: one is not JSON.
        """
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{self.path} line {number} is not JSON ({error}); start a new run") from error

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size
