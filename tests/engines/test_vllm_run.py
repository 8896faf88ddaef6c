"""A run whose stages all sample from vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SMALL = [
    "stages=[sft,warmup,align,rlvr]",
    "device=cpu",
    "threads=1",
    "model.tiny.vocab_size=600",
    "model.tiny.num_layers=2",
    "sft.batch=16",
    "sft.max_updates=60",
    "sft.eval_every=30",
    "sft.optimizer.lr=4e-3",
    "warmup.prompts=2",
    "warmup.pairs_per_prompt=2",
    "warmup.eval_every=2",
    "warmup.target_margin=-100",
    "align.steps=20",
    "align.prompts=2",
    "align.rollout.n=4",
    "rlvr.steps=3",
    "rlvr.prompts=2",
    "eval.limit=8",
]


def test_rollouts_and_trainer_agree_at_every_step(tmp_path):
    """Each step's responses come from the weights that the step before pushed; evaluation and RLVR attach others."""
    folder = tmp_path / "run"
    ours = ["rollout.engine=vllm", "rollout.vllm.max_model_len=1024", "rollout.tokens_in_flight=65536", f"out={folder}"]
    code = "from prism_fast.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "digits", *SMALL, *ours],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["rollout/logprob_gap_max"] for line in lines if "rollout/logprob_gap_max" in line]
    assert len(gaps) == 23
    assert max(gaps) <= 1e-4
