"""Every example runs and does what it says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import torch
from typer.testing import CliRunner

from prism_fast.cli import app
from prism_fast.models.forward import collate, hidden_states, response_rows

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
# Example -> the file that runs it; those without one run here.
ELSEWHERE = {
    "trl_grpo.py": "tests/integrations/test_trl.py",
    "verl_losses.py": "tests/integrations/test_verl.py",
    "own_reward.py": "tests/contracts/test_reward.py",
    "plain_reward.py": "tests/contracts/test_reward.py",
}


def test_every_example_has_a_test():
    here = Path(__file__).read_text()
    for path in FOLDER.iterdir():
        if path.suffix in (".py", ".yaml"):
            where = ELSEWHERE.get(path.name)
            text = here if where is None else (ROOT / where).read_text()
            assert path.stem in text.replace(f'"{path.name}": ', ""), path.name


def test_the_loop_learns(capsys):
    runpy.run_path(str(FOLDER / "loop_with_ops.py"))
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", capsys.readouterr().out)]
    assert len(rewards) == 3 and rewards[0] < rewards[-1] and rewards[-1] > 0.9


def test_the_stock_model_gives_the_same_loss_with_our_experts(capsys, monkeypatch):
    from prism_fast.models import experts

    calls, ours = [], experts.experts_forward
    monkeypatch.setattr(experts, "experts_forward", lambda *a, **k: calls.append(1) or ours(*a, **k))
    runpy.run_path(str(FOLDER / "stock_experts.py"))
    found = [float(x) for x in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert len(calls) == 2 and found[0] == found[1]  # two layers; the second pass is transformers' own


def test_the_packed_forward_gives_the_log_probs_of_plain_rows(capsys):
    found = runpy.run_path(str(FOLDER / "packed_forward.py"))
    model, prompt, responses, processor = (found[name] for name in ("model", "prompt", "responses", "processor"))
    batch = collate([prompt], [0] * len(responses), responses, model_config=model.config, pad_id=processor.pad_id)
    rows = response_rows(batch)
    hidden = hidden_states(model.model, batch).flatten(0, 1)[rows.index]
    plain = model.lm_head(hidden).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
    torch.testing.assert_close(found["logp"], plain, rtol=1e-5, atol=1e-5)
    computed, alone = map(int, re.findall(r"(\d+) (?:tokens computed|without)", capsys.readouterr().out))
    assert computed == found["row"].tokens < alone == int(batch.lengths.sum())


def test_own_data_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["run", "examples/own_data.yaml", f"out={tmp_path / 'run'}", "threads=1"])
    assert done.exit_code == 0, done.output
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["stage"] == "sft"] == [1, 2, 3, 4]
    assert len([x for x in (FOLDER / "own_data.yaml").read_text().splitlines() if not x.startswith("#")]) == 3
