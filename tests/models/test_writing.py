"""Folders and files appear whole or not at all, also when the process dies between any two of its steps."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from prism_fast.models import writing
from prism_fast.models.writing import DiskFullError, clear_partial, disk_full, remove_folder, whole_folder, write_whole

CRASHED, DONE = 9, 0
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def die_at(event_number: int, folder: Path, work: Callable[[], object]) -> int:
    """Run ``work`` in a child that dies, without any clean-up, at its n-th change below ``folder``; its exit code."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in _EVENTS and str(arguments[0]).startswith(str(folder)):
                seen += 1
                if seen == event_number:
                    os._exit(CRASHED)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(DONE)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def write_folder(path: Path, text: str) -> None:
    with whole_folder(path, replace=True) as part:
        for name in ("a", "b"):
            (part / name).write_text(text)


def test_a_folder_is_the_old_or_the_new_one_after_a_crash_at_any_step(tmp_path):
    seen = set()
    for n in range(1, 100):
        path = tmp_path / str(n) / "folder"
        write_folder(path, "old")
        code = die_at(n, path.parent, lambda path=path: write_folder(path, "new"))
        if path.exists():
            texts = set(contents(path).values())
            assert len(texts) == 1 and set(contents(path)) == {"a", "b"}
            seen |= texts
        else:
            seen.add("none")  # the old one has gone, the new one has no name yet: its owner uses the one before
        if code == DONE:
            break
        assert code == CRASHED
        clear_partial(path.parent)
        assert {p.name for p in path.parent.iterdir()} <= {"folder"}
        write_folder(path, "again")
        assert set(contents(path).values()) == {"again"}
    assert code == DONE and n > 9 and seen == {"old", "new", "none"}


def test_a_file_is_the_old_or_the_new_one_after_a_crash_at_any_step(tmp_path):
    for n in range(1, 50):
        path = tmp_path / str(n) / "file"
        path.parent.mkdir()
        write_whole(path, "old" * 9000)
        code = die_at(n, path.parent, lambda path=path: write_whole(path, "new" * 9000))
        assert path.read_text() in ("old" * 9000, "new" * 9000)
        if code == DONE:
            break
        assert code == CRASHED
        clear_partial(path.parent)
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert code == DONE and n > 3


def test_a_folder_that_is_removed_is_never_half_there(tmp_path):
    for n in range(1, 50):
        path = tmp_path / str(n) / "folder"
        write_folder(path, "old")
        code = die_at(n, path.parent, lambda path=path: remove_folder(path))
        assert not path.exists() or len(contents(path)) == 2
        if code == DONE:
            break
    assert code == DONE and n > 3


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    living, dead = tmp_path / f".x.{os.getppid()}.partial", tmp_path / ".x.999999999.partial"
    for folder in (living, dead):
        folder.mkdir()
    (tmp_path / ".y.999999999.old").write_text("")
    (tmp_path / ".hidden").write_text("")
    clear_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, ".hidden"])
    clear_partial(tmp_path / "nowhere")


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
    ],
)
def test_a_full_disk_has_many_forms_and_one_message(tmp_path, error):
    with pytest.raises(DiskFullError, match=r"no space left for .*thing \(it takes 3\.0 MiB, .* free there\)"):
        with disk_full(tmp_path / "thing", 3 << 20):
            raise error
    with pytest.raises(PermissionError):
        with disk_full(tmp_path / "thing"):
            raise PermissionError("no")


def test_too_little_room_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(DiskFullError, match="it takes"):
        with whole_folder(tmp_path / "folder", needs=1 << 60):
            pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["mkdir", "content", "sync", "rename"])
def test_a_disk_that_fills_up_meanwhile_leaves_what_was_there(tmp_path, monkeypatch, place):
    path = tmp_path / "folder"
    write_folder(path, "old")
    file = tmp_path / "file"
    write_whole(file, "old")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, FULL)

    with monkeypatch.context() as patch:
        if place == "mkdir":
            patch.setattr(Path, "mkdir", full)
        elif place == "content":
            patch.setattr(Path, "write_text", full)
            patch.setattr(Path, "write_bytes", full)
        elif place == "sync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "rename", full)
            patch.setattr(writing.os, "replace", full)
        with pytest.raises(DiskFullError, match="folder"):
            write_folder(path, "new")
        if place != "mkdir":
            with pytest.raises(DiskFullError, match="file"):
                write_whole(file, "new")
    assert contents(path) == dict.fromkeys("ab", "old") and file.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
