"""The module compiled from ``csrc/`` (``prism_fast._C``): whether it is available, and the reason if it is not."""

from __future__ import annotations

from pathlib import Path

import torch

# Version of the binding's signatures that this Python code calls; csrc/binding.cpp holds the same number.
INTERFACE = 13

_has_products = False
_BUILD = "run `pip install -e . --no-build-isolation` or `python setup.py build_ext --inplace` in the checkout"

try:
    from prism_fast import _C
except ImportError as error:  # a checkout may be used without it; `why_not` reports the reason
    _C = None
    _reason = f"the compiled module prism_fast._C cannot be imported ({error}); {_BUILD}"
else:
    _reason = ""
    if _C.interface != INTERFACE:
        _reason = f"prism_fast._C was built from other sources (interface {_C.interface}, needed {INTERFACE}); {_BUILD}"
    else:
        _torch = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        _C.share_threads_of(_torch)
        _has_products = _C.use_products_of(_torch)


def available() -> bool:
    """Whether the compiled module is built and fits this Python code: CPU tensors can use backend ``native``."""
    return not _reason


def has_cuda() -> bool:
    """Whether the module also holds CUDA kernels, with or without a GPU in this machine."""
    return available() and _C.cuda_built


def has_products() -> bool:
    """Whether the module can call the float32 and float64 products of PyTorch's library, each on one thread."""
    return _has_products


def why_not() -> str:
    """What the compiled kernels for CPU and CUDA lack, and the cure; empty if they lack nothing."""
    if _reason or _C.cuda_built:
        return _reason
    return (
        "prism_fast._C was built without CUDA (PRISM_FAST_CUDA=0, or no nvcc in $CUDA_HOME/bin or on PATH); "
        f"install the CUDA toolkit, then {_BUILD}"
    )


def module():
    """``prism_fast._C``. Raises RuntimeError with the cure if it is not available."""
    if _reason:
        raise RuntimeError(_reason)
    return _C
