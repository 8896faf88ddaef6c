"""Bare matrix products of a language-model head: our persistent TMA Triton kernel against torch.mm.

Decides how later head kernels are written: if the bare Triton product is far below torch.mm, a fused Triton epilogue
cannot win it back. Three products (logits = hidden·Wᵀ, d_hidden = dZ·W, d_weight = dZᵀ·hidden) at three head widths,
bf16 operands, bf16 and fp32 outputs, and the third one added to a float32 matrix (add), which torch can do in slices of
rows; ours and torch's take turns in one process; each is checked against float64 on random rows and columns in the same
run. Inputs are random normal: a product of zeros runs faster than real data.

    python3 -m prism_fast.bench.gemm_probe              needs a card
    python3 -m prism_fast.bench.gemm_probe --smoke      the program, in Triton's interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from prism_fast.bench.ops.measure import measured_ceiling, percentiles

VOCABULARY, TOKENS, WIDTHS = 151936, 8192, (2048, 2560, 4096)
SMOKE = (520, 136, (64,))  # CPU: correctness of this program, no figures
BOTH = (torch.bfloat16, torch.float32)
PASSES = {"logits": BOTH, "d_hidden": BOTH, "d_weight": BOTH, "add": (torch.float32,)}  # with the outputs' dtypes


@dataclass
class Row:
    """One line of the result. Times in milliseconds, errors relative to norm and largest element of a float64 block."""

    op: str
    provider: str
    shape: str  # M x N x K
    out_dtype: str
    status: str  # ok, oom, unsupported, wrong
    note: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    ceiling_percent: float | None = None
    peak_mib: float | None = None
    error_norm: float | None = None
    error_max: float | None = None


def operands(op: str, n: int, h: int, v: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right matrix of a product, in the layouts that training has them."""
    hidden = torch.randn((n, h), device=device).bfloat16()
    weight = (torch.randn((v, h), device=device) * h**-0.5).bfloat16()
    if op == "logits":
        return hidden, weight.t()
    d_logits = torch.randn((n, v), device=device, dtype=torch.bfloat16)
    return (d_logits, weight) if op == "d_hidden" else (d_logits.t(), hidden)


