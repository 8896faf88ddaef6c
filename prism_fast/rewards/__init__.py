"""Verifiable rewards: format gate, rule-based answer comparison, math-verify in worker processes."""

from prism_fast.rewards.checker import AnswerChecker, Judged, Reward
from prism_fast.rewards.routes import ROUTES

__all__ = ["ROUTES", "AnswerChecker", "Judged", "Reward"]
