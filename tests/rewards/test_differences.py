"""The table of differences in the package's README is what the code does, in both semantics."""

import re
from pathlib import Path

import pytest

from prism_fast.rewards import AnswerChecker, Judged
from tests.rewards.cases import judged

README = (Path(__file__).parents[2] / "prism_fast" / "rewards" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([01]) \| ([01]) \| .+ \|$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def checkers():
    with AnswerChecker(timeout_s=20) as ours, AnswerChecker(semantics="released", timeout_s=20) as released:
        yield released, ours


def test_the_table_is_found():
    assert len(ROWS) >= 30
    assert sum(published != ours for _, _, published, ours in ROWS) >= 28


@pytest.mark.parametrize(("gold", "answer", "published", "ours"), ROWS)
def test_row(checkers, gold, answer, published, ours):
    verdicts = [checker.score([judged(answer, gold)])[0].accuracy for checker in checkers]
    assert verdicts == [float(published), float(ours)]


READ = {
    "<caption>c <answer>wrong</answer></caption><think>t</think><answer>17</answer>": (0, 1),
    "<caption>c</caption><think>try <answer>17</answer></think><answer>nope</answer>": (1, 0),
    "<caption>c</caption><think>t</think><answer>17</answer><answer>nope</answer>": (1, 0),
}


@pytest.mark.parametrize("text", READ)
def test_which_answer_is_read(checkers, text):
    verdicts = tuple(checker.score([Judged(text, "17", "mm_gad")])[0].accuracy for checker in checkers)
    assert verdicts == READ[text]


def test_equivalent_answers(checkers):
    """Published mm_gad ignores them, a placeholder discards all; ours takes every real one, for every source."""
    cases = [
        ("mm_gad", ("1/2",), (0, 1)),
        ("math-77k", ("1/2",), (1, 1)),
        ("math-77k", ("__EMPTY__", "1/2"), (0, 1)),
        ("math-77k", ("__EMPTY__",), (0, 0)),
    ]
    for source, equivalents, expected in cases:
        got = tuple(checker.score([judged("0.5", "2", source, equivalents)])[0].accuracy for checker in checkers)
        assert got == expected, (source, equivalents)


def test_geometry_without_format(checkers):
    response = Judged("so <answer>17</answer>", "17", "hiyouga/geometry3k")
    rewards = [checker.score([response])[0] for checker in checkers]
    assert [(reward.accuracy, reward.format) for reward in rewards] == [(1.0, 0.0), (0.0, 0.0)]
    assert [reward.score for reward in rewards] == [pytest.approx(0.9), 0.0]
