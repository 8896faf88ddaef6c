"""Files of rollout dumps (one zstd frame per step, images by content hash), and the strict reader for replay."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import zstandard
from PIL import Image

from prism_fast.engine.world import World
from prism_fast.models.writing import append_whole, write_whole


class RolloutLogError(ValueError):
    """A dump is missing, damaged, or lacks a step or a task; the message names the file and the step."""


def dump_path(folder: Path, stage: str) -> Path:
    """The file with a stage's rollouts, of the run in ``folder``."""
    return folder / "rollouts" / f"{stage}.jsonl.zst"


def image_digest(image: Image.Image) -> str:
    """sha256 of mode, size and pixels."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


class RolloutLog:
    """Appends to ``rollouts/<stage>.jsonl.zst``, one zstd frame per step: a killed run loses at most its last step.
    Rank 0 writes the records of all ranks."""

    def __init__(self, folder: Path, stage: str, world: World | None = None, *, keep_bytes: int = 0):
        """Joint over ``world`` (None: one rank). ``keep_bytes``: bytes of the file that a resumed run keeps; later
        steps are done again."""
        self.world = World() if world is None else world
        self.path = dump_path(folder, stage)
        self._images = self.path.parent / "images"
        self._images.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self.world.on_first(lambda: self._cut(keep_bytes))

    def _cut(self, keep_bytes: int) -> None:
        with self.path.open("ab") as file:
            file.truncate(keep_bytes)

    def image(self, image: Image.Image) -> str:
        """Store an image once; returns its digest, which is its file name."""
        digest = image_digest(image)
        path = self._images / f"{digest}.png"
        if not path.exists():
            png = io.BytesIO()
            image.save(png, format="PNG")
            write_whole(path, png.getvalue())  # a partial file would count as stored
        return digest

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def write(self, step: int, records: list[dict]) -> None:
        """On rank 0."""
        lines = "".join(json.dumps({"stage": self._stage, "step": step, **record}) + "\n" for record in records)
        append_whole(self.path, zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines.encode()))


class RolloutReader:
    """Reads a dump's steps in ascending order, holding one step in memory."""

    def __init__(self, path: Path):
        """Raises RolloutLogError if the file does not exist."""
        if not path.is_file():
            raise RolloutLogError(f"{path} does not exist: that run has no rollouts of this stage")
        self.path = path
        self._steps = self._read()
        self._last = 0

    def step(self, step: int) -> list[dict]:
        """The records of a step; steps must be asked for in ascending order.

        Raises:
            RolloutLogError: the step is not in the dump, or the dump is damaged before it.
        """
        for recorded_step, records in self._steps:
            if recorded_step == step:
                return records
            if recorded_step > step:
                break
        raise RolloutLogError(
            f"{self.path} does not hold step {step}; a run that is to be replayed keeps every step: "
            "dump_rollouts_every=1"
        )

    def _read(self) -> Iterator[tuple[int, list[dict]]]:
        for frame in self._frames():
            try:
                records = [json.loads(line) for line in frame.splitlines()]
                step = records[0]["step"]
            except (ValueError, LookupError, TypeError) as error:
                raise self._damaged(str(error)) from error
            yield step, records
            self._last = step

    def _frames(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            data = file.read(1 << 20)
            while data:
                frame = zstandard.ZstdDecompressor().decompressobj()
                blocks = []
                while not frame.eof:
                    if not data:
                        raise self._damaged("the file ends inside a step")
                    try:
                        blocks.append(frame.decompress(data))
                    except zstandard.ZstdError as error:
                        raise self._damaged(str(error)) from error
                    data = frame.unused_data if frame.eof else file.read(1 << 20)
                yield b"".join(blocks)
                data = data or file.read(1 << 20)

    def _damaged(self, reason: str) -> RolloutLogError:
        return RolloutLogError(f"{self.path} is damaged after step {self._last}: {reason}")
