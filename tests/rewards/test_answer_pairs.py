"""Pairs of a ground truth and an answer with the verdict that people would give. The rules were written with
`pairs.jsonl` at hand; `unseen.jsonl`, of the same kinds, was written apart from them and tried afterwards (1,249 of
1,275 were right the first time, one false positive)."""

import json
from pathlib import Path

import pytest

from prism_fast.rewards import AnswerChecker
from tests.rewards.cases import judged

FOLDER = Path(__file__).parents[1] / "golden" / "answers"
# Right answers that we call wrong, with the reason; they count against us.
EXCUSED = {("AC", "CA"): "letters together may name a segment: AB is not BA"}


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=20) as checker:
        yield checker


@pytest.mark.parametrize(("file", "share"), [("pairs.jsonl", 0.97), ("unseen.jsonl", 0.95)])
def test_pairs(checker, file, share):
    pairs = [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= 500 and sum(not pair["correct"] for pair in pairs) >= 100
    rewards = checker.score([judged(pair["answer"], pair["gold"]) for pair in pairs])
    found = [(pair, reward) for pair, reward in zip(pairs, rewards, strict=True) if reward.accuracy != pair["correct"]]
    assert [(pair, reward) for pair, reward in found if reward.accuracy] == []  # never correct without being right
    assert [(pair, reward) for pair, reward in found if (pair["gold"], pair["answer"]) not in EXCUSED] == []
    assert len(found) <= (1 - share) * len(pairs)
    assert not any(reward.decided_by in ("timeout", "worker_died") for reward in rewards)
