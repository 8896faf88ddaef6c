"""The module that an engine calls whenever weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Root(nn.Module):
    """A model inside a module whose forward calls any function.

    Trainers call submodules of a model (trunk, vision tower, output head), never the model itself. Hooks that gather
    sharded weights begin and end with the outermost module, so one module must be called around all of them.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, fn: Callable[[], T]) -> T:
        return fn()
