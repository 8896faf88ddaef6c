"""`semantics="released"` against the reference vectors, case by case."""

import pytest

from prism_fast.released.geo3k import spoken_form
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


# Verdicts of the published grader (mathruler 0.1.0 with pylatexenc 2.10): commands that it does not know vanish.
GEOMETRY = [
    ("B", r"\triangle B", 1),
    (r"\triangle ABC", "ABC", 1),
    ("B", r"\foo B", 1),
    (r"\angle B", "B", 0),
    ("5", r"\angle 5", 0),
    ("AB", r"\overline{AB}", 1),
    ("AB", r"\perp AB", 0),
    (r"\perp", "⊥", 1),
    ("R", r"\mathbb{R}", 0),
    ("x", r"\hat{x}", 0),
    ("é", r"\'e", 1),
    ("sqrt(5)", r"\sqrt[3]{5}", 1),
    ("5", r"\textcolor{red}{5}", 1),
    ("5", r"\hspace{1cm}5", 1),
    ("15", r"\hspace{1cm}5", 0),
    ("6", r"\displaystyle 6", 1),
    ("[1 2]", r"\begin{pmatrix}1&2\end{pmatrix}", 1),
    (r"\frac~\frac", r"\frac ~\frac", 1),
]


@pytest.mark.parametrize(("gold", "answer", "accuracy"), GEOMETRY)
def test_latex_commands_of_geometry(checker, gold, answer, accuracy):
    (reward,) = checker.score([Judged(f"<answer>{answer}</answer>", gold, "hiyouga/geometry3k")])
    assert reward.accuracy == accuracy


def test_no_answer_leaves_something_to_the_next_one():
    """pylatexenc's reader remembers a title that one text sets, and shows it where another one asks for it."""
    before = spoken_form(r"\maketitle")
    spoken_form(r"\title{secret}")
    assert spoken_form(r"\maketitle") == before and "secret" not in before


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
    """Formats and overlong answers are decided as published, but for repeated and for blank sections, which earn
    nothing."""
    repeated, blank = {232, 233, 234, 235, 236, 237}, {238, 239, 240}
    with AnswerChecker() as default:
        for case in GOLDEN:
            if case["category"] == "format":
                (reward,) = default.score([Judged(case["prediction"], case["ground_truth"], "mm_gad")])
                wanted = 0.0 if case["id"] in repeated | blank else case["mm_gad"]["score"]
                assert reward.score == pytest.approx(wanted), case["id"]
                assert wanted or reward.decided_by == "bad_format"
