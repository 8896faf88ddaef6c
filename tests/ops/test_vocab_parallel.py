"""A vocabulary shared out over two processes against the whole one, in float64; how shards are joined."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prism_fast.ops import linear_logprob
from prism_fast.ops.vocab_parallel import join

ROOT = Path(__file__).resolve().parents[2]


def ranks(backend: str) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.ops.vocab_ranks", backend]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | common | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), outputs
    return [json.loads(line) for out, _ in outputs for line in out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.long)])
def test_two_ranks_compute_what_one_does(backend):
    """Ragged shards, targets on their borders, ignored, and outside of the vocabulary; every option; every gradient."""
    lines = ranks(backend)
    assert len(lines) == 10
    for line in lines:
        assert all(line["nan"]) and line["same"] and line["alike"], line
        assert line["bad"] == 3, line
        limit = 1e-13 if backend == "reference" else 2e-6
        assert max(line["errors"]) < limit, line


def test_join_is_exact_at_the_extremes():
    """Scores of 1e4 beside -1e4, shards without any mass, targets that nobody has."""
    z = torch.tensor([[1e4, 1e4 - 1.0, -1e4, 0.0], [-1e4, -1e4, -1e4, -1e4], [3.0, 3.0, -1e30, -1e30]]).double()
    parts = []
    for columns in ((0, 1), (1, 4)):
        own = z[:, slice(*columns)]
        top = own.amax(1)
        log_p = (own - top[:, None]) - (own - top[:, None]).exp().sum(1).log()[:, None]
        entropy = -(log_p.exp() * log_p).sum(1)
        held = log_p[:, 0] if columns[0] == 1 else torch.full((3,), -torch.inf).double()  # the target is column 1
        parts.append(torch.stack((held, entropy, top, (own - top[:, None]).exp().sum(1).log())))
    whole = join(torch.stack(parts))
    wanted = torch.log_softmax(z, 1)
    torch.testing.assert_close(whole.logp, wanted[:, 1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole.entropy, -(wanted.exp() * wanted).sum(1), rtol=1e-13, atol=1e-13)
    for part in parts:
        part[0] = -torch.inf
    assert join(torch.stack(parts)).logp.isnan().all()


def test_refusals(monkeypatch):
    hidden, weight, target = torch.zeros(2, 16), torch.zeros(3, 16), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(NotImplementedError, match="vocab_group with tile_skip_mass=0.0 or under torch.compile"):
        linear_logprob(hidden, weight, target, vocab_group="a group")
