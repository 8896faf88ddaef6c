"""The models in float64 from end to end: their float32 islands lifted.

A model converted with ``.double()`` still computes its RMS norms, rotary tables, router softmax and the rotation of the
vision tower in float32, because transformers says so in its code. Each rounding there turns a difference of 1e-16 into
one of 1e-8, so a test that must tell mathematics from rounding lifts them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode

_WIDENED = (torch.float64, torch.int64, torch.int32)  # positions are integers and enter the rotary tables by .float()


class Float64Islands(TorchFunctionMode):
    """Within this context a float64 tensor stays float64 where code asks for float32 (``.float()``,
    ``.to(torch.float32)``, ``softmax(..., dtype=torch.float32)``), and ``.float()`` of an integer tensor is float64.

    ``lifted`` counts the casts it changed: a test asserts that it met some.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lifted = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and func is Tensor.float and source.dtype in _WIDENED:
            self.lifted += 1
            return source.double()
        if source is not None and source.dtype == torch.float64:
            if func is Tensor.to and (kwargs.get("dtype") == torch.float32 or torch.float32 in args[1:]):
                self.lifted += 1
                return source
            if func in (softmax, torch.softmax, Tensor.softmax) and kwargs.get("dtype") == torch.float32:
                self.lifted += 1
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
