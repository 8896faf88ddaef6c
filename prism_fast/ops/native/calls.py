"""Helpers of calls into the compiled module: addresses, streams, 0-d numbers, scaling of gradients.

A CUDA kernel's twin is the function of the module that computes the same on the CPU, with threads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from prism_fast.ops import native

# Positions in the C++ enum ScalarKind; 0 means a number on the host.
SCALARS = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.int64: 4}


def address(x: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def on_card(x: Tensor) -> bool:
    """Whether the CUDA kernels serve ``x``, and not their CPU twins."""
    return x.is_cuda


def stream_of(x: Tensor) -> int | None:
    """The current stream of the tensor's device; None on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if on_card(x) else None


def column(x: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """An input without gradient in the form that the kernels read: dense, in the type of the computation."""
    if x is None or (x.dtype is kind and x.is_contiguous()):
        return x
    return x.detach().to(kind).contiguous()


def split(value: Tensor | float | None) -> tuple[Tensor | None, float]:
    """(0-d tensor or None, number): ``value`` in one of the two, because operators take no union types."""
    if value is None or isinstance(value, Tensor):
        return value, 0.0
    return None, float(value)


def scalar(tensor: Tensor | None, number: float, kind: torch.dtype) -> tuple[Tensor | None, tuple[int, int, float]]:
    """(tensor to keep alive until the call, (its address, its kind, the number that replaces a missing tensor))."""
    if tensor is None:
        return None, (0, 0, number)
    if tensor.dtype not in SCALARS:
        tensor = tensor.detach().to(kind)
    return tensor, (tensor.data_ptr(), SCALARS[tensor.dtype], number)


_ANYWHERE = nullcontext()


def on_device(op: str, x: Tensor):
    """Context in which kernels for ``x`` run. Raises RuntimeError if CUDA kernels are needed and missing."""
    if not x.is_cuda:
        return _ANYWHERE
    if not native.has_cuda():
        raise RuntimeError(f"{op}: {native.why_not()}")
    return torch.cuda.device(x.device)


def launch(op: str, kernel: Callable[..., None], like: Tensor, size: int, *arguments: object) -> None:
    """``kernel(*arguments, workspace, threads, stream)`` on the device of ``like``; workspace is float64 [size].

    The workspace starts with arbitrary contents; CPU twins allocate their own. Raises RuntimeError if CUDA kernels are
    needed and missing.
    """
    threads = torch.get_num_threads()
    stream = stream_of(like)
    if stream is None:
        kernel(*arguments, 0, threads, None)
        return
    with on_device(op, like):
        workspace = torch.empty(size, dtype=torch.float64, device=like.device)
        kernel(*arguments, workspace.data_ptr(), threads, stream)


def scaled(
    x: Tensor, upstream: Tensor, traced: bool, factors: Tensor | None = None, at: int = 0, copy: bool = False
) -> Tensor:
    """``x * upstream * factors[at]`` in at most one launch; x dense float32 or float64, upstream 0-d, all of one dtype.

    On the CPU the result of a factor 1 is ``x`` itself, unless ``copy``: backward of a loss usually starts with 1.
    """
    if traced:
        return _scale_operator(x, upstream, factors, at)
    if not copy and stream_of(x) is None:
        module, factor = native.module(), _at(factors, at)
        is_one = module.scale_is_one_float64 if x.dtype == torch.float64 else module.scale_is_one_float32
        if is_one(upstream.data_ptr(), factor):
            return x
    return _scale(x, upstream, factors, at)


def _at(factors: Tensor | None, at: int) -> int:
    return 0 if factors is None else factors.data_ptr() + at * factors.element_size()


def _scale(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    module = native.module()
    x = x.contiguous()
    out = torch.empty_like(x)
    with on_device("backward", x):
        (module.scale_float64 if x.dtype == torch.float64 else module.scale_float32)(
            x.data_ptr(), upstream.data_ptr(), _at(factors, at), out.data_ptr(), x.numel(), stream_of(x)
        )
    return out


_scale_operator = torch.library.custom_op("prism_fast::scale", _scale, mutates_args=())


@_scale_operator.register_fake
def _(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
