"""Questions about three digits in a row: phrasings, exact answers, and the steps that lead to them.

Each kind works on the digits as *seen* (a caption may be wrong) and shows its steps in three ways: ``concise`` (the
teacher's: every step, as short as is honest), ``verbose`` (sentences) and ``terse`` (a result without steps). A `Slip`
spoils one step; everything after it follows from the spoiled step, as in real sloppy work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slip:
    """A mistake at step ``step``: off by ``amount`` (not 0) where the step is a sum, else the wrong choice."""

    step: int
    amount: int


@dataclass(frozen=True)
class Work:
    concise: str
    verbose: str
    terse: str
    answer: str


@dataclass(frozen=True)
class Kind:
    """A kind of question: its phrasings, its number of steps, and ``work(seen digits, slip or None)``."""

    phrasings: tuple[str, ...]
    steps: int
    work: Callable[[Sequence[int], Slip | None], Work]


def _off(slip: Slip | None, step: int) -> int:
    """The error that the slip adds at ``step``."""
    return slip.amount if slip is not None and slip.step == step else 0


def _relation(left: int, right: int, slipped: bool = False) -> str:
    """``<``, ``>`` or ``=``; slipped: the wrong one of ``<`` and ``>``."""
    if left == right:
        return "<" if slipped else "="
    return "<" if (left < right) != slipped else ">"


def _sum(digits: Sequence[int], slip: Slip | None) -> Work:
    total = digits[0]
    concise, verbose = [], []
    for step, digit in enumerate(digits[1:]):
        before, total = total, abs(total + digit + _off(slip, step))
        concise.append(f"+{digit}={total}")
        verbose.append(f"{before} plus {digit} is {total}.")
    return Work(f"{digits[0]}{' '.join(concise)}", " ".join(verbose), f"sum {total}", str(total))


def _maximum(digits: Sequence[int], slip: Slip | None) -> Work:
    best = digits[0]
    concise, verbose = [], []
    for step, digit in enumerate(digits[1:]):
        relation = _relation(best, digit, bool(_off(slip, step)))
        concise.append(f"{best}{relation}{digit}")
        kept = digit if relation == "<" else best
        verbose.append(f"The larger of {best} and {digit} is {kept}.")
        best = kept
    return Work(" ".join(concise), " ".join(verbose), f"largest {best}", str(best))


def _even(digits: Sequence[int], slip: Slip | None) -> Work:
    parity = [(digit + bool(_off(slip, step))) % 2 == 0 for step, digit in enumerate(digits)]
    names = ["even" if even else "odd" for even in parity]
    count = sum(parity)
    concise = " ".join(f"{digit} {name}" for digit, name in zip(digits, names, strict=True))
    verbose = ", ".join(f"{digit} is {name}" for digit, name in zip(digits, names, strict=True))
    return Work(f"{concise}: {count} even", f"{verbose}. That makes {count} even.", f"even count {count}", str(count))


def _difference(digits: Sequence[int], slip: Slip | None) -> Work:
    first, last = digits[0], digits[-1]
    large, small = max(first, last), min(first, last)
    result = abs(large - small + _off(slip, 0))
    concise = f"{first} and {last}: {large}-{small}={result}"
    verbose = f"The first digit is {first} and the last is {last}. {large} minus {small} is {result}."
    return Work(concise, verbose, f"difference {result}", str(result))


def _comparison(digits: Sequence[int], slip: Slip | None) -> Work:
    first, last = digits[0], digits[-1]
    relation = _relation(first, last, bool(_off(slip, 0)))
    answer = {"<": "last", ">": "first", "=": "equal"}[relation]
    verbose = f"The first digit is {first} and the last is {last}."
    return Work(f"{first} and {last}: {first}{relation}{last}", verbose, answer, answer)


KINDS: dict[str, Kind] = {
    "sum": Kind(
        (
            "What is the sum of the digits?",
            "Add up all the digits. What do you get?",
            "What do the three digits add up to?",
            "What is the total of the digits?",
        ),
        2,
        _sum,
    ),
    "maximum": Kind(
        (
            "What is the largest digit?",
            "Which digit is the greatest?",
            "What is the maximum of the digits?",
            "Which of the digits is the biggest?",
        ),
        2,
        _maximum,
    ),
    "even": Kind(
        (
            "How many digits are even?",
            "How many even digits are there?",
            "Count the even digits.",
            "How many of the three digits are even?",
        ),
        3,
        _even,
    ),
    "difference": Kind(
        (
            "What is the difference between the first and the last digit?",
            "How far apart are the first and the last digit?",
            "By how much do the first and the last digit differ?",
            "What is the gap between the two outer digits?",
        ),
        1,
        _difference,
    ),
    "comparison": Kind(
        (
            "Which is larger, the first or the last digit, or are they equal?",
            "Compare the first and the last digit. Which is larger, or are they equal?",
            "Is the first or the last digit larger, or equal?",
            "Which of the outer digits is larger: first, last or equal?",
        ),
        1,
        _comparison,
    ),
}
