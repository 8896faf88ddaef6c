"""Files and folders that are there whole or not at all, and what is said when the disk is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.(\d+)\.(partial|old)")  # .NAME.PROCESS.partial: not yet there; .old: no longer there


class DiskFullError(OSError):
    """There is no room for what was to be written; what was there before is untouched, nothing half-written is left."""


def shown_bytes(count: int) -> str:
    """A size for a reader: MiB below 10 GiB, GiB above."""
    return f"{count / 2**20:,.1f} MiB" if count < 10 << 30 else f"{count / 2**30:,.1f} GiB"


def refuse_existing(path: Path) -> None:
    """Raise ``FileExistsError`` where ``path`` is there already, in whatever form."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already and is never overwritten: remove it or name another")


@contextmanager
def whole_folder(path: Path, *, replace: bool = False, needs: int = 0, flush: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not: nobody ever
    sees half of it under its name.

    Args:
        replace: an existing folder ``path`` gives way, at the very end.
        needs: bytes that will be written at least; looked for before anything is.
        flush: contents are on the disk before the name is. Without, this holds as long as the machine runs: for
            thousands of small files that can be made again.

    Raises:
        FileExistsError: ``path`` exists.
        DiskFullError: too little room, found beforehand or while writing.
    """
    if not replace:
        refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_full(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        look_for_room(path.parent, needs)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
        temporary.mkdir()
        try:
            yield temporary
            for entry in (*temporary.rglob("*"), temporary) if flush else ():
                sync(entry)
            if not replace:
                refuse_existing(path)
            old = _set_aside(path) if path.exists() else None
            temporary.rename(path)
            sync(path.parent)
            if old is not None:
                shutil.rmtree(old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the error on its way is the one to see
            raise


@contextmanager
def whole_file(path: Path, needs: int = 0) -> Iterator[Path]:
    """The name of a temporary file, for the block to write, that then becomes ``path`` in one step: readers see the old
    or the new content, never a half. When the block fails, the old one stays (raises DiskFullError)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_full(path, needs):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a small file by ``content`` as :func:`whole_file` does. Text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, len(data)) as temporary:
        temporary.write_bytes(data)


def append_whole(path: Path, data: bytes) -> None:
    """Append to a file, all of ``data`` or nothing (raises DiskFullError); a crash meanwhile may leave a part of it."""
    with disk_full(path, len(data)), path.open("ab", buffering=0) as file:  # what a write did not take is known at once
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there; a crash meanwhile leaves the whole of it or a rest under a hidden name."""
    if path.exists():
        shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def clear_partial(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in ``folder``."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if match := _PARTIAL.fullmatch(entry.name):
            if int(match[1]) == os.getpid() or not _alive(int(match[1])):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def look_for_room(folder: Path, needs: int) -> None:
    """Raise what a full disk raises where fewer than ``needs`` bytes are free."""
    if shutil.disk_usage(folder).free < needs:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def disk_full(path: Path, needs: int = 0) -> Iterator[None]:
    """Turn the many forms of a full disk into one error that names what was written and what it takes.

    Raises:
        DiskFullError: instead of ``OSError`` with ENOSPC or EDQUOT, or of a library's error that quotes it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _means_full(error):
            raise
        try:
            free = f", {shown_bytes(shutil.disk_usage(path.parent).free)} are free there"
        except OSError:
            free = ""
        wanted = f" (it takes {shown_bytes(needs)}{free})" if needs else free
        raise DiskFullError(
            f"no space left for {path}{wanted}. Nothing half-written is left, what was complete stays: make room and "
            "repeat the command (a training run: prism-fast resume)"
        ) from error


def _means_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch.save raise errors of their own around the system's.
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
