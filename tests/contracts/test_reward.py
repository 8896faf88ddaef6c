"""The contract of reward functions: kept by the built-in ones and the example, and able to catch what breaks it."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from prism_fast.rewards import AnswerChecker, Judged, Reward
from prism_fast.rewards.functions import load_function
from tests.contracts.reward import SHAPED, check

RIGHT, WRONG = (Judged(SHAPED.format(answer), "7", "mm_gad", question="3 + 4?") for answer in ("7", "8"))


@pytest.mark.parametrize("semantics", ["prism_fast", "released"])
def test_built_in_graders(semantics):
    with AnswerChecker(semantics=semantics, timeout_s=20) as checker:
        for source in ("mm_gad", "math-77k", "hiyouga/geometry3k"):
            check(checker.score, replace(RIGHT, data_source=source), replace(WRONG, data_source=source))


def test_the_example(monkeypatch):
    monkeypatch.syspath_prepend("examples")
    check(load_function("brief", "own_reward:exact_and_brief"), RIGHT, WRONG)


def test_the_plain_example(monkeypatch):
    monkeypatch.syspath_prepend("examples")
    check(load_function("counted", "plain_reward:close_and_short"), RIGHT, WRONG)


def good(responses):
    return [Reward(float("<answer>7<" in r.text), 0.0, 1.0, "seven") for r in responses]


def nan(responses):
    return [
        replace(reward, score=reward.score if r.text else float("nan"))
        for r, reward in zip(responses, good(responses), strict=True)
    ]


def waits(responses):
    time.sleep(3 if len(responses) > 1 else 0)
    return good(responses)


def remembers(responses, calls=[]):  # noqa: B006
    calls.append(0)
    return [replace(reward, format=1.0 / len(calls)) for reward in good(responses)]


BROKEN = {
    "leaves one out": (lambda rs: good(rs)[:-1], "rewards for"),
    "order of scores": (lambda rs: sorted(good(rs), key=lambda reward: -reward.score), "above the wrong one"),
    "a number that is not finite": (nan, "score=nan"),
    "a part that is not finite": (
        lambda rs: [replace(r, parts={"brief": float("inf")}) for r in good(rs)],
        "brief=inf",
    ),
    "no score": (lambda rs: [replace(r, score=None) for r in good(rs)], "no score"),
    "drawn at random": (
        lambda rs: [replace(r, accuracy=random.random()) for r in good(rs)],
        "other rewards for the same",
    ),
    "remembers calls": (remembers, "other rewards for the same"),
    "depends on the others": (
        lambda rs: [replace(r, score=r.score - len(rs)) for r in good(rs)],
        "has another reward alone",
    ),
    "raises on a text": (
        lambda rs: [rs[0].text.index("<answer>")] + [r.text.index("</answer>") for r in rs],
        "raises ValueError",
    ),
    "takes its time": (waits, "takes more than"),
    "numbers": (lambda rs: [reward.score for reward in good(rs)], "gives a float"),
    "one for all": (lambda rs: good(rs)[0], "not a list"),
    "no difference": (lambda rs: [Reward(1.0, 1.0, 1.0, "all") for _ in rs], "above the wrong one"),
    "nothing for nothing": (lambda rs: good(rs) or [Reward(0.0, 0.0, 0.0, "none")], "for no responses"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_is_caught(name):
    function, said = BROKEN[name]
    with pytest.raises(AssertionError, match=said):
        check(function, RIGHT, WRONG, seconds=1.0 if function is waits else 60.0)


def test_the_contract_accepts_what_the_broken_ones_are_made_of():
    check(good, RIGHT, WRONG)
