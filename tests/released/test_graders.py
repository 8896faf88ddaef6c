"""`semantics="released"` against the reference vectors, case by case."""

import pytest

from prism_fast.released.graders import first_answer
from prism_fast.released.mm_gad import compare_mm_gad
from prism_fast.rewards import AnswerChecker, Judged
from tests.rewards.cases import GOLDEN

ROUTES = {"mm_gad": "mm_gad", "math_verify_with_format": "math-77k", "geo3k": "hiyouga/geometry3k"}


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(semantics="released", timeout_s=20) as checker:
        yield checker


def _score(checker, data_source):
    return checker.score(
        [
            Judged(case["prediction"], case["ground_truth"], data_source, tuple(case.get("equivalent_answers") or ()))
            for case in GOLDEN
        ]
    )


@pytest.mark.parametrize("vector", ROUTES)
def test_every_case(checker, vector):
    for case, reward in zip(GOLDEN, _score(checker, ROUTES[vector]), strict=True):
        expected = case[vector]
        found, wanted = (reward.accuracy, reward.format), (expected["acc_reward"], expected["format_reward"])
        assert found == wanted, case
        assert reward.score == pytest.approx(expected["score"], abs=1e-9), case


def test_branch_names(checker):
    rewards = _score(checker, "mm_gad")
    assert [reward.decided_by for reward in rewards] == [case["decided_by"] for case in GOLDEN]


def test_visual_logic_is_graded_like_math(checker):
    assert _score(checker, "visual_logic-26k") == _score(checker, "math-77k")


def test_rules_without_math_verify():
    """The rules alone give the published verdicts of an installation without math-verify."""
    gated = {"bad_format", "empty_answer", "overlong_answer"}
    cases = [case for case in GOLDEN if case["decided_by"] not in gated]
    assert len(cases) == 267
    for case in cases:
        verdict = compare_mm_gad(case["ground_truth"], first_answer(case["prediction"]))
        assert bool(verdict.correct) == (case["mm_gad_without_math_verify"]["acc_reward"] == 1.0), case["id"]


def test_default_semantics_keeps_the_gate(checker):
    """Format, empty and overlong answers are decided as published; only answers that were read elsewhere differ."""
    read_elsewhere = {234, 235, 236, 237}
    with AnswerChecker() as default:
        for case in GOLDEN:
            if case["category"] == "format" and case["id"] not in read_elsewhere:
                (reward,) = default.score([Judged(case["prediction"], case["ground_truth"], "mm_gad")])
                assert reward.score == pytest.approx(case["mm_gad"]["score"]), case["id"]
