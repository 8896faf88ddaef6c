"""TensorBoard's own reader finds every metric once and in order, after any number of resumed processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from prism_fast.track import tensorboard as tensorboard_module
from prism_fast.track.tracker import Tracker
from tests.track.lines import CURVES, LINES, bytes_of, write


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard's server reads them."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in board.Tensors(tag)]
        for tag in board.Tags()["tensors"]
    }


def test_curves_of_a_whole_run_and_no_thread_writes_them(tmp_path):
    threads = threading.active_count()
    write(Tracker(tmp_path))
    assert threading.active_count() == threads, "its errors would not be those of the run"
    assert read(tmp_path) == CURVES


@pytest.mark.parametrize("written", range(1, len(LINES) + 1, 3))
def test_curves_of_a_resumed_run_are_those_of_a_whole_one(tmp_path, written):
    """Cut back at every line, with ever so many lines written behind it, and resumed twice."""
    for kept in range(written + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        write(Tracker(folder), LINES[:written])
        sizes = bytes_of(folder)
        write(Tracker(folder, keep_bytes=sizes[kept]), LINES[kept:])
        assert read(folder) == CURVES, f"{kept} of {written} lines kept"
        write(Tracker(folder, keep_bytes=sizes[kept // 2]), LINES[kept // 2 :])
        assert read(folder) == CURVES, f"{kept}, then {kept // 2} of {written} lines kept"


def test_files_are_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    for now in (2_000_000_000.0, 2_000_000_000.9, 1_900_000_000.0):
        monkeypatch.setattr(tensorboard_module.time, "time", lambda now=now: now)
        Tracker(tmp_path)
    names = [path.name.split(".")[3] for path in sorted((tmp_path / "tensorboard").iterdir())]
    assert names == ["2000000000", "2000000001", "2000000002"]
