"""Kernels compiled from ``csrc/`` (``prism_fast._C``): whether they are here, and what is missing if not."""

from __future__ import annotations

from pathlib import Path

import torch

# Version of the binding's signatures that this Python code calls; csrc/binding.cpp carries the same number.
INTERFACE = 13

_has_products = False
_BUILD = "run `pip install -e . --no-build-isolation` or `python setup.py build_ext --inplace` in the checkout"

try:
    from prism_fast import _C
except ImportError as error:  # an uninstalled checkout is a supported state; the reason is kept and reported
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
    """Whether the compiled module is here and fits this Python code: CPU tensors can use backend ``native``."""
    return not _reason


def has_cuda() -> bool:
    """Whether the module holds CUDA kernels as well (says nothing about a GPU being present)."""
    return available() and _C.cuda_built


def has_products() -> bool:
    """Whether PyTorch's library lends its products, float32 and float64, to be run on one thread each."""
    return _has_products


def why_not() -> str:
    """What is missing for the compiled kernels on CPU and CUDA, and the cure; empty if nothing is."""
    if _reason or _C.cuda_built:
        return _reason
    return (
        "prism_fast._C was built without CUDA (PRISM_FAST_CUDA=0, or no nvcc in $CUDA_HOME/bin or on PATH); "
        f"install the CUDA toolkit, then {_BUILD}"
    )


def module():
    """``prism_fast._C``. Raises RuntimeError naming the cure where it is not available."""
    if _reason:
        raise RuntimeError(_reason)
    return _C
