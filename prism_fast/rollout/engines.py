"""Rollout engines by name, as the recipe key ``rollout.engine`` says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Rollout

EngineMaker = Callable[[nn.Module, Processor, TokenBudget], Rollout]
ENGINES: dict[str, EngineMaker] = {"hf": HFRollout}
ON_DEMAND = ("vllm",)  # imported where they are asked for


def engine_maker(name: str, vllm_options: Mapping[str, Any] | None = None) -> EngineMaker:
    """
    Args:
        vllm_options: the recipe's ``rollout.vllm``.

    Raises:
        ValueError: an unknown name, options for another engine, or options that an engine sets itself.
        ImportError: the engine's package is missing or not of a supported version.
    """
    if name == "vllm":
        from prism_fast.rollout.vllm import VLLMRollout
        from prism_fast.rollout.vllm_build import check_vllm

        check_vllm(vllm_options or {})
        return partial(VLLMRollout, options=vllm_options)
    if name not in ENGINES:
        raise ValueError(f"rollout.engine must be one of {', '.join(sorted([*ENGINES, *ON_DEMAND]))}, got {name!r}")
    if vllm_options:
        raise ValueError(f"rollout.vllm is for rollout.engine=vllm, got rollout.engine={name}: leave it out")
    return ENGINES[name]
