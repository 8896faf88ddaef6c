"""Giving back the memory of a DeepSpeed engine, which outlives its last reference: autograd's hooks hold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def release(ds: Any, module: nn.Module) -> None:
    """Empty every tensor of the engine ``ds`` and every weight of ``module``; neither can be used any more."""
    ds.destroy()
    for p in module.parameters():
        p.grad = None
        _empty([p, getattr(p, "ds_tensor", None)])
    _empty(vars(ds.optimizer))
    _empty(vars(ds))


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def _empty(value: Any) -> None:
    if isinstance(value, Tensor):
        value.data = value.data.new_empty(0)
    elif isinstance(value, dict):
        _empty(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            _empty(item)
