"""The attention kernels compile to machine code for the cards we name, without spilling registers. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is the compiler under test")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"attend_kernel", "queries_kernel", "keys_kernel", "sums_kernel"}


def compile_for(*arguments: str, cache: Path, timeout: float) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.compile_attention", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict], forms: int) -> None:
    # float32 is multiplied without tensor cores and is no path for speed: two of its kernels spill, up to four numbers.
    allowed = {"torch.bfloat16": 0, "torch.float32": 16}
    assert [c for c in found if c["spills"] > allowed[c["dtype"]]] == []
    # One kernel per form, although lengths and the number of segments differed between launches.
    assert len(found) == len(KERNELS) * forms and {c["kernel"] for c in found} == KERNELS


def test_hopper_at_heads_of_128(tmp_path):
    found = compile_for("90", "--small", cache=tmp_path, timeout=110)
    check(found, 1)
    assert all(c["wgmma"] for c in found if c["kernel"] != "sums_kernel")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_card_and_width(arch, tmp_path):
    found = compile_for(arch, cache=tmp_path, timeout=890)
    check(found, 3 * 2)
    unit = {"80": None, "90": "wgmma", "100": "tcgen05"}[arch]
    assert unit is None or any(c[unit] for c in found)
