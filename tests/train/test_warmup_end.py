"""When the discriminator's warm-up ends or is refused: spans without a difference, responses that were cut."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from prism_fast.config import load_config
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import build_tiny_policy
from prism_fast.rollout.protocol import Completion
from prism_fast.train.context import open_run
from prism_fast.train.warmup import WarmupError, pair_log, sample_pairs, warm_up
from tests.support.small_policy import SMALL
from tests.train.test_warmup_pairs import pair, pictures

SETTINGS = ["stages=[warmup]", "warmup.prompts=2", "warmup.heldout_share=0.4", "warmup.eval_every=1"]
SETTINGS += ["warmup.max_updates=4", "warmup.target_margin=-5", "device=cpu", "threads=1"]


def train(tmp_path, processor, pairs) -> str:
    """The messages of a warm-up on pairs."""
    told = io.StringIO()
    config = load_config("digits", [*SETTINGS, f"out={tmp_path / 'run'}"])
    model = build_discriminator(build_tiny_policy(processor, SMALL, seed=2), seed=3, head_std=0.2)
    with open_run(config, Console(file=told, width=200)) as run:
        warm_up(run, model, processor, pairs)
    return told.getvalue()


def pairs_of(count: int, *, caption: bool, reasoning: bool):
    """Pairs of ``count`` prompts; ``caption``, ``reasoning``: whether the student's differs from the teacher's."""
    made = [pair(f"p{n}", image, f"{n} 2", f"{n} 3") for n, image in enumerate(pictures(count))]
    return [
        replace(
            p,
            student_caption=p.student_caption if caption else p.teacher_caption,
            student_cot=p.student_cot if reasoning else p.teacher_cot,
        )
        for p in made
    ]


@pytest.mark.parametrize("equal", ["caption", "reasoning"])
def test_a_span_that_always_equals_the_teachers_is_not_waited_for(tmp_path, processor, equal):
    differs = {"caption": True, "reasoning": True} | {equal: False}
    told = train(tmp_path, processor, pairs_of(5, **differs))
    assert f"no held-out {equal} differs from its teacher's; it has no margin, which is not waited for" in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (other,) = {"caption", "reasoning"} - {equal}
    assert len(lines) == 1 and lines[0][f"warmup/heldout_margin_{other}"] > -5
    assert f"warmup/heldout_margin_{equal}" not in lines[0] and lines[0][f"warmup/heldout_pairs_{equal}"] == 0


def test_both_spans_are_waited_for_where_both_differ(tmp_path, processor):
    assert "not waited for" not in train(tmp_path, processor, pairs_of(5, caption=True, reasoning=True))


def test_without_any_difference_it_is_refused_before_the_first_update(tmp_path, processor):
    with pytest.raises(WarmupError, match="every caption and reasoning of the policy equals its teacher's"):
        train(tmp_path, processor, pairs_of(5, caption=False, reasoning=False))
    assert not (tmp_path / "run").exists()


class Scripted:
    """An engine that gives the same responses to every prompt."""

    def __init__(self, *completions: Completion) -> None:
        self.completions = list(completions)

    def generate(self, prompts, sampling, seeds, *, poll):
        return [self.completions for _ in prompts]

    def wake(self): ...

    def sleep(self): ...


class Prompts(list):
    def without_images(self, index):
        return self[index]


CUT = "<caption>1 2</caption><think>so"
MALFORMED = "no tags at all"
GOOD = "<caption>1 2</caption><think>so</think><answer>3</answer>"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({CUT: "length"}, r"none of 2 .*form \(2 cut at warmup.max_new_tokens=9: raise it\)"),
        ({MALFORMED: "stop"}, r"none of 2 .*form \(2 malformed: the policy needs \(more\) SFT first\)"),
        ({CUT: "length", MALFORMED: "stop"}, r"none of 4 .*\(2 cut at warmup.max_new_tokens=9: raise it; 2 malformed"),
        ({GOOD: "stop", CUT: "length", MALFORMED: "stop"}, None),
    ],
)
def test_cut_responses_are_told_from_malformed_ones(tmp_path, processor, monkeypatch, texts, said):
    config = load_config("digits", [*SETTINGS, "warmup.max_new_tokens=9", f"out={tmp_path / 'run'}"])
    completions = [Completion(tuple(processor.encode_plain(t)), (), None, end) for t, end in texts.items()]
    with open_run(config, Console(quiet=True)) as run:
        monkeypatch.setattr(type(run), "rollout_engine", lambda *_: Scripted(*completions))
        tasks = Prompts([pair(f"p{n}", image, "", "") for n, image in enumerate(pictures(2))])
        if said is None:
            pairs = sample_pairs(run, torch.nn.Identity(), processor, tasks, pair_log(run, tasks))
            assert [p.student_caption for p in pairs] == ["<caption>1 2</caption>"] * 2
            (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            found = {key: value for key, value in json.loads(line).items() if key.startswith("pairs/")}
            assert found == {"pairs/kept": 2, "pairs/dropped": 4, "pairs/cut": 2}
        else:
            with pytest.raises(WarmupError, match=said):
                sample_pairs(run, torch.nn.Identity(), processor, tasks, pair_log(run, tasks))
