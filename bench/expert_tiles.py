"""Tiles of the expert products: each product of a mixture-of-experts layer by itself, at several tiles.

Shows whether another tile or a deeper pipeline would be faster than the table's (kernels/moe/tiles.py; its line comes
first). torch.mm is measured beside ours, expert by expert on rows that are already gathered, without the activation
that ours computes too. Providers take turns in one process and are checked against float64 in the same run; exit code 1
if one is wrong.

    python3 -m prism_fast.bench.expert_tiles                      32,768 tokens, H 2048, I 6144, 4 experts, top-2
    python3 -m prism_fast.bench.expert_tiles --product up --shape 32768x2048x768x128x8
    python3 -m prism_fast.bench.expert_tiles --smoke              the program, in Triton's interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.bench.ops.machine import machine
from prism_fast.bench.ops.measure import measured_ceiling, percentiles

SHAPE, SMOKE = (32768, 2048, 6144, 4, 2), (40, 32, 48, 3, 2)  # tokens, hidden, inner, experts, top_k
PRODUCTS = ("up", "down", "act", "weights", "back")
LIMIT = 2e-2  # normwise relative error in bfloat16


@dataclass
class Row:
    """One line of the result. Times in milliseconds, the error relative to the norm of the exact product."""

    op: str
    provider: str
    shape: str
    status: str  # ok, unsupported, wrong
    note: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    ceiling_percent: float | None = None
    error_norm: float | None = None


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


def ceiling_of(device: str) -> float | None:
    """TFLOP/s of a large product in bf16 in this process; None on the CPU, where the kernels are only interpreted."""
    return None if device == "cpu" else measured_ceiling(device, {torch.bfloat16})["TFLOP/s bfloat16"]


def line(row: Row) -> str:
    if row.ms_p50 is None:
        return f"{row.op:<9} {row.shape:<20} {row.provider:<26} {row.status}: {row.note[:70]}"
    share = f"{row.ceiling_percent:5.1f} %" if row.ceiling_percent else "      -"
    return (
        f"{row.op:<9} {row.shape:<20} {row.provider:<26} {row.ms_p50:8.3f} ms {row.tflops:7.1f} TF/s {share}  "
        f"error {row.error_norm:.1e}"
    )


class Layer(NamedTuple):
    """hidden and g [T, H], gate_up [E, 2I, H], down [E, H, I], pre [M, 2I], act [M, I] by slot,
    tokens [M] and offsets [E + 1] of the plan, borders: offsets on the host."""

    hidden: Tensor
    g: Tensor
    gate_up: Tensor
    down: Tensor
    pre: Tensor
    act: Tensor
    tokens: Tensor
    offsets: Tensor
    borders: list[int]


def make_layer(shape: tuple[int, ...], device: str) -> Layer:
    from prism_fast import ops

    tokens, hidden, inner, experts, top_k = shape
    generator = torch.Generator(device).manual_seed(sum(shape))

    def noise(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).bfloat16()

    plan = ops.route_experts(noise(tokens, experts).float(), top_k, backend="reference")
    slots = tokens * top_k
    return Layer(
        noise(tokens, hidden), noise(tokens, hidden), noise(experts, 2 * inner, hidden, scale=hidden**-0.5),
        noise(experts, hidden, inner, scale=inner**-0.5), noise(slots, 2 * inner), noise(slots, inner),
        plan.tokens, plan.offsets, plan.offsets.tolist(),
    )  # fmt: skip


class Product(NamedTuple):
    """One product. ``pairs()``: the operands per expert; ``ours(tile)``: the call that is timed. Its result is compared
    with ``exact(plain)``, where ``plain`` holds the products of the pairs in float64. ``tile``: a field of `Tiles`."""

    flop: float
    pairs: Callable[[], list[tuple[Tensor, Tensor]]]
    ours: Callable[[object], Tensor]
    exact: Callable[[list[Tensor]], Tensor]
    tile: str


def products(x: Layer) -> dict[str, Product]:
    from prism_fast.kernels import moe

    slots, hidden, inner = len(x.tokens), x.hidden.shape[1], x.down.shape[2]
    parts = [slice(a, b) for a, b in zip(x.borders, x.borders[1:], strict=False)]
    plan = (x.tokens, x.offsets)
    gathered, g = x.hidden[x.tokens], x.g[x.tokens]  # [M, H] by slot

    def up(tile) -> Tensor:
        pre = torch.empty_like(x.pre)
        moe.up_product(x.hidden, x.gate_up, *plan, tile, pre=pre, act=torch.empty_like(x.act))
        return pre

    flop = 2.0 * slots * hidden * inner
    return {
        "up": Product(
            2 * flop, lambda: [(gathered[p], w.t()) for p, w in zip(parts, x.gate_up, strict=True)],
            up, torch.cat, "up",
        ),
        "down": Product(
            flop, lambda: [(x.act[p], w.t()) for p, w in zip(parts, x.down, strict=True)],
            lambda tile: moe.rows_product(x.act, x.down, None, x.offsets, tile), torch.cat, "rows",
        ),
        "act": Product(
            flop, lambda: [(g[p], w) for p, w in zip(parts, x.down, strict=True)],
            lambda tile: moe.rows_product(x.g, x.down.transpose(1, 2), *plan, tile), torch.cat, "rows",
        ),
        "weights": Product(
            flop, lambda: [(g[p].t(), x.act[p]) for p in parts],
            lambda tile: moe.weight_gradient(x.down, x.g, x.act, *plan, tile, gather_a=True, gather_b=False),
            torch.stack, "weights",
        ),
        "back": Product(
            2 * flop, lambda: [(x.pre[p], w) for p, w in zip(parts, x.gate_up, strict=True)],
            lambda tile: moe.rows_product(x.pre, x.gate_up.transpose(1, 2), None, x.offsets, tile), torch.cat, "rows",
        ),
    }  # fmt: skip


def candidates(tile) -> list:
    """The table's tile, and tiles that differ from it in one field."""
    found = [tile]
    for stages in (tile.stages - 1, tile.stages + 1, tile.stages + 2):
        found.append(tile._replace(stages=max(2, stages)))
    found.append(tile._replace(warps=4 if tile.warps == 8 else 8))
    found += [tile._replace(k=k) for k in (tile.k // 2, tile.k * 2) if k >= 16]
    found += [tile._replace(n=n) for n in (tile.n // 2, tile.n * 2) if 16 <= n <= 256]
    found += [tile._replace(m=m) for m in (tile.m // 2, tile.m * 2) if 16 <= m <= 256]
    return list(dict.fromkeys(found))


def measure(name: str, product: Product, tile, device: str, rounds: int, ceiling: float | None) -> list[Row]:
    pairs = product.pairs()
    plain = [a.double() @ b.double() for a, b in pairs]
    calls: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: [torch.mm(a, b) for a, b in pairs],
    }
    for t in candidates(tile):
        calls[f"ours {t.m}x{t.n}x{t.k} s{t.stages} w{t.warps}"] = lambda t=t: product.ours(t)
    own = list(calls)[1]
    wanted, shape = product.exact(plain), "+".join(str(len(a)) for a, _ in pairs[:4])
    rows, times = {}, {}
    for provider, call in calls.items():
        rows[provider] = row = Row(name, provider, shape, "ok")
        try:
            found = call()
        except Exception as error:
            # Another tile may be too large for the card or the compiler; the table's must run.
            if "CUDA error" in str(error) or provider == own:
                raise
            row.status, row.note = "unsupported", f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if provider.startswith("ours"):
            got, exact = found, wanted
        else:
            got, exact = (torch.cat([part.flatten() for part in parts]) for parts in (found, plain))
        row.error_norm = ((got.double() - exact).norm() / exact.norm()).item()
        if not row.error_norm <= LIMIT:  # NaN is bad
            row.status, row.note = "wrong", f"error above {LIMIT}"
        else:
            times[provider] = []
    del plain, wanted
    for turn in range(rounds + 2):
        for provider in times:
            spent = milliseconds(calls[provider], device)
            if turn >= 2:  # two rounds of warm-up
                times[provider].append(spent)
    for provider, spent in times.items():
        row = rows[provider]
        row.ms_p20, row.ms_p50, row.ms_p80 = percentiles(spent)
        row.tflops = product.flop / row.ms_p50 / 1e9
        row.ceiling_percent = 100 * row.tflops / ceiling if ceiling else None
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", choices=PRODUCTS, action="append", help="only this one (repeatable)")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), help="TxHxIxExk")
    parser.add_argument("--json", type=Path, help="written anew after every product")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=10)
    a = parser.parse_args()
    if a.rounds < 2 or (a.shape is not None and len(a.shape) != 5):
        parser.error("--rounds takes 2 or more, --shape tokens x hidden x inner x experts x top_k")
    if a.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.support import triton_bf16

        triton_bf16.install()
    elif not torch.cuda.is_available():
        raise SystemExit("expert_tiles: no GPU here; --smoke runs tiny shapes in Triton's interpreter")
    from prism_fast.kernels import moe

    device = "cpu" if a.smoke else "cuda"
    x = make_layer(a.shape or (SMOKE if a.smoke else SHAPE), device)
    small = moe.Tile(32, 32, 32, 2, 4)
    table = moe.Tiles(small, small, small) if a.smoke else moe.tiles_for(x.hidden)
    ceiling = ceiling_of(device)
    rows: list[Row] = []
    for name, product in products(x).items():
        if a.product and name not in a.product:
            continue
        found = measure(name, product, getattr(table, product.tile), device, a.rounds, ceiling)
        rows += found
        print(*map(line, found), sep="\n", flush=True)
        if a.json:
            result = {"machine": machine(), "ceiling_tflops": ceiling, "rows": [asdict(r) for r in rows]}
            a.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for row in rows if row.status == "wrong"]
    if wrong:
        raise SystemExit("expert_tiles: wrong results:\n" + "\n".join(f"{line(r)} {r.error_norm}" for r in wrong))


if __name__ == "__main__":
    main()
