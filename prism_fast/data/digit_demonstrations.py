"""Answers about digit strips as texts: the exact teacher, and noisy demonstrators in mixed styles.

Demonstrators misread digits the way people and models do (a few systematic confusions, some random ones) and do sloppy
arithmetic: a wrong step that the rest follows, a result without steps that is wrong, or an answer that contradicts the
steps above it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism_fast.data.digit_questions import KINDS, Slip, Work

SYSTEM_PROMPT = "Answer in <caption>, <think> and <answer>."  # short: the CPU pays for every prompt token
CONFUSIONS = {3: 8, 4: 9, 1: 7, 5: 6}
CONFUSED, RANDOM_MISREADING = 0.9, 0.03  # per digit of a misread strip
FAULTS = {"misread": 0.8, "wrong_step": 0.05, "skipped": 0.05, "contradiction": 0.05, "misread_and_wrong_step": 0.05}
THINKING = {"concise": 0.8, "verbose": 0.05, "terse": 0.15}
CAPTIONS = (0.6, 0.1, 0.1, 0.1, 0.1)  # of the five styles of caption


def caption_text(digits: Sequence[int], style: int = 0) -> str:
    """The digits of a strip as bullet points; style 0 is the teacher's."""
    together, listed = "".join(map(str, digits)), ", ".join(map(str, digits))
    return (
        f"- digits: {together}",
        f"- {together}",
        f"- The image shows the digits {listed}.",
        f"- handwritten digits\n- left to right: {listed}",
        f"- a row of digits: {listed}",
    )[style]


def reasoning_text(thinking: str, answer: str) -> str:
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


def captioned(caption: str) -> str:
    return f"<caption>\n{caption}\n</caption>"


def teacher_texts(kind: str, digits: Sequence[int]) -> tuple[str, str, str]:
    """The exact teacher's (caption span, reasoning span, answer), tags included in the spans."""
    work = KINDS[kind].work(digits, None)
    return captioned(caption_text(digits)), reasoning_text(work.concise, work.answer), work.answer


def demonstration(kind: str, digits: Sequence[int], noise: float, rng: np.random.Generator) -> str:
    """One demonstrator's response; with probability ``noise`` it has a fault, otherwise only its style varies."""
    fault = _choice(FAULTS, rng) if rng.random() < noise else None
    style = _choice(THINKING, rng)
    seen = misread(digits, rng) if fault in ("misread", "misread_and_wrong_step") else tuple(digits)
    right = KINDS[kind].work(seen, None)
    thinking, answer = getattr(right, style), right.answer
    if fault in ("wrong_step", "misread_and_wrong_step"):
        style = "concise" if style == "terse" else style  # without steps the wrong one would not show
        wrong = _slipped(kind, seen, rng)
        thinking, answer = getattr(wrong, style), wrong.answer
    elif fault in ("skipped", "contradiction"):
        wrong = _slipped(kind, seen, rng)
        thinking, answer = (wrong.terse if fault == "skipped" else right.concise), wrong.answer
    caption = caption_text(seen, int(rng.choice(len(CAPTIONS), p=CAPTIONS)))
    return f"{captioned(caption)}\n{reasoning_text(thinking, answer)}"


def misread(digits: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """The digits with at least one read wrongly: by a systematic confusion where one applies, else at random."""
    seen = []
    for digit in digits:
        if digit in CONFUSIONS and rng.random() < CONFUSED:
            seen.append(CONFUSIONS[digit])
        elif rng.random() < RANDOM_MISREADING:
            seen.append(_another_digit(digit, rng))
        else:
            seen.append(int(digit))
    if seen == list(digits):
        place = int(rng.integers(len(seen)))
        seen[place] = CONFUSIONS.get(digits[place], _another_digit(digits[place], rng))
    return tuple(seen)


def _another_digit(digit: int, rng: np.random.Generator) -> int:
    return (digit + int(rng.integers(1, 10))) % 10


def _slipped(kind: str, seen: Sequence[int], rng: np.random.Generator) -> Work:
    """Work with one slip that changes the answer; where no slip does (all digits equal), an unrelated strip's work."""
    right = KINDS[kind].work(seen, None)
    slips = [Slip(step, amount) for step in range(KINDS[kind].steps) for amount in (-2, -1, 1, 2)]
    for index in rng.permutation(len(slips)):
        wrong = KINDS[kind].work(seen, slips[index])
        if wrong.answer != right.answer:
            return wrong
    return _slipped(kind, [int(digit) for digit in rng.integers(0, 10, size=len(seen))], rng)


def _choice(weights: dict[str, float], rng: np.random.Generator) -> str:
    names = list(weights)
    return names[int(rng.choice(len(names), p=list(weights.values())))]
