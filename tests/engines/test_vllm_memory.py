"""A hundred alignment steps with vLLM: memory stays, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from tests.engines.test_vllm_run import SMALL

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

# Resident MiB and child processes at the end of every step, into the file that is the first argument.
CODE = """
import sys
from pathlib import Path
import psutil
from prism_fast.train.state import StageState
end, file = StageState.end_step, Path(sys.argv.pop(1))
def noted(self, *arguments, **options):
    end(self, *arguments, **options)
    me = psutil.Process()
    with file.open("a") as out:
        print(self.stage, self.step, me.memory_info().rss / 2**20, len(me.children(recursive=True)), file=out)
StageState.end_step = noted
from prism_fast.entry import main
main()
"""


def processes_of(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(path.parent.name)
    return found


def test_memory_is_flat_and_nothing_is_left(tmp_path):
    folder, notes = tmp_path / "run", tmp_path / "notes"
    shared = set(os.listdir("/dev/shm"))
    settings = ["stages=[sft,warmup,align]", "align.steps=100", "eval.limit=2", "checkpoint_every=1000"]
    ours = ["rollout.engine=vllm", "rollout.vllm.max_model_len=1024", "rollout.tokens_in_flight=65536", f"out={folder}"]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(notes), "run", "digits", *SMALL, *settings, *ours],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        told, _ = run.communicate()
    assert run.returncode == 0, told[-4000:]
    rows = [line.split() for line in notes.read_text().splitlines() if line.startswith("align ")]
    resident, children = [float(row[2]) for row in rows], [int(row[3]) for row in rows]
    gaps = [json.loads(line).get("rollout/logprob_gap_max") for line in (folder / "metrics.jsonl").open()]
    figures = (
        f"resident MiB after steps 1, 10, 50, 100: {', '.join(f'{resident[k - 1]:.1f}' for k in (1, 10, 50, 100))}; "
        f"largest after the tenth {max(resident[9:]):.1f}; largest gap {max(g for g in gaps if g is not None):.2g}"
    )
    print(figures)
    assert len(resident) == 100
    assert max(resident[10:]) <= 1.02 * resident[9], figures
    assert max(children) <= 1, "beside the worker that compares answers"
    assert processes_of(run.pid) == []
    assert set(os.listdir("/dev/shm")) <= shared
