"""Starting ranks: which environments are refused, by name and with the cure, and the examples for several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prism_fast.config import load_config
from prism_fast.config.errors import ConfigError
from prism_fast.engine.launch import VARIABLES, check_launch, started_ranks
from prism_fast.engine.world import World
from prism_fast.train.engines import check_learning

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def launched(monkeypatch):
    """Two ranks, as a launcher describes them."""
    for name, value in zip(VARIABLES, ("0", "0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert started_ranks() == 1
    check_launch("local", "cuda:1")
    check_launch("deepspeed", "cuda:1")


def test_a_launcher_that_says_too_little_is_refused(launched, monkeypatch):
    assert started_ranks() == 2
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2, but MASTER_PORT is not set.*torchrun"):
        started_ranks()


def test_several_ranks_need_the_engine_and_a_gpu_each(launched):
    with pytest.raises(ValueError, match=r"engine\.kind=local is one process, but 2 ranks.*engine\.kind=deepspeed"):
        check_launch("local", "cpu")
    with pytest.raises(ValueError, match=r"device='cuda:0' would put 2 ranks on one GPU: use device=cuda"):
        check_launch("deepspeed", "cuda:0")
    check_launch("deepspeed", "cuda")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["align.prompts=4"], r"align\.prompts=4 cannot be divided over 3 ranks: give 3 or 6"),
        (["align.prompts=2"], r"align\.prompts=2 cannot be divided over 3 ranks: give 3, or start"),
        (["align.prompts=3", "sft.batch=16"], r"sft\.batch=16 cannot be divided over 3 ranks: give 15 or 18"),
        (
            ["align.prompts=3", "sft.batch=15", "warmup.prompts=3", "rlvr.prompts=6", "rlvr.updates_per_step=4"],
            r"rlvr\.updates_per_step=4 is more than the 2 prompts of each of 3 ranks",
        ),
    ],
)
def test_a_world_that_does_not_divide_the_prompts_is_refused(overrides, message):
    stages = "stages=[align]" if len(overrides) == 1 else "stages=[sft,warmup,align,rlvr]"
    with pytest.raises(ConfigError, match=message):
        check_learning(load_config("digits", [*overrides, stages]), 3)


def test_options_that_the_engine_sets_are_refused_before_the_run(monkeypatch):
    overrides = ["engine.kind=deepspeed", "engine.deepspeed={bf16: {enabled: true}}"]
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.bf16 is set by the engine"):
        check_learning(load_config("digits", overrides), 1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"DeepSpeed cannot be imported.*pip install 'deepspeed>=0\.19"):
        check_learning(load_config("digits", overrides[:1]), 1)
    with pytest.raises(ConfigError, match=r"engine\.deepspeed is for engine\.kind=deepspeed"):
        load_config("digits", overrides[1:])


def test_shares_are_neighbours_and_cover_everything():
    ranks = [World() for _ in range(3)]
    for rank, world in enumerate(ranks):
        world.rank, world.size = rank, 3
    for count in range(8):
        shares = [list(world.share(range(count))) for world in ranks]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_hostfile_names_nodes_and_their_gpus():
    lines = [line for line in (EXAMPLES / "hostfile").read_text().splitlines() if not line.startswith("#")]
    nodes = dict(line.split(" slots=") for line in lines)
    assert len(nodes) == len(lines) > 1 and all(int(slots) > 0 for slots in nodes.values())


def test_the_slurm_script_starts_every_rank_with_its_variables(tmp_path):
    """With a shell's own functions in place of SLURM's commands."""
    tools = tmp_path / "bin"
    tools.mkdir()
    played = {
        "scontrol": "printf 'node-1\\nnode-2\\n'",
        "srun": 'shift; for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id "$@"; done',
        "python": f'echo "$@" {" ".join(f"{name}=${name}" for name in VARIABLES)}',
    }
    for name, text in played.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "2"}
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **job}

    def submitted(*arguments: str) -> subprocess.CompletedProcess:
        command = ["bash", str(EXAMPLES / "slurm.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    out = tmp_path / "run"
    told = submitted("prism_4b", f"out={out}", "seed=2").stdout.splitlines()
    where = "WORLD_SIZE=2 MASTER_ADDR=node-1 MASTER_PORT=23456"
    asked = f"-m prism_fast run prism_4b engine.kind=deepspeed out={out} seed=2"
    assert told == [f"{asked} RANK={rank} LOCAL_RANK={rank} {where}" for rank in (0, 1)]
    out.mkdir()
    (out / "config.yaml").touch()
    assert f"-m prism_fast resume {out} RANK=0" in submitted("prism_4b", f"out={out}").stdout
    refused = submitted("prism_4b", "seed=2")
    assert refused.returncode == 2 and "out=PATH" in refused.stderr
