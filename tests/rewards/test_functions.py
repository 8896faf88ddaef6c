"""Reward functions of a recipe: how they are found, refused and called."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from prism_fast.config import dump_config, load_config
from prism_fast.data.samples import Task
from prism_fast.data.writers import write_tasks
from prism_fast.models.policy import build_tiny_policy, save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rewards import AnswerChecker, Judged, Reward, RewardFunctionError, SourceRewards, summed_parts
from prism_fast.train.pipeline import run_eval
from tests.rewards.cases import judged
from tests.support.small_policy import SMALL

SOURCE = """
from prism_fast.rewards import Reward

CALLS = []

def by_length(responses):
    CALLS.append(len(responses))
    return [Reward(float(len(r.text)), 1.0, 1.0, "length") for r in responses]

def nothing():
    return []

def two(responses, other):
    return []

def none(responses):
    return None

def short(responses):
    return by_length(responses)[1:]

def infinite(responses):
    return [Reward(float("inf"), 1.0, 1.0, "length") for r in responses]

def raises(responses):
    return [1 / len(r.text) for r in responses]

def leaves(responses):
    import sys
    sys.exit(3) if any(not r.text for r in responses) else None
    return by_length(responses)

def parts(responses):
    return [Reward(1.0, 1.0, 1.0, "parts", {"length": len(r.text), "half": 0.5}) for r in responses]

def bad_part(responses):
    return [Reward(1.0, 1.0, 1.0, "parts", {"length": float("nan")}) for r in responses]

def odd_name(responses):
    return [Reward(1.0, 1.0, 1.0, "parts", {"a b": 1.0}) for r in responses]

def several(responses):
    if len(responses) > 1:
        raise RuntimeError("one at a time")
    return by_length(responses)

constant = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """``functions(name)``: the recipe's entry for a function of a module that only this test can import."""
    module = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(SOURCE)
    (tmp_path / f"{module}_bad.py").write_text("import no_such_thing_at_all\n")
    (tmp_path / f"{module}_worse.py").write_text("1 / 0\n")
    (tmp_path / f"{module}_exits.py").write_text("import sys\nsys.exit('no GPU')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: {"mine": f"{module}{name}" if name.startswith(("_", ":")) else name}


def test_each_source_has_its_function_and_order_is_kept(functions):
    with SourceRewards(AnswerChecker(), functions(":by_length")) as rewards:
        mine = [Judged("x" * n, "7", "mine") for n in (3, 1)]
        found = rewards.score([mine[0], judged("7", "7"), mine[1], judged("8", "7")])
        calls = rewards.functions["mine"].__globals__["CALLS"]
    assert [reward.score for reward in found] == [3.0, 1.0, 1.0, pytest.approx(0.2)]
    assert found[0] == Reward(3.0, 1.0, 1.0, "length") and calls == [2], "one call with all of its responses"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_colon", "must have the form package.module:function, got 'no_colon'"),
        ("a b:c", "must have the form"),
        ("no_such_module_anywhere:f", "no module 'no_such_module_anywhere'.*PYTHONPATH"),
        ("json.no_such_part:f", "no module 'json.no_such_part'"),
        ("_bad:f", "importing own_.* failed: No module named 'no_such_thing_at_all'; install that module"),
        ("_worse:f", "importing own_.* raised ZeroDivisionError"),
        ("_exits:f", r"importing own_.* called sys.exit\('no GPU'\).*__main__"),
        (":by_lenght", "has no 'by_lenght'. Did you mean 'by_length'?"),
        (":constant", "is a int, not a function"),
        (":nothing", r"nothing\(\) must take one argument"),
        (":two", r"two\(responses, other\) must take one argument"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_at_once(functions, name, said):
    with pytest.raises(RewardFunctionError, match=f"^reward.functions.mine.*{said}"):
        SourceRewards(AnswerChecker(), functions(name))


def test_a_built_in_source_is_not_replaced(functions):
    with pytest.raises(RewardFunctionError, match="mm_gad_llm is graded by a built-in function"):
        SourceRewards(AnswerChecker(), {"mm_gad_llm": functions(":by_length")["mine"]})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":none", "must give a list .* for each of 5 responses, in order; got a NoneType"),
        (":short", "for each of 5 responses, in order; got 4"),
        (":infinite", r"reward of row 'train-12', response 1 of 5 \('text'\) has score=inf; it must be a finite"),
        (":raises", r"raised ZeroDivisionError: .* for row 'train-12', response 2 of 5 \(''\)"),
        (":leaves", r"called sys.exit\(3\) for row 'train-12', response 2 of 5 \(''\)"),
        (":several", "raised RuntimeError: one at a time for 5 responses together"),
        (":bad_part", "response 1 of 5 .* has length=nan; it must be a finite number"),
        (":odd_name", "has a part named 'a b'; names are"),
    ],
)
def test_a_function_that_gives_something_else_is_found_by_odd_texts(functions, name, said):
    with SourceRewards(AnswerChecker(), functions(name)) as rewards, pytest.raises(RewardFunctionError) as caught:
        rewards.probe(Judged("text", "7", "mine", uid="train-12"))
    assert re.match(f"reward.functions.mine .own_.*{said}", str(caught.value)), str(caught.value)


def test_parts_are_summed_by_name(functions):
    with SourceRewards(AnswerChecker(), functions(":parts")) as rewards:
        found = rewards.score([Judged("xx", "7", "mine"), judged("7", "7"), Judged("xxxx", "7", "mine")])
    assert found[0].parts == {"length": 2, "half": 0.5} and found[1].parts == {}
    assert summed_parts(found) == {"half": (1.0, 2), "length": (6.0, 2)}


def test_a_run_grades_with_it_and_its_configuration_names_it(tmp_path, monkeypatch):
    """Also what stands in the README: the example, by a recipe's key."""
    monkeypatch.syspath_prepend("examples")
    processor = Processor.build(train_tokenizer(["<caption>1</caption>"] * 9, 320))
    save_policy(build_tiny_policy(processor, SMALL, seed=1), processor, tmp_path / "policy")
    prompt = [{"role": "user", "content": "What is 1 + 1?"}]
    write_tasks(tmp_path / "eval.parquet", [Task(f"t{i}", prompt, [], "brief", "2") for i in range(3)])
    config = load_config(
        "digits",
        [
            "stages=[]",
            "data.source=files",
            f"data.eval={tmp_path / 'eval.parquet'}",
            f"model.policy={tmp_path / 'policy'}",
        ]
        + [
            "eval.max_new_tokens=4",
            'reward.functions={brief: "own_reward:exact_and_brief"}',
            f"out={tmp_path / 'run'}",
        ],
    )
    assert load_config_again(config, tmp_path).reward.functions == {"brief": "own_reward:exact_and_brief"}
    assert run_eval(config, Console(quiet=True)) == 0.0
    lines = (tmp_path / "run" / "evals" / "eval.jsonl").read_text().splitlines()
    assert {json.loads(line)["decided_by"] for line in lines} == {"no_answer"}


def load_config_again(config, folder):
    (folder / "again.yaml").write_text(dump_config(config))
    return load_config(str(folder / "again.yaml"))
