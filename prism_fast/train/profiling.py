"""PyTorch's profiler over some steps of a stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfile:
    """Records ``steps`` steps of a stage behind the first one that this process makes, which warms up.

    Writes ``profile/<stage>-<step>.json.gz`` (a trace for https://ui.perfetto.dev or chrome://tracing, ``step`` the
    last one in it) and on CUDA ``profile/<stage>-<step>.pickle``, the allocations of these steps for
    https://pytorch.org/memory_viz.
    """

    def __init__(self, folder: Path, stage: str, steps: int, device: torch.device) -> None:
        """``steps``: 0 for none."""
        self._folder, self._stage, self._left, self._cuda = folder / "profile", stage, steps, device.type == "cuda"
        self._seen = 0
        self._profile: profile | None = None

    def begin(self) -> None:
        """A step begins."""
        self._seen += 1
        if self._left == 0 or self._seen != 2:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities)
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile.start()

    def end(self, step: int, *, last: bool) -> None:
        """Step ``step`` is complete; ``last``: of the stage."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left and not last:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        name = str(self._folder / f"{self._stage}-{step:06d}")
        self._profile.export_chrome_trace(f"{name}.json.gz")
        if self._cuda:
            torch.cuda.memory._dump_snapshot(f"{name}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._left = None, 0
