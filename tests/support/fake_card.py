"""A card that is not there: tensors of any size on ``cuda:1`` without memory, and what launch code asks of a card.

Launch code runs as on the card: tensors say that they are on a GPU, the card names its capability, processors and
memory, and a read of a value on the host raises, as a capture would. There is no autograd: this PyTorch may have been
built without CUDA, and its engine then has no queue for such a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

BASE = 1 << 20  # where every allocation begins, as far as its alignment can be seen


class Properties(NamedTuple):
    """As ``torch.cuda.get_device_properties`` gives them."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int


CARDS = {
    80: Properties("A100 80GB", 8, 0, 108, 80 << 30),
    90: Properties("H200", 9, 0, 132, 141 << 30),
    100: Properties("B200", 10, 0, 148, 180 << 30),
}
# Operands lie on the second card while the first is the current one: a launch that forgets to switch is seen.
DEVICE = torch.device("cuda", 1)


class _Guard:
    """``torch.cuda.device`` that only remembers."""

    current = 0

    def __init__(self, device: torch.device | int | None) -> None:
        index = device.index if isinstance(device, torch.device) else device
        self.index = _Guard.current if index is None or index < 0 else index

    def __enter__(self) -> None:
        self.previous, _Guard.current = _Guard.current, self.index

    def __exit__(self, *_: object) -> None:
        _Guard.current = self.previous


def current_device() -> int:
    return _Guard.current


class _Indexing(TorchFunctionMode):
    """Methods whose Python bindings ask for a CUDA device before anything else can answer for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.contiguous:
            x = args[0]
            return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        if function is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if kwargs.get("out") is not None:
            out = kwargs.pop("out")
            found = function(*args, **kwargs)
            assert (found.shape, found.dtype, found.device) == (out.shape, out.dtype, out.device)
            return out
        if function is Tensor.copy_:
            return torch.ops.aten.copy_(*args, **kwargs)
        if function is Tensor.__getitem__:
            view, tensors = _view(args[0], args[1])
            return torch.ops.aten.index(view, tensors) if tensors else view
        if function is Tensor.__setitem__:
            view, tensors = _view(args[0], args[1])
            value = args[2]
            if tensors:
                value = value if isinstance(value, Tensor) else torch.full((), value, dtype=view.dtype, device=DEVICE)
                torch.ops.aten.index_put_(view, tensors, value)
            elif isinstance(value, Tensor):
                torch.ops.aten.copy_(view, value)
            else:
                view.fill_(value)
            return None
        return function(*args, **kwargs)


def _view(x: Tensor, at: object) -> tuple[Tensor, list[Tensor | None]]:
    """(``x`` after the plain part of an index, the tensors of the index by dimension; [] without any)."""
    parts = list(at) if isinstance(at, tuple) else [at]
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        place = next(n for n, p in enumerate(parts) if p is Ellipsis)
        taken = sum(p is not None for p in parts) - 1
        parts[place : place + 1] = [slice(None)] * (x.dim() - taken)
    dim, tensors = 0, []
    for part in parts:
        if isinstance(part, Tensor):
            tensors += [part]
            dim += part.dim() if part.dtype == torch.bool else 1
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, 1 if part.step is None else part.step)
        else:
            x = x.select(dim, part)
            continue
        tensors += [None]
        dim += 1
    return x, tensors if any(t is not None for t in tensors) else []


def _address(x: Tensor) -> int:
    return BASE + x.storage_offset() * x.element_size()


@contextlib.contextmanager
def fake_card(sm: int) -> Iterator[None]:
    """Within it, tensors made on `DEVICE` take no memory and the card is the one of `CARDS`."""
    card = CARDS[sm]
    with contextlib.ExitStack() as stack:
        for name, instead in {
            "device": _Guard,
            "current_device": current_device,
            "get_device_properties": lambda device=None: card,
            "get_device_capability": lambda device=None: (card.major, card.minor),
            "is_current_stream_capturing": lambda: False,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, instead))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Indexing())
        yield
