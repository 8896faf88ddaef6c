"""Fused ops of group-relative training. Needs torch alone; compiled backends load when an op first asks for one."""

from __future__ import annotations

from .group_advantage import group_advantage
from .linear_logprob import linear_logprob
from .pairwise_loss import pairwise_loss
from .policy_loss import policy_loss
from .results import (
    ImportanceWeights,
    LogProb,
    PairwiseStats,
    PolicyStats,
    PrefixLayout,
    Routing,
)

__all__ = [
    "group_advantage",
    "linear_logprob",
    "pairwise_loss",
    "policy_loss",
    "ImportanceWeights",
    "LogProb",
    "PairwiseStats",
    "PolicyStats",
    "PrefixLayout",
    "Routing",
]
