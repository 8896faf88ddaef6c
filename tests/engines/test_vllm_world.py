"""Alignment on two CPU ranks: one vLLM and two DeepSpeed engines in each process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")
pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-engines")

from tests.engines.test_vllm_run import SMALL

RANKS = 2
SETTINGS = [
    "stages=[sft,warmup,align]",
    "data.digits={sft_images: 100, sft_val_images: 4, align_tasks: 24, rlvr_tasks: 4, eval_images: 2}",
    "sft.max_updates=30",
    "sft.eval_every=15",
    "warmup.max_updates=2",
    "align.rollout.max_new_tokens=96",
    "eval.limit=4",
]
# By default DeepSpeed keeps small weights whole.
SHARDED = "{zero_optimization: {stage3_param_persistence_threshold: 0, stage3_model_persistence_threshold: 0}}"
OURS = ["engine.kind=deepspeed", "rollout.engine=vllm", "rollout.vllm.max_model_len=1024"]
OURS += ["rollout.tokens_in_flight=32768", "rollout.importance=truncated", f"engine.deepspeed={SHARDED}"]


def aligned(folder, *settings: str, timeout: int) -> list[dict]:
    """The lines of the alignment steps of a run on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    with subprocess.Popen(
        [*command, "-m", "prism_fast", "run", "digits", *SMALL, *SETTINGS, *OURS, *settings, f"out={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            told, _ = run.communicate(timeout=timeout)
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == 0, told[-6000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "align"]


def check(lines: list[dict], steps: int) -> None:
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    gaps = {line["step"]: line["rollout/logprob_gap_max"] for line in lines if "rollout/logprob_gap_max" in line}
    print("largest gap of each step:", *(f"{gap:.1e}" for gap in gaps.values()))
    assert len(gaps) >= steps - 1, "nearly every step has a response with an advantage"
    assert max(gaps.values()) <= 1e-4
    assert any(line.get("policy/grad_norm", 0) > 0 for line in lines)
    assert all(line["rollout/responses"] == 8 for line in lines), "of both ranks"
    assert all(0 < line["importance/effective_share"] <= 1 + 1e-9 for line in lines if line["step"] in gaps)


@pytest.mark.timeout(900)
def test_three_steps_whose_weights_are_sharded(tmp_path):
    settings = ["engine.stage=3", "align.steps=3"]
    check(aligned(tmp_path / "run", *settings, timeout=870), 3)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [1, 3])
def test_twenty_steps(stage, tmp_path):
    settings = [f"engine.stage={stage}", "align.steps=20"]
    check(aligned(tmp_path / "run", *settings, "rollout.offload=true", timeout=1770), 20)
