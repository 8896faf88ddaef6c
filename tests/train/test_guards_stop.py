"""SIGTERM in every phase: the step in progress is lost at most, and the run ends as if no signal had come."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from prism_fast.config import dump_config, load_config
from prism_fast.engine.local import LocalEngine
from prism_fast.track.metrics import reproducible
from prism_fast.train.context import Run
from prism_fast.train.pipeline import run_stages
from prism_fast.train.record import read_resume
from prism_fast.train.signals import Stopped, StopRequest


def _metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records]


class Signals:
    """Sends this process SIGTERM when the run reaches the next phase of a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.wanted: str | None = None
        self._watch(monkeypatch, StopRequest, "poll", lambda stop, where: f"poll {where}")
        self._watch(monkeypatch, LocalEngine, "step", lambda engine: f"update {engine.where}")
        self._watch(monkeypatch, Run, "export", lambda run, name, *rest: f"export {name}")
        self._watch(monkeypatch, Run, "complete", lambda run, name: f"complete {name}")

    def _watch(self, monkeypatch, owner, name, phase) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **options):
            if self.wanted is not None and phase(*arguments) == self.wanted:
                self.wanted = None
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)


# In the order of the run: where the signal arrives, and what stands behind "stopped at".
PHASES = [
    ("update sft step 3", "sft step 3"),
    ("poll SFT validation", "SFT validation"),
    ("export sft", "evaluation after sft"),
    ("poll evaluation after sft", "evaluation after sft"),
    ("update sft_continued step 2", "sft_continued step 2"),
    ("poll rlvr_direct step 2, while generating", "rlvr_direct step 2, while generating"),
    ("poll evaluation after rlvr_direct", "evaluation after rlvr_direct"),
    ("poll sampling pairs", "sampling pairs"),
    ("complete pairs", "warmup step 1"),
    ("poll held-out pairs", "held-out pairs"),
    ("update align step 1", "align step 1"),
    ("poll align step 2, while generating", "align step 2, while generating"),
    ("poll evaluation after align", "evaluation after align"),
    ("poll rlvr step 1, while generating", "rlvr step 1, while generating"),
    ("poll rlvr step 2, while generating", "rlvr step 2, while generating"),
    ("complete rlvr", None),
]


def test_a_stop_in_every_phase_loses_the_step_in_progress_at_most(finished, small_run, tmp_path, monkeypatch):
    signals, folder = Signals(monkeypatch), tmp_path / "run"
    config = load_config("digits", [*small_run, f"out={folder}"])
    for i, (phase, place) in enumerate(PHASES):
        signals.wanted = phase
        if place is None:
            run_stages(config, Console(quiet=True), resume=True)
            break
        with pytest.raises(Stopped) as stopped:
            run_stages(config, Console(quiet=True), resume=i > 0)
        assert signals.wanted is None, f"{phase} was never reached"
        assert str(stopped.value) == place, (phase, str(stopped.value))
        told: list[str] = []
        kept = read_resume(folder, dump_config(config), tell=told.append).metrics_bytes()
        assert not told and kept == (folder / "metrics.jsonl").stat().st_size, f"{phase}: a finished step is lost"
    assert _metrics(folder) == _metrics(finished)
