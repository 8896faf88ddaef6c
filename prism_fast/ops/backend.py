"""The choice of the implementation that an op runs.

``reference`` is plain PyTorch and runs anywhere; ``native`` is C++/CUDA from ``prism_fast._C``; ``triton`` means the
kernels of ``prism_fast.kernels``; ``stock`` is composed of PyTorch's own fused kernels. An explicit ``backend=`` wins,
then the environment variable PRISM_FAST_BACKEND, then the op's default. Nothing falls back: a backend that the op or
this machine lacks is an error.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

ENVIRONMENT = "PRISM_FAST_BACKEND"
KNOWN = ("reference", "native", "triton", "stock")
CURE = "run `prism-fast doctor` to see what is missing, or pass backend='reference'"


def choose(op: str, has: tuple[str, ...], requested: str | None, tensor: Tensor, default: str | None = None) -> str:
    """Name of the backend that runs ``op``, which has the implementations ``has``, on the device of ``tensor``.

    ``default`` is used if neither the caller nor the environment names one. Without a default, an op that has both uses
    ``native`` on the CPU and ``triton`` on CUDA; an op without ``native`` uses ``stock`` on the CPU.

    Raises ValueError for an unknown name or one that the op lacks, RuntimeError for one that this machine cannot run.
    """
    source = "backend"
    if requested is None:
        requested, source = os.environ.get(ENVIRONMENT) or None, ENVIRONMENT
    if requested is not None:
        if requested not in KNOWN:
            raise ValueError(f"{op}: {source}={requested!r} is not one of {', '.join(map(repr, KNOWN))}")
        if requested not in has:
            raise ValueError(f"{op}: {source}={requested!r}, but this op has only {', '.join(map(repr, has))}")
    requested = requested or default
    if requested == "reference" or len(has) == 1:
        return requested or "reference"
    device = tensor.device.type
    if requested == "stock" or (requested is None and device == "cpu" and "stock" in has and "native" not in has):
        if device not in ("cpu", "cuda"):
            raise RuntimeError(
                f"{op}: backend='stock' runs on cpu and cuda, the tensors are on {tensor.device}; {CURE}"
            )
        return "stock"
    if "triton" not in has:
        return _native_or_default(op, requested, tensor)
    if "native" not in has or requested == "triton" or (requested is None and device != "cpu"):
        return _triton_or_default(op, requested, tensor)
    if device != "cpu":
        raise RuntimeError(
            f"{op}: backend='native' of this op runs on the cpu, the tensors are on {tensor.device}; {CURE}"
        )
    return _native_or_default(op, requested, tensor)


def _triton_or_default(op: str, requested: str | None, tensor: Tensor) -> str:
    from prism_fast.ops import triton

    if tensor.device.type == "cuda":
        if triton.available():
            return "triton"
        raise RuntimeError(f"{op}: got CUDA tensors, but Triton is not installed; {CURE}")
    if requested is None:
        return "reference"
    if tensor.device.type == "cpu" and triton.interpreted():
        return "triton"
    raise RuntimeError(
        f"{op}: backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1, for tests), these are on {tensor.device}; "
        f"{CURE}"
    )


def _native_or_default(op: str, requested: str | None, tensor: Tensor) -> str:
    import prism_fast.ops.native as native  # this form costs no call of the import machinery

    if tensor.device.type == "cpu":
        if native.available():
            return "native"
        if requested is None:  # a checkout that is not installed: the reference is the documented default
            return "reference"
        raise RuntimeError(f"{op}: backend='native' is not available: {native.why_not()}; {CURE}")
    if tensor.device.type == "cuda":
        if native.available() and native.has_cuda():
            return "native"
        # Not the reference: its many small kernels would be slow on a GPU, and nobody would notice why.
        raise RuntimeError(
            f"{op}: got CUDA tensors, but the native CUDA kernels are missing: {native.why_not()}; {CURE}"
        )
    if requested is None:
        return "reference"
    raise RuntimeError(f"{op}: backend='native' runs on cpu and cuda, the tensors are on {tensor.device}; {CURE}")


def native_runs_here() -> bool:
    """Whether the compiled backend can serve at least one device type of this machine."""
    import prism_fast.ops.native as native

    return native.available() and (not torch.cuda.is_available() or native.has_cuda())
