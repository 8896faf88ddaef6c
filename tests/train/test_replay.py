"""Training again from dumped rollouts: the same to the bit without generating, and refused where it is not the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prism_fast.models.processor import Processor
from prism_fast.rewards import AnswerChecker, Reward
from prism_fast.rollout.hf import HFRollout
from prism_fast.track.metrics import reproducible
from prism_fast.train.rollout_log import RolloutLog, RolloutLogError, RolloutReader, dump_path
from tests.train.conftest import SMALL, run_small
from tests.train.test_rlvr import by_letters


def _metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records]


@pytest.fixture(scope="session")
def sampling_stages(small_data, finished) -> list[str]:
    export = finished / "export"
    models = [f"model.policy={export / 'sft'}", f"model.discriminator={export / 'discriminator-warmup'}"]
    dynamic = ["rlvr.dynamic_sampling.enabled=true", "rlvr.steps=3", "rlvr.updates_per_step=2"]
    stages = "stages=[rlvr_direct,align,rlvr]"
    return [*small_data, *SMALL, *models, *dynamic, stages, "data.eval=null", "dump_rollouts_every=1"]


@pytest.fixture(scope="session")
def recorded(sampling_stages, tmp_path_factory) -> Path:
    """A run that kept every step; now and then the answer checker ran out of time."""
    folder, count = tmp_path_factory.mktemp("recorded") / "run", iter(range(10**6))

    def sometimes_late(self, judged):
        late = Reward(0.2, 0.0, 1.0, "timeout")
        return [late if next(count) % 5 == 0 else reward for reward in by_letters(self, judged)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerChecker, "score", sometimes_late)
        return run_small(folder, sampling_stages)


@pytest.fixture
def forbidden(monkeypatch):
    def fail(*arguments, **options):
        pytest.fail("a replay generates nothing and checks no answer")

    monkeypatch.setattr(HFRollout, "generate", fail)
    monkeypatch.setattr(AnswerChecker, "score", fail)


def test_a_replay_is_the_run_to_the_bit(recorded, sampling_stages, tmp_path, forbidden):
    again = run_small(tmp_path / "again", [*sampling_stages, f"replay={recorded}"])
    assert _metrics(again) == _metrics(recorded)
    steps = [r for r in _metrics(again) if r["stage"] in ("rlvr_direct", "align", "rlvr")]
    assert len(steps) == 4 + 2 + 3  # the control: 2 + 3 * 2 updates, 2 in a step
    assert sum(r.get("reward/timeouts", 0) for r in steps) > 0
    assert any(r.get("sampling/banked") for r in steps)
    for name in ("rlvr_direct", "align", "discriminator", "rlvr"):
        file = Path("export") / name / "model.safetensors"
        ours, theirs = load_file(again / file), load_file(recorded / file)
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for stage in ("rlvr_direct", "align", "rlvr"):
        assert dump_path(again, stage).read_bytes() == dump_path(recorded, stage).read_bytes()


def test_other_training_on_the_same_rollouts_differs_only_behind_the_first_update(
    recorded, sampling_stages, tmp_path, forbidden
):
    settings = ["stages=[align]", "align.optimizer.lr=1e-3", f"replay={recorded}"]
    other = _metrics(run_small(tmp_path / "other", [*sampling_stages, *settings]))
    first, second = (r for r in other if r["stage"] == "align")
    ours, theirs = (r for r in _metrics(recorded) if r["stage"] == "align")
    assert {**first, "policy/lr": 0} == {**ours, "policy/lr": 0}
    assert second["reward/mean"] == theirs["reward/mean"] and second["policy/grad_norm"] != theirs["policy/grad_norm"]


def test_a_dump_of_other_end_tokens_is_trained_on_as_it_was_recorded(recorded, sampling_stages, tmp_path, forbidden):
    """Recorded runs in which `<|endoftext|>` did not end a response, from before the recipe had a section `rollout`."""
    pad = Processor.from_pretrained(recorded / "export" / "align").pad_id

    def go_on_behind_it(step: int, record: dict) -> bool:
        record["token_ids"][1] = pad
        return True

    old = _rewritten(recorded, tmp_path / "old", go_on_behind_it)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["rollout"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    again = run_small(tmp_path / "again", [*sampling_stages, "stages=[align]", f"replay={old}"])
    ours, theirs = (RolloutReader(dump_path(folder, "align")).step(1) for folder in (again, old))
    assert [r["token_ids"] for r in ours] == [r["token_ids"] for r in theirs]
    assert all(r["token_ids"][1] == pad and len(r["token_ids"]) > 2 for r in ours)


def _broken(recorded: Path, folder: Path, stage: str, change) -> Path:
    shutil.copytree(recorded, folder)
    path = dump_path(folder, stage)
    path.write_bytes(change(bytearray(path.read_bytes())))
    return folder


def _rewritten(recorded: Path, folder: Path, change) -> Path:
    """The run with each record of its alignment changed."""
    reader = RolloutReader(dump_path(recorded, "align"))
    steps = {step: reader.step(step) for step in (1, 2)}
    shutil.copytree(recorded, folder)
    log = RolloutLog(folder, "align")
    for step, records in steps.items():
        if kept := [record for record in records if change(step, record)]:
            log.write(step, kept)
    return folder


def _set(step: int, **values):
    return lambda s, record: s != step or record.update(values) or True


CASES = [
    (lambda s, r: s != 2, r"does not hold step 2.*dump_rollouts_every=1"),
    (_set(2, uid="someone-else"), r"step 2.*'someone-else'.*the task here is"),
    (_set(1, prompt_sha256="0" * 64), r"step 1.*uid.*other token ids"),
    (_set(2, images=[]), r"step 2.*uid.*another image"),
    (_set(2, reward={}), r"step 2.*uid.*not complete"),
    (lambda s, r: s != 2 or r["group"] != 1, r"step 2: round 0 holds 1 groups where this run has 2"),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_does_not_match_names_step_and_uid(recorded, sampling_stages, tmp_path, forbidden, change, message):
    broken = _rewritten(recorded, tmp_path / "broken", change)
    with pytest.raises(RolloutLogError, match=message):
        run_small(tmp_path / "again", [*sampling_stages, "stages=[align]", f"replay={broken}"])


def test_damage_is_found_and_told_with_the_last_whole_step(recorded, sampling_stages, tmp_path, forbidden):
    broken = _broken(recorded, tmp_path / "broken", "align", lambda data: data[:-1])
    with pytest.raises(
        RolloutLogError, match=r"align\.jsonl\.zst is damaged after step 1: the file ends inside a step"
    ):
        run_small(tmp_path / "again", [*sampling_stages, "stages=[align]", f"replay={broken}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.rollout.n=3"], "sampled align with .*n=4.*asks for .*n=3"),
        (["align.rollout.temperature=0.9"], "temperature=1.0.*temperature=0.9"),
        (["seed=2"], "step 1.*the task here is"),
        (["semantics=released"], "graded its answers with .*'prism_fast'.*asks for .*'released'"),
        (["reward.max_answer_chars=7"], "max_answer_chars.*1024.*max_answer_chars.*7"),
        (["reward.functions={brief: 'json:loads'}"], "functions': {}.*functions': {'brief': 'json:loads'}"),
        (["align.prompts=1"], "step 1: round 0 holds 2 groups where this run has 1"),
        (["replay=no-such-run"], "no-such-run is not a run directory"),
    ],
)
def test_another_configuration_is_refused(recorded, sampling_stages, tmp_path, forbidden, settings, message):
    with pytest.raises(RolloutLogError, match=message):
        run_small(tmp_path / "again", [*sampling_stages, "stages=[align]", f"replay={recorded}", *settings])


def test_a_run_that_cannot_be_replayed_is_refused_before_the_first_stage(recorded, small_run, tmp_path):
    folder = tmp_path / "recorded"
    shutil.copytree(recorded, folder)
    dump_path(folder, "rlvr").unlink()
    with pytest.raises(RolloutLogError, match=r"rlvr\.jsonl\.zst does not exist"):
        run_small(tmp_path / "run", [*small_run, f"replay={folder}"])
    assert not (tmp_path / "run").exists()


def _log(folder: Path) -> tuple[Path, list[int]]:
    """A dump of steps 1, 3 and 4, and the byte where each ends."""
    log, ends = RolloutLog(folder, "rlvr"), []
    for step in (1, 3, 4):
        log.write(step, [{"text": f"{step} {i}" * 40, "logprobs": [-0.1 * step, 1e-300, -i / 3]} for i in range(20)])
        ends.append(log.size())
    return log.path, ends


def test_the_reader_gives_steps_in_order_with_exact_floats(tmp_path):
    path, _ = _log(tmp_path)
    reader = RolloutReader(path)
    assert reader.step(1)[7]["logprobs"] == [-0.1, 1e-300, -7 / 3]
    assert [record["step"] for record in reader.step(4)] == [4] * 20
    with pytest.raises(RolloutLogError, match="does not hold step 5"):
        reader.step(5)
    with pytest.raises(RolloutLogError, match="does not hold step 2"):
        RolloutReader(path).step(2)
    with pytest.raises(RolloutLogError, match="does not exist"):
        RolloutReader(tmp_path / "rollouts" / "align.jsonl.zst")


def test_a_flipped_bit_or_missing_byte_anywhere_is_found_or_changes_nothing(tmp_path):
    path, ends = _log(tmp_path)
    whole, found, tried = path.read_bytes(), 0, 0
    written = RolloutReader(path).step(3)
    for at in range(ends[0], ends[1]):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        for content in (bytes(damaged), whole[:at] + whole[at + 1 :]):
            path.write_bytes(content)
            tried += 1
            try:
                assert RolloutReader(path).step(3) == written  # a few bits of a frame's header mean nothing here
            except RolloutLogError as error:
                assert "damaged after step 1" in str(error)
                found += 1
    assert found > 0.97 * tried


def test_a_file_that_ends_inside_a_step_is_told(tmp_path):
    path, ends = _log(tmp_path)
    path.write_bytes(path.read_bytes()[: ends[1] - 1])
    with pytest.raises(RolloutLogError, match="damaged after step 1: the file ends inside a step"):
        RolloutReader(path).step(3)
