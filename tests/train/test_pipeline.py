"""All stages on a very small policy: what a run leaves behind, that it repeats bit for bit, and how it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_fast import cli
from prism_fast.config import STAGES, load_config
from prism_fast.models.discriminator import load_discriminator
from prism_fast.models.policy import load_policy
from prism_fast.report.html import write_report
from prism_fast.rollout.engines import ENGINES
from prism_fast.rollout.hf import HFRollout
from prism_fast.track.metrics import reproducible
from prism_fast.train.pipeline import run_eval, run_stages
from prism_fast.train.rollout_log import RolloutReader, dump_path
from tests.train.conftest import SMALL


def _lines(folder: Path, *, timed: bool = False) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records if timed else [reproducible(record) for record in records]


def _of(folder: Path, stage: str) -> list[dict]:
    return [record for record in _lines(folder, timed=True) if record["stage"] == stage]


def test_every_stage_leaves_its_metrics_and_its_model(finished):
    assert [r["name"] for r in _of(finished, "stage")] == list(STAGES)
    assert [r["after"] for r in _of(finished, "eval")] == [stage for stage in STAGES if stage != "warmup"]
    assert _of(finished, "sft")[-1]["sft/loss"] < 0.5 * _of(finished, "sft")[0]["sft/loss"]
    rates = [step["sft/lr"] for step in _of(finished, "sft_continued")]
    # A hundredth of the rate of SFT (continued_lr_scale), its warm-up of 20 updates, and on the way to zero.
    assert rates == pytest.approx([4e-5 * (k + 1) / 20 * (1 - k / 4) for k in range(4)])
    for step in _of(finished, "align"):
        assert step["disc/tokens"] > 0 and step["policy/entropy"] > 0 and step["response_length/max"] <= 72
        assert step.get("rollout/logprob_gap_max", 0) < 1e-4  # float32: the sampler's policy is the one that learns
    assert any("disc/margin_reasoning" in step or step["disc/ties_reasoning"] for step in _of(finished, "align"))
    for name in ("sft", "sft_continued", "rlvr_direct", "align", "rlvr"):
        load_policy(finished / "export" / name)
        items = [json.loads(line) for line in (finished / "evals" / f"{name}.jsonl").read_text().splitlines()]
        assert len(items) == 10 and {item["correct"] for item in items} <= {0, 1}
    for name in ("discriminator-warmup", "discriminator"):
        load_discriminator(finished / "export" / name)


def test_evaluations_are_at_the_training_step_behind_which_they_were_made(finished):
    trained = [_of(finished, stage)[-1]["step"] for stage in STAGES]
    reached = list(accumulate(trained))
    assert min(trained) > 0 and [r["step"] for r in _of(finished, "eval")] == [*reached[:3], *reached[4:]]
    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("eval/accuracy")] == [*reached[:3], *reached[4:]]
    assert [event.step for event in board.Scalars("align/policy/loss")] == list(range(reached[3] + 1, reached[4] + 1))
    tags = board.Tags()["scalars"]
    assert "sft/loss" in tags and not [tag for tag in tags if len(set(tag.split("/"))) < len(tag.split("/"))]


def test_the_control_of_alignment_is_rlvr_from_sft_with_as_many_updates_and_the_same_tasks(
    finished, run_again, tmp_path
):
    """Alone from SFT's export it gives the bits of the whole run, where SFT continued goes before it."""
    start = [f"model.policy={finished / 'export/sft'}", f"model.discriminator={finished / 'export/discriminator'}"]
    more = ["stages=[rlvr_direct,align,rlvr]", "dump_rollouts_every=1", "data.eval=null"]
    run = run_again(tmp_path / "run", *start, *more)
    weights = "export/rlvr_direct/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    # Alignment and RLVR have two updates each. Two prompts of a step have four responses each.
    for stage, steps in (("rlvr_direct", 4), ("align", 2), ("rlvr", 2)):
        assert [step["rollout/responses"] for step in _of(run, stage)] == [8] * steps
    assert sum("policy/grad_norm" in step for step in _of(run, "rlvr_direct")) > 0
    readers = {stage: RolloutReader(dump_path(run, stage)) for stage in ("rlvr_direct", "rlvr")}
    for step in (1, 2):
        control, last = ([record["uid"] for record in reader.step(step)] for reader in readers.values())
        assert control == last and len(control) == 8


