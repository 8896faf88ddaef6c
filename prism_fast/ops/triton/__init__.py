"""Ops served by the Triton kernels of ``prism_fast.kernels``. Triton loads when an op first needs it."""

from __future__ import annotations

import importlib.util
import os

import torch


def available() -> bool:
    """Whether Triton is installed, with or without a GPU in this machine."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton would run kernels on the CPU, in its interpreter: for tests, thousands of times slower."""
    # Reads the variable as Triton does, without loading Triton.
    return available() and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "y", "yes")


def runs_here() -> bool:
    """Whether the kernels can serve a device of this machine."""
    return interpreted() or (available() and torch.cuda.is_available())
