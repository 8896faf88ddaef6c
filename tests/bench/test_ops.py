"""The op benchmark: every op and provider has its rows, wrong results are named wrong, the file has its columns."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from typer.testing import CliRunner

from prism_fast.bench.command import app
from prism_fast.bench.ops import measure as measuring
from prism_fast.bench.ops import run as running
from prism_fast.bench.ops.op import LIMITS, MODES, STATUSES, Absent, Row, Unsupported
from prism_fast.bench.ops.suite import OPS

COMPILED = "torch.compile"
RIVALS = {
    "linear_logprob": {
        "eager",
        "chunked",
        COMPILED,
        "liger scaled ce",
        "cut cross entropy",
        "verl triton",
        "trl chunked",
    },
    "linear_policy_loss": {"eager", "chunked", "liger grpo", "verl triton", "trl chunked"},
    "selected_logprob": {"eager", COMPILED, "trl triton"},
    "group_advantage": {"eager"},
    "group_advantage+policy_loss(grpo)": {"eager", COMPILED},
    "pairwise_loss": {"eager", COMPILED},
    "shared_prefix_attention": {
        "eager",
        "flex attention, compiled",
        "sdpa, prompt repeated",
        "torch varlen, prompt repeated",
    },
    "shared_prefix_attention (plain varlen)": {"sdpa", "sdpa cudnn", "torch varlen", "flash-attn", "flash-attn 3"},
    "vision_attention": {"eager", "transformers sdpa"},
}
BACKENDS = {
    "linear_logprob": {"triton", "reference"},
    "linear_policy_loss": {"triton", "reference"},
    "selected_logprob": {"native", "reference"},
    "group_advantage": {"native", "native, graph", "reference"},
    "group_advantage+policy_loss(grpo)": {"native", "reference"},
    "pairwise_loss": {"native", "reference"},
    "shared_prefix_attention": {"triton", "stock", "reference"},
    "shared_prefix_attention (plain varlen)": {"triton", "stock", "reference"},
    "vision_attention": {"batched"},
}


def small(op, only=lambda name: name != COMPILED, seconds=0.0) -> list[Row]:
    shape = op.shapes["small"][0]
    return measuring.measure(op, shape, torch.float32, "cpu", seconds=seconds, ceiling={"GB/s": 1.0}, only=only)


@pytest.fixture(autouse=True)
def _no_kernel_compilation(monkeypatch):
    """torch.compile takes a minute here; `bench/gpu_suite.sh --cpu` runs it."""

    def refuse(function, **_):
        def run(*_args, **_options):
            raise Unsupported("left out of this test")

        return run

    monkeypatch.setattr(torch, "compile", refuse)


@pytest.mark.parametrize("name", OPS)
def test_every_provider_has_a_row_in_every_mode_and_a_status(name):
    op = OPS[name]
    assert RIVALS.get(name, set()) <= set(op.providers)
    assert all(any(f"prism_fast {b}" in p for p in op.providers) for b in BACKENDS.get(name, {"reference"}))
    rows = small(op, only=lambda name: True)
    assert {(row.provider, row.mode) for row in rows} == {(p, mode) for p in op.providers for mode in op.modes}
    assert op.modes == (MODES if op.leaves else ("full",))
    statuses = {row.provider: row.status for row in rows}
    for row in rows:
        assert row.status in STATUSES and row.status != "wrong", row
        assert (row.ms_p50 is not None) == (row.status == "ok") and bool(row.note) == (row.status != "ok")
        if row.status == "ok":
            assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80 and row.runs >= 3 and row.rate > 0
            assert row.of_eager > 0 and (row.provider != "eager" or row.of_eager == 1)
            assert 0 <= row.error <= LIMITS[torch.float32] and set(row.errors) >= {f"d_{x}" for x in op.leaves}
    anywhere = {
        status for p, status in statuses.items() if p.startswith(("prism_fast reference", "prism_fast batched"))
    }
    assert statuses["eager"] == "ok" and anywhere == {"ok"}


def test_errors_find_what_is_wrong():
    """A gradient off by a thousandth, a result off by a thousandth, a NaN, a wrong shape, an exception of ours."""
    op = OPS["selected_logprob"]
    eager = op.providers["eager"]

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 1.001

    def broken(x):
        raise RuntimeError("no")

    wrong = {
        "gradient": lambda x: (Shift.apply(eager(x)[0]),),
        "result": lambda x: (eager(x)[0] + 1e-3 * eager(x)[0].detach(),),
        "nan": lambda x: (eager(x)[0] * torch.where(x["target"] == x["target"][0], torch.nan, 1.0),),
        "prism_fast broken": broken,
    }
    other = {
        "somebody broken": broken,
        "missing": lambda x: (_ for _ in ()).throw(Absent("nowhere")),
        "right": eager,
    }
    rows = {row.provider: row for row in small(replace(op, providers=wrong | other)) if row.mode == "full"}
    assert {name: rows[name].status for name in wrong} == dict.fromkeys(wrong, "wrong")
    assert all(rows[name].ms_p50 is None for name in wrong)
    assert rows["gradient"].errors["d_logits"] > 5e-4 and rows["gradient"].errors["result 0"] < 1e-6
    assert [rows[name].status for name in other] == ["unsupported", "absent", "ok"] and rows[
        "missing"
    ].note == "nowhere"
    with pytest.raises(RuntimeError, match="CUDA error"):
        small(replace(op, providers={"dead card": lambda x: (_ for _ in ()).throw(RuntimeError("CUDA error: x"))}))


def test_a_backend_that_is_not_built_is_absent_and_not_wrong(monkeypatch):
    monkeypatch.setattr("prism_fast.ops.native.available", lambda: False)
    monkeypatch.setattr("prism_fast.ops.native.why_not", lambda: "not built")
    rows = small(OPS["pairwise_loss"], only=lambda name: name.endswith("native"))
    assert {(row.status, row.note) for row in rows} == {("absent", "not built")}


def test_providers_take_turns(monkeypatch):
    order = []

    def named(name):
        return lambda x: (order.append(name), OPS["pairwise_loss"].providers["eager"](x))[1]

    op = replace(OPS["pairwise_loss"], providers={"a": named("a"), "b": named("b")})
    small(op)
    timed = "".join(order[-18:])  # three rounds; a round calls a provider for inference, forward and the whole
    assert timed == "aaabbb" * 3


def test_file_table_and_exit_code(tmp_path, monkeypatch):
    out = tmp_path / "ops.json"
    arguments = ["ops", "--cpu", "--op", "pairwise", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert {f.name for f in fields(Row)} == set(result["rows"][0])
    assert {"card", "torch", "triton", "commit", "date", "processor"} <= set(result["machine"])
    assert result["size"] == "small" and result["ceiling"]["GB/s"] > 0
    assert all(name in done.output for name in OPS["pairwise_loss"].providers)
    broken = replace(
        OPS["pairwise_loss"], providers={"prism_fast off": lambda x: (x["teacher"].sum() + x["student"].sum(),)}
    )
    monkeypatch.setitem(OPS, "pairwise_loss", broken)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "wrong: pairwise_loss, prism_fast off" in done.output
    assert {row["status"] for row in json.loads(out.read_text())["rows"]} == {"wrong"}


@pytest.mark.parametrize(
    "arguments",
    [["--op", "nothing"], ["--provider", "nobody"], ["--shape", "8x"], ["--shape", "8x8"], ["--dtype", "int8"]],
)
def test_wrong_arguments_are_refused(arguments):
    done = CliRunner().invoke(app, ["ops", "--cpu", *arguments])
    assert done.exit_code == 2


def test_inputs_are_no_zeros_and_spread():
    for op in OPS.values():
        x = op.inputs(op.shapes["small"][0], torch.float32, "cpu")
        assert all(x[leaf].std() > 0.1 for leaf in op.leaves), op.name
        again = op.inputs(op.shapes["small"][0], torch.float32, "cpu")
        assert all(torch.equal(x[name], again[name]) for name in x), op.name


@pytest.mark.long
def test_memory_of_a_process():
    from prism_fast.bench.ops.memory import peak_on_cpu

    shape = (256, 64, 16384)  # scores of 16 MiB
    assert peak_on_cpu("linear_logprob", "eager", shape, torch.float32) > 30


def test_nothing_to_do_names_what_there_is():
    with pytest.raises(running.NothingToDo, match="pairwise_loss"):
        running.select(["nothing"], None, "small")