def test_joint_updates_move_policy_and_discriminator(finished):
    before, after = (load_policy(finished / "export" / name).state_dict() for name in ("sft", "rlvr"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    before, after = (
        load_discriminator(finished / "export" / name).state_dict()
        for name in ("discriminator-warmup", "discriminator")
    )
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_the_report_of_a_real_run_is_written(finished, tmp_path):
    page = write_report(shutil.copytree(finished, tmp_path / "run")).read_text(encoding="utf-8")
    assert "data:image/png;base64" in page


def test_one_seed_one_result_to_the_bit(finished, run_again, tmp_path):
    again = run_again(tmp_path / "again")
    assert _lines(again) == _lines(finished)
    for name in ("sft", "align", "rlvr"):
        assert (again / "evals" / f"{name}.jsonl").read_bytes() == (finished / "evals" / f"{name}.jsonl").read_bytes()


def test_another_seed_differs(finished, run_again, tmp_path):
    other = run_again(tmp_path / "other", "stages=[sft]", "sft.max_updates=2", "sft.eval_every=2", "seed=2")
    assert _of(other, "sft")[0]["sft/loss"] != _of(finished, "sft")[0]["sft/loss"]


def test_the_trained_policy_in_memory_is_evaluated_as_its_export_is(finished, small_data, tmp_path):
    for name in ("sft", "rlvr"):
        overrides = [*small_data, *SMALL, f"model.policy={finished / 'export' / name}", f"out={tmp_path / name}"]
        run_eval(load_config("digits", overrides), Console(quiet=True))
        evaluated = (tmp_path / name / "evals" / "eval.jsonl").read_bytes()
        assert evaluated == (finished / "evals" / f"{name}.jsonl").read_bytes()


def test_one_engine_generates_for_the_whole_run(finished, small_run, tmp_path, monkeypatch):
    made, attached, closed = [], [], []

    class Counted(HFRollout):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

        def attach(self, policy, processor):
            attached.append(policy)
            super().attach(policy, processor)

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setitem(ENGINES, "counted", Counted)
    small = ["stages=[sft_continued,rlvr]", "rollout.engine=counted", "rlvr.steps=1", "eval.limit=2"]
    policy = f"model.policy={finished / 'export' / 'sft'}"
    run_stages(load_config("digits", [*small_run, *small, policy, f"out={tmp_path / 'run'}"]), Console(quiet=True))
    assert len(made) == 1 and closed == made
    continued, trained, evaluated = attached  # each stage trains a policy of its own and evaluates it
    assert trained is evaluated is not continued


def _command(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["prism-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_errors_a_user_can_cure_are_one_message_and_exit_code_1(finished, small_data, tmp_path, monkeypatch, capsys):
    out = f"out={tmp_path / 'never'}"
    files = dict(item.removeprefix("data.").split("=", 1) for item in small_data)
    missing_image = Path(files["sft"]).parent / "one-image-missing.json"  # beside the images of the others
    records = json.loads(Path(files["sft"]).read_text())
    records[3]["images"] = ["images/nowhere.png"]
    missing_image.write_text(json.dumps(records))
    trained = f"model.policy={finished / 'export/sft'}"
    cases = [
        (["run", "digits", "sft.lerning_rate=1"], ["lerning_rate"]),
        (["run", "digits", out, "data.source=files"], ["data.sft"]),
        (
            ["sft", "digits", out, *small_data, f"data.sft={missing_image}"],
            ["nowhere.png", "one-image-missing.json", "row 3"],
        ),
        (["rlvr", "digits", out, *small_data, trained, f"data.rlvr={files['sft']}"], ["sft.json"]),
        (["rlvr", "digits", out, *small_data], ["model.policy"]),
        (["align", "digits", out, *small_data, trained], ["model.discriminator"]),
        (["rlvr", "digits", out, *small_data, f"model.policy={finished / 'export/discriminator'}"], ["qwen3_vl_moe"]),
        (["run", "digits", f"out={finished}"], ["not empty"]),
        (["run", "digits", out, "device=cuda:7"], ["cuda:7"]),
        (["run", "digits", out, "rollout.engine=vlm"], ["rollout.engine", "hf", "'vlm'"]),
        (["report", str(tmp_path / "no-run")], ["no-run"]),
    ]
    for arguments, parts in cases:
        code, message = _command(monkeypatch, capsys, *arguments)
        assert code == 1, (arguments, message)
        for part in parts:
            assert part in message, (arguments, message)
        assert "Traceback" not in message


def test_a_checkpoint_of_another_shape_names_its_tensors(finished, small_data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bent"
    folder.mkdir()
    for file in (finished / "export" / "sft").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 32
    (folder / "config.json").write_text(json.dumps(config))
    code, message = _command(
        monkeypatch, capsys, "rlvr", "digits", f"out={tmp_path / 'never'}", *small_data, f"model.policy={folder}"
    )
    assert code == 1 and "mlp" in message and "shape" in message


def test_help_names_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prism-fast", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command in ("run", "sft", "warmup", "align", "rlvr", "eval", "report"):
        assert command in shown
