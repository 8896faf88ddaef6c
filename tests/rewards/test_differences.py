"""The table of differences in the package's README is what the code does, in both semantics."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_sharegpt
from prism_fast.data.screen import screen
from prism_fast.rewards import AnswerChecker, Judged, failures
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
    "<caption>c <answer>wrong</answer></caption><think>t</think><answer>17</answer>": (0, 0),
    "<caption>c</caption><think>try <answer>17</answer></think><answer>nope</answer>": (1, 0),
    "<caption>c</caption><think>t</think><answer>17</answer><answer>nope</answer>": (1, 0),
}


@pytest.mark.parametrize("text", READ)
def test_published_grades_the_first_of_several_answers_ours_none(checkers, text):
    verdicts = tuple(checker.score([Judged(text, "17", "mm_gad")])[0].accuracy for checker in checkers)
    assert verdicts == READ[text]


def published_score(compute, *arguments, **extras):
    """The published call of a grader: any exception is swallowed and the call made again without its extras."""
    try:
        return compute(*arguments, **extras)
    except Exception:
        return compute(*arguments)


def published_filter(rows, measure, limit):
    """The published length filter: a row that cannot be measured is dropped as if it were too long."""
    kept = []
    for row in rows:
        try:
            if measure(row) <= limit:
                kept.append(row)
        except Exception:
            pass
    return kept


def published_math(answer, gold):
    """math-verify as the published graders call it: every exception means "wrong"."""
    from math_verify import parse, verify

    try:
        return float(verify(parse(f"${gold}$"), parse(f"${answer}$")))
    except Exception:
        return 0.0


def test_published_swallows_errors_ours_counts(tmp_path):
    """Graders, length filter and symbolic checks: published, an error looks like a wrong answer or a short file; here
    it has a name and a count."""

    # 1. A grader that fails on its extras is asked again without them, and nobody learns of it.
    def grader(answer, gold, equivalents=()):
        return float(answer == gold or answer in [other.lower() for other in equivalents])

    assert published_score(grader, "six", "6", equivalents=["Six", None]) == 0.0
    with AnswerChecker() as checker, pytest.raises(TypeError):
        checker.score([judged("six", "6", equivalents=("Six", None))])

    # 2. Off the main thread math-verify's alarm cannot be set: a right answer is wrong. Worker processes have none.
    with ThreadPoolExecutor(1) as thread, AnswerChecker(timeout_s=20) as checker:
        assert published_math("x+1", "1+x") == 1.0
        assert thread.submit(published_math, "x+1", "1+x").result() == 0.0
        (reward,) = thread.submit(checker.score, [judged("x+1", "1+x")]).result()
        assert (reward.accuracy, reward.decided_by) == (1.0, "math_verify")

    # 3. What a check could not decide is counted apart from what is wrong.
    with AnswerChecker(semantics="released", timeout_s=0.5) as checker:
        rewards = checker.score([judged("9**9**9", "7"), judged("8", "7")])
    assert [reward.score for reward in rewards] == [0.2, 0.2]
    assert failures(rewards) == {"timeouts": 1, "worker_deaths": 0, "judge_errors": 0}

    # 4. A damaged image costs the row without a trace; here it is an error, or a skip under its reason.
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    rows = [{"messages": turns, "images": [f"{name}.png"]} for name in ("good", "bad")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def measure(row):
        return Image.open(tmp_path / row["images"][0]).width

    assert published_filter(rows, measure, 2048) == rows[:1]
    samples = read_sharegpt(tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"rows.json, row 1: field 'images\[0\]'"):
        screen(samples)
    counts = screen(samples, problems=[]).counts()
    assert counts == {"kept": 1, "skipped_bad": 0, "skipped_image": 1, "skipped_long": 0}


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
