"""Whole runs on two ranks, ZeRO-3: the same as one process, whatever stops them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-engines")

from prism_fast.models.processor import Processor
from prism_fast.track.metrics import reproducible
from prism_fast.train.rollout_log import RolloutReader, dump_path
from tests.models.exports import assert_policy_export

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds for one start
SMALL = [
    "stages=[sft,warmup,align,rlvr]",
    "device=cpu",
    "threads=1",
    "checkpoint_every=1",
    "dump_rollouts_every=1",
    "data.digits={sft_images: 200, sft_val_images: 4, align_tasks: 24, rlvr_tasks: 16, eval_images: 2}",
    "model.tiny.vocab_size=600",
    "model.tiny.num_layers=2",
    "sft.batch=16",
    "sft.max_updates=40",
    "sft.eval_every=20",
    "sft.optimizer.lr=4e-3",
    "warmup.prompts=2",
    "warmup.pairs_per_prompt=2",
    "warmup.eval_every=2",
    "warmup.target_margin=-100",
    "align.steps=3",
    "align.prompts=2",
    "align.rollout.n=4",
    "rlvr.steps=3",
    "rlvr.prompts=2",
    "rlvr.rollout.n=4",
    *(f"{key}.max_new_tokens=72" for key in ("warmup", "align.rollout", "rlvr.rollout", "eval")),
]
THRESHOLDS = "{stage3_param_persistence_threshold: 0, stage3_model_persistence_threshold: 0}"
SHARDED = ["engine.kind=deepspeed", "engine.stage=3", f"engine.deepspeed={{zero_optimization: {THRESHOLDS}}}"]


class Ended:
    """``codes`` and ``texts`` (standard output and error) of the ranks, and the seconds from the first end to the
    last."""

    def __init__(self, codes: list[int], texts: list[str], apart: float) -> None:
        self.codes, self.texts, self.apart = codes, texts, apart

    def __repr__(self) -> str:
        return "\n".join(f"rank {rank}: {self.codes[rank]}\n{text[-3000:]}" for rank, text in enumerate(self.texts))


def start(ranks: int, arguments: list[str], folder: Path, *, fault: str | None = None) -> Ended:
    """Start the ranks as a launcher does, and wait for all of them; none outlives the call."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if fault is None else {"FAULT": fault})}
    processes, files = [], []
    for rank in range(ranks):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        of_rank = {key: str(value) for key, value in (of_rank | {"MASTER_PORT": port}).items()} if ranks > 1 else {}
        files.append(folder / f"told-{rank}")
        with files[-1].open("w") as told:
            command = [sys.executable, "-m", "tests.engines.rank", *arguments]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment | of_rank, stdout=told, stderr=subprocess.STDOUT)
            )
    began, first = time.monotonic(), None
    try:
        while any(process.poll() is None for process in processes):
            if first is None and any(process.poll() is not None for process in processes):
                first = time.monotonic()
            assert time.monotonic() - began < LIMIT, "\n".join(file.read_text()[-3000:] for file in files)
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    apart = 0.0 if first is None else time.monotonic() - first
    return Ended([process.returncode for process in processes], [file.read_text() for file in files], apart)


def lines(folder: Path, *stages: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(line) for line in found if line["stage"] in stages]


def assert_near(ours: list[dict], theirs: list[dict]) -> None:
    """Losses, rewards and counts of the same steps, but for rounding."""
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() & other.keys():
            of_the_split = name.startswith(("passes/", "importance/")) or name.endswith("/tokens")
            if "gap" not in name and not of_the_split:
                near = one[name] == other[name] or math.isclose(one[name], other[name], rel_tol=1e-3, abs_tol=1e-4)
                assert near, f"{one['stage']} step {one['step']}: {name} {one[name]} {other[name]}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two ranks, from the first stage to the last."""
    folder = tmp_path_factory.mktemp("finished")
    ended = start(2, ["run", "digits", *SMALL, *SHARDED, f"out={folder / 'run'}"], folder)
    assert ended.codes == [0, 0], ended
    assert "run directory" in ended.texts[0] and "run directory" not in ended.texts[1]
    return folder / "run"