def errors(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, held: float) -> tuple[float, float]:
    """Normwise and largest error of a random block of ``held + product`` against float64."""
    rows = torch.randperm(out.shape[0], device=out.device)[:256].sort().values
    columns = torch.randperm(out.shape[1], device=out.device)[:256].sort().values
    exact = a[rows].double() @ b[:, columns].double() + held
    difference = out[rows][:, columns].double() - exact
    return (difference.norm() / exact.norm()).item(), (difference.abs().max() / exact.abs().max()).item()


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def providers(op: str, device: str) -> dict[str, Callable]:
    """name -> f(a, b, out)."""
    from prism_fast.kernels.gemm import TILES, matmul
    from prism_fast.kernels.gemm.products import SLICE_BYTES

    def torch_mm(a, b, out):
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        elif device == "cpu":
            raise NotImplementedError("torch.mm with out_dtype needs CUDA")
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)

    def torch_add(a, b, out, rows):
        if device == "cpu":
            raise NotImplementedError("torch.mm with out_dtype needs CUDA")
        for at in range(0, len(a), rows):
            out[at : at + rows] += torch.mm(a[at : at + rows], b, out_dtype=out.dtype)

    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    if major not in TILES:
        raise SystemExit(f"gemm_probe: needs a card with bulk tensor copies (compute capability {sorted(TILES)}.x)")
    if op == "add":
        found = {"torch.mm, whole": lambda a, b, out: torch_add(a, b, out, len(a))}
        found["torch.mm, slices"] = lambda a, b, out: torch_add(a, b, out, max(1, SLICE_BYTES // (4 * b.shape[1])))
    else:
        found = {"torch.mm": torch_mm}
    tiles = [TILES[major]]
    if op == "logits" and device == "cuda":
        tiles += [TILES[major]._replace(stages=4), TILES[major]._replace(n=128, stages=4, warps=4)]
    for t in tiles:
        name = f"triton {t.m}x{t.n}x{t.k} s{t.stages} w{t.warps}"
        found[name] = lambda a, b, out, t=t: matmul(a, b, out=out, tile=t, accumulate=op == "add")
    return found


def measure(op: str, n: int, h: int, v: int, out_dtype: torch.dtype, device: str, rounds: int, ceiling: float | None):
    """Rows of all providers for one product; they take turns."""
    a, b = operands(op, n, h, v, device)
    m, k, columns = a.shape[0], a.shape[1], b.shape[1]
    shape, dtype = f"{m}x{columns}x{k}", str(out_dtype).removeprefix("torch.")
    out = torch.empty((m, columns), dtype=out_dtype, device=device)
    held = 1.0 if op == "add" else 0.0
    rows, calls = {}, {}
    for name, provider in providers(op, device).items():
        rows[name] = row = Row(op, name, shape, dtype, "ok")
        out.fill_(held or float("nan"))
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            provider(a, b, out)
            row.error_norm, row.error_max = errors(out, a, b, held)
            if device == "cuda":
                row.peak_mib = round(torch.cuda.max_memory_allocated() / 2**20)
        except torch.cuda.OutOfMemoryError as error:
            row.status, row.note = "oom", str(error).splitlines()[0]
        except (NotImplementedError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise  # a broken context, not an unsupported combination
            row.status, row.note = "unsupported", f"{type(error).__name__}: {error}".splitlines()[0]
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # a tile that this card's shared memory cannot hold
                raise
            row.status, row.note = "unsupported", str(error)
        else:
            calls[name] = lambda provider=provider: provider(a, b, out)
    limit = 2 * torch.finfo(out_dtype).eps if out_dtype == torch.bfloat16 else 1e-5
    for name, row in rows.items():
        if row.status == "ok" and not (row.error_norm <= limit and row.error_max <= 2 * limit):
            row.status, row.note = "wrong", f"error above {limit}"
            calls.pop(name)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            spent = milliseconds(call, device)
            if turn >= 2:  # two rounds of warm-up
                times[name].append(spent)
    for name, spent in times.items():
        row, (p20, p50, p80) = rows[name], percentiles(spent)
        row.ms_p20, row.ms_p50, row.ms_p80 = p20, p50, p80
        row.tflops = 2 * m * columns * k / p50 / 1e9
        row.ceiling_percent = 100 * row.tflops / ceiling if ceiling else None
    return list(rows.values())


def ceiling_of(device: str) -> float | None:
    """TFLOP/s of a large product in bf16 in this process; None on the CPU, where the figures mean nothing."""
    return None if device == "cpu" else measured_ceiling(device, {torch.bfloat16})["TFLOP/s bfloat16"]


def line(row: Row) -> str:
    if row.ms_p50 is None:
        return f"{row.op:<9} {row.shape:<20} {row.out_dtype:<9} {row.provider:<26} {row.status}: {row.note[:70]}"
    share = f"{row.ceiling_percent:5.1f} %" if row.ceiling_percent else "      -"
    return (
        f"{row.op:<9} {row.shape:<20} {row.out_dtype:<9} {row.provider:<26} {row.ms_p50:8.3f} ms "
        f"{row.tflops:7.1f} TF/s {share}  error {row.error_norm:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="written anew after every product")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=10)
    a = parser.parse_args()
    device = "cpu" if a.smoke else "cuda"
    if a.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.support import triton_bf16

        triton_bf16.install()
    elif not torch.cuda.is_available():
        raise SystemExit("gemm_probe: no GPU here; --smoke runs tiny shapes in Triton's interpreter")
    torch.manual_seed(int(time.time()))
    v, n, widths = SMOKE if a.smoke else (VOCABULARY, TOKENS, WIDTHS)
    ceiling = ceiling_of(device)
    print(f"ceiling (torch.mm, 8192³, bf16): {ceiling:.1f} TFLOP/s" if ceiling else "smoke run: times mean nothing")
    rows: list[Row] = []
    for h in widths:
        for op, out_dtypes in PASSES.items():
            for out_dtype in out_dtypes:
                found = measure(op, n, h, v, out_dtype, device, 2 if a.smoke else a.rounds, ceiling)
                rows += found
                print(*map(line, found), sep="\n", flush=True)
                if a.json:
                    result = {"ceiling_tflops": ceiling, "rows": [asdict(r) for r in rows]}
                    a.json.write_text(json.dumps(result, indent=1))
    default = next(r.provider for r in rows if r.provider.startswith("triton"))
    bad = [r for r in rows if r.status == "wrong" or (r.provider == default and r.status != "ok")]
    if bad:
        raise SystemExit("gemm_probe: unusable results:\n" + "\n".join(f"{line(r)} [{r.status}] {r.note}" for r in bad))


if __name__ == "__main__":
    main()
