"""What calls into the compiled module have in common: addresses, streams, 0-d numbers, scaling of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_fast.ops import native

# Positions in the C++ enum ScalarKind; 0 is a number that the host knows.
SCALARS = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.int64: 4}


def address(x: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def stream_of(x: Tensor) -> int | None:
    """The current stream of the tensor's device; None on the CPU, which runs the twin."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def column(x: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """A constant input as the kernels read it: dense, in the type of the computation."""
    if x is None or (x.dtype == kind and x.is_contiguous()):
        return x
    return x.to(kind).contiguous()


def number(tensor: Tensor | None, value: float, kind: torch.dtype) -> tuple[Tensor | None, int, int, float]:
    """(tensor to keep alive until the call, its address, its kind, the number that counts where there is none)."""
    if tensor is None:
        return None, 0, 0, value
    if tensor.dtype not in SCALARS:
        tensor = tensor.to(kind)
    return tensor, tensor.data_ptr(), SCALARS[tensor.dtype], 0.0


def plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor outside of compilation: then the dispatcher has nothing to add to a call."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def on_device(op: str, x: Tensor):
    """Context in which kernels for ``x`` are enqueued. Raises RuntimeError where CUDA kernels are missing."""
    if not native.has_cuda():
        raise RuntimeError(f"{op}: {native.why_not()}")
    return torch.cuda.device(x.device)


def scaled(x: Tensor, upstream: Tensor, factors: Tensor | None = None, at: int = 0) -> Tensor:
    """``x * upstream * factors[at]`` in one launch; x dense float32 or float64, upstream 0-d, all of one dtype."""
    return _scale(x, upstream, factors, at) if plain(x) else _scale_operator(x, upstream, factors, at)


def _scale(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    if x.is_cuda:
        with on_device("backward", x):
            return _scale_here(x, upstream, factors, at)
    return _scale_here(x, upstream, factors, at)


def _scale_here(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    module = native.module()
    out = torch.empty_like(x)
    (module.scale_float64 if x.dtype == torch.float64 else module.scale_float32)(
        x.data_ptr(),
        upstream.data_ptr(),
        0 if factors is None else factors.data_ptr() + at * factors.element_size(),
        out.data_ptr(),
        x.numel(),
        stream_of(x),
    )
    return out


@torch.library.custom_op("prism_fast::scale", mutates_args=())
def _scale_operator(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    return _scale(x.contiguous(), upstream, factors, at)


@_scale_operator.register_fake
def _(x: Tensor, upstream: Tensor, factors: Tensor | None, at: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
