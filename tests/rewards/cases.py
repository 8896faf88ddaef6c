"""Shared by the reward tests: reference vectors and a response around an answer."""

from __future__ import annotations

import json
from pathlib import Path

from prism_fast.rewards import Judged

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewards.json").read_text(encoding="utf-8"))["cases"]


def judged(answer: str, gold: str, data_source: str = "mm_gad", equivalents: tuple[str, ...] = ()) -> Judged:
    """A well-formed response with this answer."""
    return Judged(f"<caption>c</caption>\n<think>t</think>\n<answer>{answer}</answer>", gold, data_source, equivalents)
