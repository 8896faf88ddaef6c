"""Description of the machine for results: card or processor, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

RIVALS = ("triton", "liger-kernel", "cut-cross-entropy", "verl", "trl", "transformers")


def machine() -> dict:
    found = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],  # absolute times of a machine with other work mean little
    }
    return found | {name: _version(name) for name in RIVALS}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return None  # an installed package, or a tree that was copied without its history
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True).stdout
    return done.stdout.strip() + ("+changes" if dirty.strip() else "")
