"""Fused ops of group-relative training. They need torch alone; a compiled backend loads when an op first needs it."""

from __future__ import annotations

from .backend import native_runs_here
from .bad_values import bad_values
from .group_advantage import group_advantage
from .importance_weights import importance_weights
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprob import linear_logprob
from .linear_policy_loss import linear_policy_loss
from .moe_experts import moe_experts
from .pairwise_loss import pairwise_loss
from .policy_loss import policy_loss
from .policy_options import PolicyLossOptions
from .prefix_layout import prepare_prefix_layout
from .results import (
    ImportanceWeights,
    LogProb,
    PairwiseStats,
    PolicyStats,
    PrefixLayout,
    Routing,
)
from .route_experts import plan_experts, route_experts
from .selected_logprob import selected_logprob
from .shared_prefix_attention import shared_prefix_attention

__all__ = [
    "linear_logprob",
    "linear_policy_loss",
    "linear_cross_entropy",
    "selected_logprob",
    "group_advantage",
    "policy_loss",
    "importance_weights",
    "pairwise_loss",
    "route_experts",
    "plan_experts",
    "moe_experts",
    "shared_prefix_attention",
    "available",
    "bad_values",
    "prepare_prefix_layout",
    "ImportanceWeights",
    "LogProb",
    "PairwiseStats",
    "PolicyLossOptions",
    "PolicyStats",
    "PrefixLayout",
    "Routing",
]

_COMPILED = (
    "group_advantage", "policy_loss", "pairwise_loss", "selected_logprob", "route_experts", "plan_experts",
    "moe_experts",
)  # fmt: skip
_TRITON = (
    "linear_logprob", "linear_policy_loss", "linear_cross_entropy", "moe_experts", "shared_prefix_attention",
)  # fmt: skip
_STOCK = ("shared_prefix_attention", "moe_experts")


def available() -> dict[str, tuple[str, ...]]:
    """The backends that this machine can run, for each op. Loads the compiled module to find out."""
    from . import triton

    compiled = _COMPILED if native_runs_here() else ()
    fused = _TRITON if triton.runs_here() else ()
    ops = __all__[: __all__.index("available")]
    return {
        op: ("reference", *["native"] * (op in compiled), *["triton"] * (op in fused), *["stock"] * (op in _STOCK))
        for op in ops
    }
