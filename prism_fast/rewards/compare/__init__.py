"""The default comparison of an answer with a ground truth (`semantics="prism_fast"`); ANSWERS.md specifies it."""

from prism_fast.rewards.compare.rules import compare

__all__ = ["compare"]
