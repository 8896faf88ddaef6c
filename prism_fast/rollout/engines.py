"""Rollout engines by name, as the recipe key ``rollout.engine`` says it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Rollout

EngineMaker = Callable[[nn.Module, Processor, TokenBudget], Rollout]
ENGINES: dict[str, EngineMaker] = {"hf": HFRollout}


def engine_maker(name: str) -> EngineMaker:
    """Raises ValueError for an unknown name."""
    if name not in ENGINES:
        raise ValueError(f"rollout.engine must be one of {', '.join(sorted(ENGINES))}, got {name!r}")
    return ENGINES[name]
