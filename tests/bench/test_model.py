"""The modelled shares of peak: what the kernels as they compile today could reach, and the goals they have to meet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the lists of the attention's launches stand beside its kernels")
from prism_fast.bench.model import clocks, kernels
from prism_fast.bench.model.__main__ import every

TABLE = kernels.read()


def test_every_goal_is_met():
    lines = every(TABLE)
    assert [line for line in lines if not line.met] == []
    goals = {line.kernel for line in lines if line.goal is not None}
    assert goals == {
        "scores, keep ban", "scores, keep ban entropy", "attention, keys' gradient shared out",
        "experts by default, forward and backward",
    }  # fmt: skip
    assert all(0 < line.share <= 1 for line in lines if not line.at_most)
    assert all(line.worse <= line.share for line in lines if line.worse is not None)


def grown(kernel: str, field: str, factor: float) -> dict:
    """The table with more instructions in every form of a kernel."""
    table = json.loads(json.dumps(TABLE))
    for key, row in table.items():
        if f": {kernel}" in key:
            row[field] = [round(factor * n) for n in row[field]] if field == "steps" else round(factor * row[field])
    return table


@pytest.mark.parametrize(
    ("kernel", "field", "line"),
    [
        ("scores_kernel", "epilogue", "scores, keep ban"),
        ("scores_kernel", "steps", "scores, keep ban entropy"),
        ("swiglu_gradient_kernel", "steps", "experts by default, forward and backward"),
        ("slot_columns_kernel", "steps", "experts by Triton, gradient of up"),
        ("gradient_kernel", "total", "gradient of scores, keep ban entropy"),
        ("keys_kernel", "steps", "attention, keys"),
    ],
)
def test_a_kernel_with_many_more_instructions_moves_its_line(kernel, field, line):
    def share(table: dict) -> float:
        return min(found.share for found in every(table) if found.kernel == line)

    assert share(grown(kernel, field, 10)) < 0.9 * share(TABLE)


def test_the_arithmetic_of_a_tile():
    """128 x 256 x 64: 1024 clocks of the matrix units, 48 bytes per clock; 8 warps on four schedulers."""
    tile = clocks.Tile(128, 256, 64, 8, step=100, epilogue=2000)
    assert tile.products == 1024 and tile.traffic == 48
    assert tile.clocks(640, beside=900) == pytest.approx(10 * 1024 / clocks.BUSY + 4000 + 900)
    assert tile.clocks(640, 900, port=24) == pytest.approx(10 * 2048 + 4900)
    busy = clocks.Tile(128, 256, 64, 8, step=1000, epilogue=0)
    assert busy.clocks(64, 0) == pytest.approx(2000 / clocks.ISSUE)
    # As many tiles as processors are one round, one more are two.
    assert tile.share(640, 900, clocks.PROCESSORS + 1) == pytest.approx(
        tile.share(640, 900, clocks.PROCESSORS) * (clocks.PROCESSORS + 1) / (2 * clocks.PROCESSORS)
    )


def test_programs_start_in_order_where_a_processor_is_free():
    assert clocks.makespan([1, 1, 1, 3], slots=2) == 4  # the long one starts last
    assert clocks.makespan([3, 1, 1, 1], slots=2) == 3
    assert clocks.makespan([2.0] * 132) == 2


def test_a_form_that_the_table_does_not_hold_is_named():
    with pytest.raises(KeyError, match="0 lines of scores_kernel under 'sm_90 head bf16 never'"):
        kernels.entry(TABLE, "head bf16 never", "scores_kernel")


def test_the_program_says_that_it_is_a_model_and_fails_where_a_goal_is_missed(tmp_path):
    worse = tmp_path / "table.json"
    worse.write_text(json.dumps(grown("scores_kernel", "epilogue", 10)))
    missed = any(not line.met for line in every(TABLE))
    for arguments, code in (((), int(missed)), (("--table", str(worse)), 1)):
        command = [sys.executable, "-m", "prism_fast.bench.model", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "A model, not a measurement" in done.stdout
        assert ("MISSED" in done.stdout) == bool(code)
