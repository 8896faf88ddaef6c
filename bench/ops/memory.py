"""Peak memory of a provider on the CPU: the high-water mark of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import prism_fast

from .suite import OPS


def peak_on_cpu(op: str, provider: str, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """MiB beyond the inputs at the highest point of one forward and backward."""
    code = f"from prism_fast.bench.ops.memory import print_peak; print_peak({op!r}, {provider!r}, {shape!r}, {dtype})"
    paths = [str(Path(prism_fast.__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {code}"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{op}, {provider}, {shape}: {done.stderr[-2000:]}")
    return float(done.stdout)


def print_peak(op: str, provider: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The program of the process that `peak_on_cpu` starts."""
    chosen = OPS[op]
    run = chosen.providers[provider]
    chosen.run(run, chosen.inputs(chosen.shapes["small"][0], dtype, "cpu"))  # libraries load and start their threads
    x = chosen.inputs(shape, dtype, "cpu")
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    chosen.run(run, x)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """MiB of this process: VmRSS is the current size, VmHWM the largest."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024
