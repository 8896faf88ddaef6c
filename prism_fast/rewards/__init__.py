"""Reward functions: the protocol, the built-in graders (format gate, rules, math-verify in workers), your own."""

from prism_fast.rewards.checker import AnswerChecker
from prism_fast.rewards.functions import RewardFunctionError, SourceRewards
from prism_fast.rewards.judge import Judge, JudgeError
from prism_fast.rewards.reward import Judged, Reward, RewardFunction, failures, summed_parts
from prism_fast.rewards.routes import JUDGED, ROUTES, known_sources

__all__ = [
    "JUDGED",
    "ROUTES",
    "AnswerChecker",
    "Judge",
    "JudgeError",
    "Judged",
    "Reward",
    "RewardFunction",
    "RewardFunctionError",
    "SourceRewards",
    "failures",
    "known_sources",
    "summed_parts",
]
