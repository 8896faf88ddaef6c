"""The record is written first and whole; views follow it, and their failures end no run."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from prism_fast.config import load_config
from prism_fast.models.writing import DiskFullError
from prism_fast.preflight import preflight
from prism_fast.track import tracker as tracker_module
from prism_fast.track.jsonl import RecordError
from prism_fast.track.metrics import reproducible
from prism_fast.track.tracker import Tracker, open_views, require_packages
from prism_fast.train.context import open_run
from tests.track.lines import CURVES, LINES, bytes_of, write


class Seen:
    """A view that remembers, and fails from its ``fails``-th line on."""

    def __init__(self, name: str = "a view", fails: int | None = None):
        self.name, self.fails = name, fails
        self.tries, self.closed = 0, None
        self.curves: dict[str, list[tuple[int, float]]] = {}

    def show(self, step, values):
        self.tries += 1
        if self.fails is not None and self.tries >= self.fails:
            raise ConnectionError("no route to host")
        for tag, value in values.items():
            self.curves.setdefault(tag, []).append((step, value))

    def close(self, *, failed):
        self.closed = failed
        if self.fails is not None:
            raise ConnectionError("no route to host")


def test_the_record_to_the_byte(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.write("sft", 1, {"a": 1.5, "b": None, "n": 2, "é": "x"})
    with pytest.raises(ValueError, match="'c' of sft step 2 is nan"):
        tracker.write("sft", 2, {"c": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"stage": "sft", "step": 1, "a": 1.5, "n": 2, "\\u00e9": "x"}\n'
    assert tracker.size() == tracker.path.stat().st_size and tracker.step == 1


def test_views_see_one_axis_of_steps_and_each_tag_once(tmp_path):
    view = Seen()
    with Tracker(tmp_path, views=[view], tell=pytest.fail) as tracker:
        write(tracker)
        assert tracker.step == 6
    assert view.curves == CURVES and view.closed is False


@pytest.mark.parametrize("kept", range(len(LINES) + 1))
def test_a_resumed_run_goes_on_in_the_record_and_shows_nothing_twice(tmp_path, kept):
    view = Seen()
    with Tracker(tmp_path, views=[view]) as tracker:
        write(tracker)
    whole = tracker.path.read_bytes()
    again = Seen()
    with Tracker(tmp_path, keep_bytes=bytes_of(tmp_path)[kept], views=[again], tell=pytest.fail) as tracker:
        write(tracker, LINES[kept:])
        tracker.write("rlvr", 1, {"policy/loss": 1.0})
    assert tracker.path.read_bytes().startswith(whole) and tracker.step == 7
    assert again.curves == {"rlvr/policy/loss": [(7, 1.0)]}, "what came before was shown by the first process"


def test_a_line_that_a_kill_cut_is_not_counted(tmp_path):
    write(Tracker(tmp_path), LINES[:3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    view = Seen()
    write(Tracker(tmp_path, keep_bytes=bytes_of(tmp_path)[2], views=[view]), LINES[2:4])
    assert view.curves == {"sft/loss": [(3, 1.0)]}


def test_a_record_that_is_shorter_or_damaged_is_refused(tmp_path):
    write(Tracker(tmp_path), LINES[:2])
    sizes = bytes_of(tmp_path)
    with pytest.raises(RecordError, match=r"shorter than when the checkpoint was saved \(1000 bytes\)"):
        Tracker(tmp_path, keep_bytes=1000)
    assert bytes_of(tmp_path) == sizes, "refused, and changed"
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "st\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl line 1 is not JSON"):
        Tracker(tmp_path, keep_bytes=10)


def test_a_view_that_fails_is_told_once_and_tried_again(tmp_path):
    told, good, bad = [], Seen("good"), Seen("bad", fails=3)
    with Tracker(tmp_path, views=[bad, good], tell=told.append) as tracker:
        write(tracker)
    assert good.curves == CURVES and good.closed is False and bad.closed is False
    assert bad.tries == sum(stage not in ("data", "stage") for stage, _, _ in LINES)
    (text,) = told
    assert text.startswith("bad did not take the metrics of sft step 3 (ConnectionError: no route to host)")
    assert len(tracker.path.read_text().splitlines()) == len(LINES)


def test_views_hear_that_a_run_failed(tmp_path):
    view = Seen()
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, views=[view]):
        raise ZeroDivisionError
    assert view.closed is True


def test_a_request_to_stop_passes_a_view_by(tmp_path):
    class Stops(Seen):
        def show(self, step, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tracker(tmp_path, views=[Stops()]).write("sft", 1, {"sft/loss": 1.0})


@pytest.mark.parametrize("full", ["metrics.jsonl", "events.out"])
def test_metrics_on_a_full_disk_keep_their_whole_lines(tmp_path, monkeypatch, full):
    told: list[str] = []
    tracker = Tracker(tmp_path, tell=told.append)
    tracker.write("sft", 1, {"a": 1.0})

    class Full(io.FileIO):
        def write(self, line):
            if len(line) < 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(line[:-10])  # most of it fits

    with monkeypatch.context() as patch:
        opened = Path.open
        patch.setattr(Path, "open", lambda p, mode, buffering: (Full if full in p.name else opened)(p, mode))
        if full == "metrics.jsonl":
            with pytest.raises(DiskFullError, match=r"no space left for .*metrics\.jsonl.* .it takes"):
                tracker.write("sft", 2, {"a": 2.0})
        else:
            tracker.write("sft", 2, {"a": 2.0})
            assert len(told) == 1 and "TensorBoard did not take the metrics of sft step 2 (DiskFullError" in told[0]
    tracker.write("sft", 3, {"a": 3.0})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == ([1, 3] if full == "metrics.jsonl" else [1, 2, 3])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tracker_module, "find_spec", lambda asked: None if asked == name else object())
    wanted = rf"track\.{name}\.project is given, but the package {name} is not installed.*prism-fast\[{name}\]"
    with pytest.raises(ValueError, match=wanted):
        require_packages(wandb=True, trackio=True)
    with pytest.raises(ValueError, match=wanted):
        open_views(tmp_path, wandb="p", wandb_mode="offline", trackio="p", config={})
    require_packages(wandb=name != "wandb", trackio=name != "trackio")
    assert list(tmp_path.iterdir()) == []


def test_nobody_imports_what_nobody_asked_for(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert open_views(tmp_path, wandb=None, wandb_mode="online", trackio=None, config={}) == []
    assert list(tmp_path.iterdir()) == []


def test_what_the_clock_decides_is_known_by_its_prefix():
    line = {"stage": "sft", "step": 1, "time/update": 1.0, "perf/mfu": 0.4, "sft/loss": 2.0, "response_time/x": 1}
    assert reproducible(line) == {"stage": "sft", "step": 1, "sft/loss": 2.0, "response_time/x": 1}


def test_a_run_is_refused_before_it_has_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_module, "find_spec", lambda asked: None)
    config = load_config("digits", ["track.trackio.project=p", f"out={tmp_path / 'run'}"])
    for begin in (lambda: preflight(config), open_run(config, Console(quiet=True)).__enter__):
        with pytest.raises(ValueError, match=r"the package trackio is not installed"):
            begin()
    assert list(tmp_path.iterdir()) == []
