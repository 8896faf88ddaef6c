"""What every reward function must do; ``check`` raises AssertionError saying what it does not."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace

from prism_fast.rewards import Judged, Reward, RewardFunction
from prism_fast.rewards.functions import ODD_TEXTS

LONG_TEXTS = ("<answer>" * 3000, "</caption>" * 3000, "(" * 20000, "9" * 20000, "<answer>" + "1+" * 9000 + "1</answer>")
SHAPED = "<caption>c</caption>\n<think>t</think>\n<answer>{}</answer>"


def check(function: RewardFunction, right: Judged, wrong: Judged, *, seconds: float = 60.0) -> None:
    """``right`` must score more than ``wrong``; other texts are put into copies of them.

    ``seconds``: for one call with some twenty texts of up to 27,000 characters.
    """
    texts = [*ODD_TEXTS, *LONG_TEXTS]
    texts += [SHAPED.format(inside) for inside in ("", " ", "\\frac{1}{0}", "NaN", "x" * 5000, "١٢", "a\u0000b")]
    responses = [right, wrong, *(_with(wrong, text) for text in texts), right]
    together = _within(seconds, function, responses)
    assert isinstance(together, list), f"gives a {type(together).__name__}, not a list"
    assert len(together) == len(responses), f"gives {len(together)} rewards for {len(responses)} responses"
    for response, reward in zip(responses, together, strict=True):
        shown = repr(response.text[:40])
        assert isinstance(reward, Reward), f"gives a {type(reward).__name__} for {shown}"
        numbers = {name: getattr(reward, name) for name in ("score", "accuracy", "format")} | dict(reward.parts)
        for name, value in numbers.items():
            if name == "score" and value is None:
                continue
            assert isinstance(value, int | float) and math.isfinite(value), f"gives {name}={value!r} for {shown}"
        assert isinstance(reward.decided_by, str), f"gives decided_by={reward.decided_by!r} for {shown}"
    assert None not in (together[0].score, together[1].score), "gives the right or the wrong answer no score"
    assert together[0].score > together[1].score, "does not score the right answer above the wrong one"
    again = _within(seconds, function, responses)
    assert again == together, "gives other rewards for the same responses"
    for index in (0, 1, 2, len(responses) - 1):
        alone = _within(seconds, function, [responses[index]])
        assert alone == [together[index]], f"response {index} has another reward alone than among others"
    assert _within(seconds, function, []) == [], "gives rewards for no responses"


def _with(row: Judged, text: str) -> Judged:
    return replace(row, text=text)


def _within(seconds: float, function: RewardFunction, responses: Sequence[Judged]) -> list[Reward]:
    """What the function gives; AssertionError if it raises or takes longer."""
    outcome: list = []

    def call() -> None:
        try:
            outcome.append((function(responses), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"takes more than {seconds:g} s"
    rewards, error = outcome[0]
    assert error is None, f"raises {type(error).__name__}: {error}"
    return rewards
