"""A run with a reward function of its own: parts and rewards without a score, from the function to the report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from prism_fast.config import load_config
from prism_fast.report.html import write_report
from prism_fast.rewards import Reward
from prism_fast.train.align import step_advantage
from prism_fast.train.rollout_log import RolloutReader, dump_path
from tests.train.conftest import SMALL, run_small

SOURCE = '''
def letters(prompts, completions, answer, data_source, **columns):
    """A reward for short texts; every third response of a row has none."""
    assert all(p[-1]["role"] == "user" for p in prompts) and set(data_source) == {"own_letters"}
    seen, rewards = {}, []
    for text, uid in zip(completions, columns["uid"], strict=True):
        seen[uid] = seen.get(uid, -1) + 1
        words = len(text.split())
        given = {"score": 1 / (1 + words), "accuracy": words < 9, "words": words}
        rewards.append(None if seen[uid] % 3 == 2 else given)
    return rewards
'''


@pytest.fixture(scope="module")
def own_run(small_data, finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_letters.py").write_text(SOURCE)
    rlvr = next(value for value in small_data if value.startswith("data.rlvr=")).partition("=")[2]
    table = pq.read_table(rlvr)
    column = table.schema.get_field_index("data_source")
    pq.write_table(table.set_column(column, "data_source", [["own_letters"] * len(table)]), folder / "rlvr.parquet")
    settings = ["stages=[rlvr]", f"model.policy={finished / 'export/sft'}", f"data.rlvr={folder / 'rlvr.parquet'}"]
    settings += ["data.eval=null", "dump_rollouts_every=1", "reward.functions={own_letters: 'own_letters:letters'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield run_small(folder / "run", [*small_data, *SMALL, *settings])


def test_parts_and_missing_scores_reach_metrics_dump_and_report(own_run):
    lines = [json.loads(line) for line in (own_run / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        records = RolloutReader(dump_path(own_run, "rlvr")).step(step)
        (values,) = [line for line in lines if line["stage"] == "rlvr" and line["step"] == step]
        scored = [record for record in records if record["reward"]["score"] is not None]
        unscored = [record for record in records if record["reward"]["score"] is None]
        assert len(records) == 8 and len(unscored) == 2 == values["reward/unscored"]
        assert all(record["advantage"] == 0.0 and record["reward"]["parts"] == {} for record in unscored)
        words = [record["reward"]["parts"]["words"] for record in scored]
        assert words == [len(record["text"].split()) for record in scored]
        assert values["reward/parts/words"] == pytest.approx(sum(words) / len(words))
        assert values["reward/mean"] == pytest.approx(sum(r["reward"]["score"] for r in scored) / len(scored))
        for group in (0, 1):
            advantages = [record["advantage"] for record in scored if record["group"] == group]
            assert len(advantages) == 3 and sum(advantages) == pytest.approx(0, abs=1e-5)
    page = write_report(own_run).read_text()
    assert "Parts of the reward" in page and "words" in page


def test_advantages_that_need_every_accuracy_refuse_a_missing_one():
    rollouts = SimpleNamespace(rewards=[Reward(None, 0.0, 1.0, "not_scored"), Reward(1.0, 1.0, 1.0, "own")])
    for setting in ("align.advantage=acc_gating", "align.answer_credit=verifier"):
        also = ["align.credit=span"] if "credit" in setting else []
        with pytest.raises(ValueError, match=f"gave None, but {setting} needs the accuracy of every response"):
            step_advantage(load_config("digits", [setting, *also]), rollouts, torch.zeros(2, 2))
