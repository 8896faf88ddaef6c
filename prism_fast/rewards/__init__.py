"""Verifiable rewards: format gate, rule-based answer comparison, math-verify in worker processes."""

from prism_fast.rewards.checker import AnswerChecker, Judged, Reward, failures
from prism_fast.rewards.judge import Judge, JudgeError
from prism_fast.rewards.routes import JUDGED, ROUTES, known_sources

__all__ = ["JUDGED", "ROUTES", "AnswerChecker", "Judge", "JudgeError", "Judged", "Reward", "failures", "known_sources"]