@pytest.fixture(scope="module")
def behind(finished) -> list[str]:
    """The stages that sample, from the weights of `finished`."""
    exports = finished / "export"
    models = [f"model.policy={exports / 'sft'}", f"model.discriminator={exports / 'discriminator-warmup'}"]
    return [*SMALL, *models, "stages=[align,rlvr]"]


def test_two_ranks_are_as_one_process(finished, behind, tmp_path):
    ended = start(1, ["run", "digits", *behind, f"out={tmp_path / 'run'}"], tmp_path)
    assert ended.codes == [0], ended
    assert_near(lines(tmp_path / "run", "align", "rlvr"), lines(finished, "align", "rlvr"))
    for stage in ("align", "rlvr"):
        one, two = (RolloutReader(dump_path(folder, stage)) for folder in (tmp_path / "run", finished))
        for step in (1, 2, 3):
            records = [reader.step(step) for reader in (one, two)]
            kept = [[(r["group"], r["sampled"], r["token_ids"]) for r in of_run] for of_run in records]
            assert kept[0] == kept[1] and len(kept[0]) == 8


def test_exports_of_two_ranks_load_in_stock_transformers(finished):
    prompt = Processor.from_pretrained(finished / "export/rlvr").encode_prompt([{"role": "user", "content": "3?"}], [])
    for stage in ("sft", "align", "rlvr"):
        assert_policy_export(finished / "export" / stage, prompt)


def test_a_killed_rank_ends_the_other_and_the_run_goes_on_with_the_same_bits(finished, behind, tmp_path):
    folder = tmp_path / "run"
    ended = start(2, ["run", "digits", *behind, *SHARDED, f"out={folder}"], tmp_path, fault="1 align step 2 SIGKILL")
    assert ended.codes[1] == -9 and ended.codes[0] == 1, ended
    assert ended.apart < 60 and "rank 1 of 2: align step 2" in ended.texts[0], ended
    assert [line["step"] for line in lines(folder, "align")] == [1]
    ended = start(2, ["resume", str(folder)], tmp_path)
    assert ended.codes == [0, 0], ended
    assert lines(folder, "align", "rlvr") == lines(finished, "align", "rlvr")
    for file in ("export/rlvr/model.safetensors", "rollouts/rlvr.jsonl.zst"):
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_signal_to_one_rank_saves_on_all_and_one_process_goes_on(finished, behind, tmp_path):
    folder = tmp_path / "run"
    arguments = ["run", "digits", *behind, *SHARDED, "checkpoint_every=50", f"out={folder}"]
    ended = start(2, arguments, tmp_path, fault="1 align step 2 SIGTERM")
    assert ended.codes == [0, 0], ended
    assert "stopped at align step 2" in ended.texts[0]
    refused = start(1, ["resume", str(folder)], tmp_path)
    assert refused.codes == [1] and "saved by 2 rank(s)" in refused.texts[0] and "--convert-ranks" in refused.texts[0]
    shutil.copytree(folder, tmp_path / "one")
    ended = start(1, ["resume", str(tmp_path / "one"), "--convert-ranks"], tmp_path)
    assert ended.codes == [0], ended
    assert_near(lines(tmp_path / "one", "align"), lines(finished, "align"))


def test_two_ranks_go_on_from_one_process(finished, behind, tmp_path):
    folder = tmp_path / "run"
    ended = start(1, ["run", "digits", *behind, f"out={folder}"], tmp_path, fault="0 align step 2 SIGTERM")
    assert ended.codes == [0], ended
    refused = start(2, ["resume", str(folder)], tmp_path)
    assert refused.codes == [1, 1] and "engine.kind=local is one process" in refused.texts[0]
    ended = start(2, ["resume", str(folder), "--convert-ranks"], tmp_path)
    assert ended.codes == [0, 0], ended
    assert_near(lines(folder, "align"), lines(finished, "align"))


def test_an_error_of_one_rank_ends_all_and_is_named(finished, behind, tmp_path):
    arguments = ["run", "digits", *behind, *SHARDED, f"out={tmp_path / 'run'}"]
    ended = start(2, arguments, tmp_path, fault="1 align step 1 error")
    assert ended.codes == [1, 1] and ended.apart < 60, ended
    assert "rank 1 of 2: align step 1: RuntimeError: played" in ended.texts[0]
