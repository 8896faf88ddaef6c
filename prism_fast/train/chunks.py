"""Log of finished chunks of a long loop that writes its result at the end: a stopped run goes on after them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prism_fast.engine.world import World
from prism_fast.models.writing import append_whole


class ChunkLog:
    """One line of JSON per chunk, after a first line with the settings that all of them were made with. A chunk is a
    list, of which each rank has made a share; all ranks know all chunks, and rank 0 writes them."""

    def __init__(self, path: Path, made_with: dict[str, Any], world: World | None = None):
        """Joint over ``world`` (None: one rank). Chunks made with other settings are dropped, and so is an incomplete
        last line."""
        self._path, self._world = path, World() if world is None else world
        self.chunks: list[Any] = self._world.of_first(self._world.on_first(lambda: self._begin(path, made_with)))

    def _begin(self, path: Path, made_with: dict[str, Any]) -> list[Any]:
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
        return lines[1:]

    def append(self, share: list[Any]) -> None:
        """Joint. Write a finished chunk, from every rank's share of it (raises DiskFullError; earlier chunks stay)."""
        chunk = [item for of_rank in self._world.gather(share) for item in of_rank]
        self._world.on_first(lambda: self._write(chunk))
        self.chunks.append(chunk)

    def _write(self, value: Any) -> None:
        append_whole(self._path, (json.dumps(value) + "\n").encode())

    def remove(self) -> None:
        """Joint. Delete the log, once the loop's result is written."""
        self._world.on_first(lambda: self._path.unlink(missing_ok=True))
