"""Two real ranks without DeepSpeed: what they exchange, and how the end of one is the end of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each is the work of a rank, with its `world`.
EXCHANGED = """
values = [0.1 + world.rank, float("inf")]
tell({
    "gather": world.gather({"rank": world.rank, "third": 1 / 3, "text": "é" * (1 + 9 * world.rank)}),
    "of_first": world.of_first(f"from {world.rank}"),
    "sum": world.sum([world.rank, 2.5]), "max": world.max([world.rank]),
    "agree": [world.agree(True), world.agree(world.rank == 0)], "any": [world.any(False), world.any(world.rank == 1)],
    "on_first": world.on_first(lambda: "done"),
    "share": list(world.share([1, 2, 3])),
})
for work in (world.together, world.on_first):
    try:
        work(lambda: 1 / (world.rank if work == world.on_first else 1 - world.rank))
    except Exception as error:
        tell(f"{type(error).__name__}: {error}")
"""
FAILS = """
world.phase = "align step 3"
if world.rank == 1:
    raise ValueError("played")
time.sleep(100)
"""
DIES = """
world.phase = "align step 3"
time.sleep(1)  # a heartbeat tells it
if world.rank == {rank}:
    os.kill(os.getpid(), 9)
{waits}
"""
WAITS = {"alone": "time.sleep(100)", "in a collective": "world.agree(True)"}
RANK = """
import json, os, time
from datetime import timedelta
from prism_fast.engine import watchdog
from prism_fast.engine.launch import joined
watchdog.INTERVAL, watchdog.SILENCE, watchdog.BROKEN, watchdog.GRACE = 0.2, 4.0, 2.0, 1.0
def tell(value):
    print(json.dumps(value), flush=True)
with joined("deepspeed", "cpu", timedelta(seconds=60)) as world:
"""


def on_two_ranks(work: str) -> tuple[list[int], list[str], list[str], float]:
    """Exit codes, standard outputs and errors of the ranks, and the seconds between the first end and the last. Rank 0
    holds the store, as under the deepspeed launcher and srun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    code = RANK + "\n".join(f"    {line}" for line in work.splitlines())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends: list[float] = []
    try:
        limit = time.monotonic() + 100
        while len(ends) < 2 and time.monotonic() < limit:
            ends += [time.monotonic()] * (sum(rank.poll() is not None for rank in ranks) - len(ends))
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    told = [rank.communicate() for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in told], [err for _, err in told], ends[-1] - ends[0]


def test_ranks_exchange_what_json_holds():
    codes, outputs, errors, _ = on_two_ranks(EXCHANGED)
    assert codes == [0, 0], errors
    for rank, output in enumerate(outputs):
        found, together, first = map(json.loads, output.splitlines())
        assert found["gather"] == [{"rank": r, "third": 1 / 3, "text": "é" * (1 + 9 * r)} for r in range(2)]
        assert found["of_first"] == "from 0" and found["share"] == [[1], [2, 3]][rank]
        assert found["sum"] == [1.0, 5.0] and found["max"] == [1.0]
        assert found["agree"] == [True, False] and found["any"] == [False, True]
        assert found["on_first"] == (None if rank else "done")
        told = ["RankError: rank 1 of 2: division by zero", "ZeroDivisionError: division by zero"]
        assert together == told[rank]
        assert first == ["ZeroDivisionError: division by zero", "RankError: rank 0 of 2: division by zero"][rank]


def test_an_error_of_one_rank_ends_the_other_and_is_named():
    codes, _, errors, apart = on_two_ranks(FAILS)
    assert codes == [1, 1] and apart < 10, errors
    assert "rank 1 of 2: align step 3: ValueError: played\nrank 0 of 2: align step 3: ends as well" in errors[0]
    assert "ValueError: played" in errors[1]


@pytest.mark.long
@pytest.mark.parametrize("waits", WAITS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_is_named(rank, waits):
    codes, _, errors, apart = on_two_ranks(DIES.format(rank=rank, waits=WAITS[waits]))
    assert codes == [[-9, 1], [1, -9]][rank] and apart < 20, errors
    named = errors[1 - rank]
    assert f"rank {rank} of 2: align step 3: no sign of life" in named or ("store is gone" in named and rank == 0)
