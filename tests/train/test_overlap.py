"""Finished groups are graded while others are generated: the same rewards, in a thread, never by a user's function."""

from __future__ import annotations

import json
import threading

import pytest

from prism_fast.rewards import AnswerChecker, Judged, Reward, SourceRewards
from prism_fast.rollout.engines import ENGINES
from prism_fast.rollout.hf import HFRollout
from prism_fast.track.metrics import reproducible
from tests.train.conftest import run_small


class Streaming(HFRollout):
    """Hands groups over one by one, the last first."""

    streams = True

    def generate(self, *arguments, finished=None, **options):
        groups = super().generate(*arguments, **options)
        for place in reversed(range(len(groups) if finished else 0)):
            finished(place, groups[place])
        return groups


def lines(folder):
    return [reproducible(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same(small_run, finished, tmp_path, monkeypatch):
    exports = finished / "export"
    policies = [f"model.policy={exports / 'sft'}", f"model.discriminator={exports / 'discriminator-warmup'}"]
    short = [*small_run, *policies, "stages=[align,rlvr]", "align.steps=1", "rlvr.steps=1", "eval.limit=2"]
    threads, score = [], AnswerChecker.score

    def noted(self, responses):
        threads.append((threading.current_thread().name.partition("_")[0], len(responses)))
        return score(self, responses)

    monkeypatch.setattr(AnswerChecker, "score", noted)
    plain = run_small(tmp_path / "plain", short)
    assert {name for name, _ in threads} == {"MainThread"}
    threads.clear()
    monkeypatch.setitem(ENGINES, "hf", Streaming)
    streamed = run_small(tmp_path / "streamed", short)
    assert [count for name, count in threads if name == "grading"] == [4] * 4, "groups of two prompts in two steps"
    assert lines(streamed) == lines(plain)
    for name in ("align", "rlvr"):
        file = f"export/{name}/model.safetensors"
        assert (streamed / file).read_bytes() == (plain / file).read_bytes()


def length(responses: list[Judged]) -> list[Reward]:
    return [Reward(float(len(response.text)), 0.0, 0.0, "length") for response in responses]


def test_a_function_of_the_recipes_is_never_called_early():
    with SourceRewards(AnswerChecker(workers=1), {"mine": f"{__name__}:length"}) as rewards:
        mine, other = Judged("abc", "4", "mine"), Judged("<answer>4</answer>", "4", "math-77k")
        assert rewards.begin([other, mine]) is None
        assert rewards.begin([other]).result() == rewards.score([other])
        assert rewards.score([mine])[0].score == 3.0


def test_what_fails_early_fails_the_run(monkeypatch):
    def failing(self, responses):
        raise OSError("played")

    monkeypatch.setattr(AnswerChecker, "score", failing)
    with SourceRewards(AnswerChecker(workers=1), {}) as rewards:
        begun = rewards.begin([Judged("", "4", "math-77k")])
        with pytest.raises(OSError, match="played"):
            begun.result()
