"""Log of finished chunks of a long loop that writes its result at the end: a stopped run goes on after them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prism_fast.models.writing import append_whole


class ChunkLog:
    """One line of JSON per chunk, after a first line with the settings that all of them were made with."""

    def __init__(self, path: Path, made_with: dict[str, Any]):
        """Chunks made with other settings are dropped, and so is an incomplete last line."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, size = [], 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            lines.append(value)
            size += len(line)
        if not lines or lines[0] != made_with:
            path.write_bytes(b"")
            self._write(made_with)
            lines = [made_with]
        elif size < path.stat().st_size:
            os.truncate(path, size)
        self.chunks: list[Any] = lines[1:]

    def append(self, chunk: Any) -> None:
        """Write a finished chunk (raises DiskFullError; earlier chunks stay)."""
        self._write(chunk)
        self.chunks.append(chunk)

    def _write(self, value: Any) -> None:
        append_whole(self._path, (json.dumps(value) + "\n").encode())

    def remove(self) -> None:
        """Delete the log, once the loop's result is written."""
        self._path.unlink(missing_ok=True)
