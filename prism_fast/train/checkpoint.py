"""Checkpoints on disk: complete or not there, checked by hash before they are trusted, no pickle.

A checkpoint is a folder ``<stage>-<step>``: a folder for each engine, ``state.json``, and ``manifest.json`` that
holds the size and sha256 of each file. It is written under a temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prism_fast.config import STAGES
from prism_fast.engine.world import World
from prism_fast.models.writing import clear_partial, remove_folder, whole_folder

MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and its fault."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: ``state`` as saved; engines load from their folders."""

    path: Path
    state: dict

    def folder(self, engine: str) -> Path:
        return self.path / engine


class Saved(Protocol):
    def save(self, folder: Path) -> None: ...


def save_checkpoint(
    folder: Path, name: str, engines: Mapping[str, Saved], state: dict, *, keep: int, world: World | None = None
) -> Path:
    """Joint over ``world`` (None: one rank). Write ``folder/name`` and remove all but the newest ``keep`` checkpoints.
    Every rank writes its part of each engine, rank 0 the rest; ``state`` is that of rank 0.

    Raises:
        OSError: the disk is full (``DiskFullError``) or not writable; older checkpoints stay as they are.
    """
    world, final = World() if world is None else world, folder / name
    with ExitStack() as stack:
        partial = world.of_first(world.on_first(lambda: str(stack.enter_context(_begun(final, engines)))))
        for key, engine in engines.items():
            engine.save(Path(partial) / key)
        world.on_first(lambda: _finish(Path(partial), state))
        world.on_first(stack.close)
    world.on_first(lambda: _remove_old(folder, keep))
    return final


@contextmanager
def _begun(final: Path, engines: Mapping[str, Saved]) -> Iterator[Path]:
    """The folder that becomes ``final``, with a folder for each engine."""
    clear_partial(final.parent)  # left by an earlier process that was killed while it wrote
    with whole_folder(final, replace=True) as partial:  # replaces a damaged one that the resume skipped
        for key in engines:
            (partial / key).mkdir()
        yield partial


def _finish(partial: Path, state: dict) -> None:
    """Write the state, and the manifest of all that every rank has written."""
    (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
    written = sorted(file for file in partial.rglob("*") if file.is_file())
    files = {file.relative_to(partial).as_posix(): _fingerprint(file) for file in written}
    (partial / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _remove_old(folder: Path, keep: int) -> None:
    for old in sorted(_checkpoints(folder), key=_age)[:-keep]:
        remove_folder(old)


def latest_checkpoint(folder: Path, *, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is complete and undamaged; ``tell`` gets a message for every one that is skipped."""
    for path in sorted(_checkpoints(folder), key=_age, reverse=True):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            tell(f"checkpoint {path.name} is passed over: {error}")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest is missing or unreadable, or a file is missing, truncated or altered.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        items = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if STATE not in items:
        raise CheckpointError(f"{path / MANIFEST} does not list {STATE}")
    for name, (size, digest) in items.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {size}")
        if _fingerprint(file)["sha256"] != digest:
            raise CheckpointError(f"{file} was altered (its sha256 is not the one in {MANIFEST})")
    return trusted_checkpoint(path)


def trusted_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files another rank has checked."""
    return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []


def _age(path: Path) -> tuple[int, int]:
    """Sort key by stage and step, from the name ``<stage>-<step>``; times of files would change in a copy of a run."""
    stage, _, step = path.name.rpartition("-")
    known = stage in STAGES and step.isdigit()
    return (STAGES.index(stage), int(step)) if known else (-1, -1)


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
