"""Files and folders that appear whole or not at all, and one error for a full disk."""

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
    """The disk has no room; existing files are untouched, and no incomplete file is left."""


def shown_bytes(count: int) -> str:
    """A size for a reader: MiB below 10 GiB, GiB above."""
    return f"{count / 2**20:,.1f} MiB" if count < 10 << 30 else f"{count / 2**30:,.1f} GiB"


def refuse_existing(path: Path) -> None:
    """Raise ``FileExistsError`` where ``path`` exists, as a file, a folder or a link."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already and is never overwritten: remove it or name another")


@contextmanager
def whole_folder(path: Path, *, replace: bool = False, needs: int = 0, flush: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` if the block succeeds and is removed if it fails, so that ``path`` is
    never incomplete.

    Args:
        replace: replace an existing folder ``path``, at the very end.
        needs: bytes that will be written at least; checked before anything is written.
        flush: flush contents to the disk before the folder gets its name. Without, a power cut may leave it incomplete:
            for thousands of small files that can be made again.

    Raises:
        FileExistsError: ``path`` exists.
        DiskFullError: too little room, before or during writing.
    """
    if not replace:
        refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_full(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        look_for_room(path.parent, needs)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
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
            shutil.rmtree(temporary, ignore_errors=True)  # must not hide the error that is being raised
            raise


@contextmanager
def whole_file(path: Path, needs: int = 0) -> Iterator[Path]:
    """The name of a temporary file for the block to write, which then becomes ``path`` in one step: readers see the old
    or the new content, never a part. If the block fails, the old file stays (raises DiskFullError)."""
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
    """Append all of ``data`` to a file, or nothing (raises DiskFullError); only a crash may leave a part of it."""
    with disk_full(path, len(data)), path.open("ab", buffering=0) as file:  # unbuffered: a short write shows at once
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists; after a crash it is still whole, or its remains have a hidden name."""
    if path.exists():
        shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def clear_partial(folder: Path) -> None:
    """Remove temporary files and folders in ``folder`` that killed processes left."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if match := _PARTIAL.fullmatch(entry.name):
            if int(match[1]) == os.getpid() or not _alive(int(match[1])):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def look_for_room(folder: Path, needs: int) -> None:
    """Raise the OSError of a full disk where fewer than ``needs`` bytes are free."""
    if shutil.disk_usage(folder).free < needs:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def disk_full(path: Path, needs: int = 0) -> Iterator[None]:
    """Turn the various errors of a full disk into one that names the file and the bytes it needs.

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
