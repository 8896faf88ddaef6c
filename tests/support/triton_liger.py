"""Lets Liger's kernels run in Triton's interpreter, for tests of what we put them into."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.support.triton_device import DEVICE


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing. Otherwise two stand-ins: float arguments of a kernel become float32 tensors, as a launch on a
    card makes them (the interpreter hands over Python's); the square root of CUDA's library becomes Triton's own."""
    if DEVICE == "cuda":
        return
    stock = interpreter._implicit_cvt

    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return stock(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norm = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norm, "rsqrt", rsqrt)
