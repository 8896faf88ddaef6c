"""Plain reward functions: the arguments that they get are those of TRL, and everything that they may give."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from prism_fast.rewards import AnswerChecker, Judged, Reward, RewardFunctionError, SourceRewards
from prism_fast.rewards.plain import Completion, adapted, is_plain

MESSAGES = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},)
SHAPED = "<caption>c</caption><think>t</think><answer>7</answer>"


def row(text: str, **columns) -> Judged:
    return Judged(text, "7", "mine", ("seven",), "How many?", uid="train-3", messages=MESSAGES, columns=columns)


def rewards_of(function, responses: list[Judged]) -> list[Reward]:
    return adapted(function, inspect.signature(function))(responses)


def test_it_gets_lists_by_keyword_with_one_entry_per_response():
    seen = {}

    def reward(prompts, completions, solution, answer, level, **others):
        seen.update(locals())
        return [1.0, 2.0]

    rewards_of(reward, [row("one", level=1, solution="the solution"), row("two", tests=["a"])])
    assert seen["prompts"] == [list(MESSAGES)] * 2 and seen["completions"] == ["one", "two"]
    assert seen["solution"] == ["the solution", "7"] and seen["answer"] == ["7", "7"] and seen["level"] == [1, None]
    assert seen["others"] == {
        "ground_truth": ["7", "7"],
        "data_source": ["mine", "mine"],
        "question": ["How many?"] * 2,
        "equivalent_answers": [["seven"], ["seven"]],
        "uid": ["train-3", "train-3"],
        "tests": [None, ["a"]],
    }


def test_without_kwargs_it_gets_only_what_it_names():
    def reward(completions, answer):
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    found = rewards_of(reward, [row("7"), row("8")])
    assert [r.score for r in found] == [1.0, 0.0]


@pytest.mark.parametrize("text", ["7", "<answer>7</answer>", "", "a\nb", "¾ 𝔘"])
def test_a_completion_is_text_and_conversation(text):
    completion = Completion(text)
    assert completion == text and completion[1:3] == text[1:3] and isinstance(completion, str)
    for place in (0, -1):
        assert completion[place]["content"] == text and completion[place]["role"] == "assistant"
        assert completion[place].get("content") == text and completion[place].get("name") is None
        if text:
            assert completion[place] == text[place]
    assert [c[0]["content"] for c in [completion]] == [text] and list(completion) == list(text)


def test_functions_of_trl_itself_run_unchanged():
    """One written for messages, and one for text."""
    rewards = pytest.importorskip("trl.rewards")
    assert is_plain(inspect.signature(rewards.accuracy_reward))
    found = rewards_of(rewards.accuracy_reward, [row(r"so $\boxed{7}$"), row(r"so $\boxed{8}$")])
    assert [(r.score, r.accuracy) for r in found] == [(1.0, 1.0), (0.0, 0.0)]

    def unique_letters(completions, **kwargs):
        return [float(len(set(completion))) for completion in completions]

    assert [r.score for r in rewards_of(unique_letters, [row("aab"), row("abc")])] == [2.0, 3.0]


def test_a_number_above_zero_is_right_and_the_format_is_that_of_the_grammar():
    def reward(completions, **kwargs):
        return [0.5, -1, True]

    found = rewards_of(reward, [row(SHAPED), row("7"), row("7")])
    assert found[0] == Reward(0.5, 1.0, 1.0, "reward")
    assert [(r.score, r.accuracy, r.format) for r in found[1:]] == [(-1.0, 0.0, 0.0), (1.0, 1.0, 0.0)]


def test_none_has_no_score_and_a_mapping_gives_parts():
    def reward(completions, **kwargs):
        return (None, {"score": 2, "accuracy": 0, "brief": 0.25}, {"score": None, "seen": 1}, {"score": 1, "format": 1})

    first, second, third, last = rewards_of(reward, [row("7")] * 4)
    assert first == Reward(None, 0.0, 0.0, "not_scored")
    assert second == Reward(2.0, 0.0, 0.0, "reward", {"brief": 0.25})
    assert third == Reward(None, 0.0, 0.0, "not_scored", {"seen": 1.0})
    assert last == Reward(1.0, 1.0, 1.0, "reward")


@pytest.mark.parametrize("values", [np.array([1.0, 2.0], np.float32), torch.tensor([1.0, 2.0]), iter((1, 2))])
def test_numbers_of_arrays_and_tensors_are_taken(values):
    assert [r.score for r in rewards_of(lambda completions, **kwargs: values, [row("7"), row("8")])] == [1.0, 2.0]


def test_a_function_cannot_change_the_prompt():
    def reward(prompts, completions, **kwargs):
        for prompt in prompts:
            prompt[0]["content"].clear()
        return [0.0 for _ in prompts]

    rewards_of(reward, [row("7")])
    assert len(MESSAGES[0]["content"]) == 2


SOURCE = """
def text(completions, **kwargs):
    return ["1.0" for _ in completions]

def short(completions, **kwargs):
    return [1.0]

def one(completions, **kwargs):
    return 1.0

def nameless(completions, **kwargs):
    return [{"accuracy": 1.0} for _ in completions]

def infinite(completions, **kwargs):
    return [float(c == "") and float("inf") for c in completions]

def level(completions, level):
    return [1.0 for _ in completions]

def raises(completions, **kwargs):
    return [c.index("t") for c in completions]

def state(completions, trainer_state):
    return []

def ids(completion_ids, **kwargs):
    return []

def logs(completions, log_extra, **kwargs):
    return []

async def later(completions, **kwargs):
    return []
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", r"gave '1.0' for row 'train-3', response 1 of 5 \('text'\); allowed: a number, None, or a mapping"),
        ("short", "gave 1 rewards for 5 responses; one for each, in order"),
        ("one", "gave a float, not a list with one number for each response"),
        ("nameless", r"gave \{'accuracy': 1.0\} for row 'train-3', response 1 of 5"),
        ("infinite", r"reward of row 'train-3', response 2 of 5 \(''\) has score=inf; it must be a finite number"),
        ("level", "needs level; the rows have prompts, completions, "),
        ("raises", r"raised ValueError: .* for row 'train-3', response 2 of 5 \(''\)"),
        ("state", "wants 'trainer_state': the trainer's state is not given"),
        ("ids", "wants 'completion_ids': token ids are not given .rlvr.overlong_buffer"),
        ("logs", "wants 'log_extra': return a mapping with 'score'"),
        ("later", "is asynchronous; write it as a plain def"),
    ],
)
def test_what_it_cannot_be_or_give_is_refused_by_function_and_row(tmp_path, monkeypatch, name, said):
    module = f"plain_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardFunctionError, match=rf"^reward.functions.mine.*{module}:{name}.*{said}"):
        with SourceRewards(AnswerChecker(), {"mine": f"{module}:{name}"}) as rewards:
            rewards.probe(row("text"))
