"""Rollout dumps: text, spans, scores and advantages of sampled steps, with the images by content hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import zstandard
from PIL import Image


class RolloutLog:
    """Appends to ``rollouts/<stage>.jsonl.zst``, one zstd frame per step: a killed run loses at most its last step."""

    def __init__(self, folder: Path, stage: str, *, keep_bytes: int = 0):
        """``keep_bytes``: what a resumed run keeps of the file; the steps behind it are done again."""
        self._folder = folder / "rollouts"
        (self._folder / "images").mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{stage}.jsonl.zst"
        self._stage = stage
        with self._path.open("ab") as file:
            file.truncate(keep_bytes)

    def image(self, image: Image.Image) -> str:
        """Store an image once; returns the sha256 of its pixels, which is its file name."""
        digest = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
        path = self._folder / "images" / f"{digest}.png"
        if not path.exists():
            image.save(path)
        return digest

    def size(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size

    def write(self, step: int, records: list[dict]) -> None:
        lines = "".join(json.dumps({"stage": self._stage, "step": step, **record}) + "\n" for record in records)
        with self._path.open("ab") as file:
            file.write(zstandard.ZstdCompressor(level=3).compress(lines.encode()))
