"""Output head with its vocabulary shared out: several ranks against one, and what travels beside the products.

Columns, forward and backward with entropy, in milliseconds of the slowest rank: ``one`` (the whole vocabulary on the
first rank, the others wait), ``shared`` (``linear_logprob`` with ``vocab_group``), ``products`` (a rank's shard by
itself, nothing travels) and ``traffic`` (the gather and the sum alone, on tensors of the same sizes). They take turns.
Results and gradients of ``shared`` are compared with float64 on every rank in the same run; exit code 1 if they differ.

    python3 -m prism_fast.bench.vocab_ranks                   two cards, NCCL
    python3 -m prism_fast.bench.vocab_ranks --device cpu      two processes, gloo: the program, not the figures
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SHAPES = {"cuda": (8192, 4096, 151936), "cpu": (128, 32, 501)}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
COLUMNS = ("one", "shared", "products", "traffic")


def both(hidden: Tensor, weight: Tensor, target: Tensor, upstream: tuple[Tensor, Tensor], **options) -> tuple:
    """(logp, entropy, gradients of hidden and weight)."""
    from prism_fast import ops

    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    found = ops.linear_logprob(hidden, weight, target, entropy=True, **options)
    return *(x.detach() for x in found), *torch.autograd.grad(tuple(found), (hidden, weight), upstream)


def columns(x: dict[str, Tensor], mine: slice) -> dict[str, Callable[[], object]]:
    """What this rank does in each; ``mine``: its rows of the weight."""
    upstream, wide = (x["upstream"], x["upstream_entropy"]), torch.promote_types(x["hidden"].dtype, torch.float32)
    shard, ranks = x["weight"][mine].detach().clone(), dist.get_world_size()
    inside = x["target"] % len(shard)
    four = torch.zeros((4, len(x["target"])), dtype=wide, device=shard.device)
    parts = [torch.empty_like(four) for _ in range(ranks)]
    sums = torch.zeros(x["hidden"].shape, dtype=wide, device=shard.device)

    def one() -> object:
        return both(x["hidden"], x["weight"], x["target"], upstream) if dist.get_rank() == 0 else None

    def traffic() -> None:
        dist.all_gather(parts, four)
        dist.all_reduce(sums)

    return {
        "one": one,
        "shared": lambda: both(x["hidden"], shard, x["target"], upstream, vocab_group=dist.group.WORLD),
        "products": lambda: both(x["hidden"], shard, inside, upstream),
        "traffic": traffic,
    }


def errors(found: tuple, x: dict[str, Tensor], mine: slice) -> dict[str, float]:
    """Normwise relative error of ``shared`` on this rank against the whole vocabulary in float64."""
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in x.items()}
    options = {"save": "recompute", "backend": "reference"}  # in waves: fits beside the operands on a card too
    exact = both(wide["hidden"], wide["weight"], x["target"], (wide["upstream"], wide["upstream_entropy"]), **options)
    wanted = (*exact[:3], exact[3][mine])
    names = ("logp", "entropy", "d_hidden", "d_weight")
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, found, wanted, strict=True)}


def measure(rank: int, a: argparse.Namespace, meeting: str) -> None:
    from prism_fast.bench.ops import heads
    from prism_fast.bench.ops.machine import machine
    from prism_fast.bench.ops.measure import synchronise
    from prism_fast.bench.ops.op import LIMITS

    if a.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    network = "nccl" if a.device == "cuda" else "gloo"
    dist.init_process_group(network, init_method=f"file://{meeting}", rank=rank, world_size=a.ranks)
    shape, dtype = a.shape or SHAPES[a.device], DTYPES[a.device]
    x = heads.inputs(shape, dtype, a.device)  # seeded by the shape: every rank has the same
    borders = [shape[2] * r // a.ranks for r in range(a.ranks + 1)]
    mine = slice(borders[rank], borders[rank + 1])
    calls = columns(x, mine)
    found = errors(calls["shared"](), x, mine)
    spent: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for turn in range(a.rounds + 2):
        for name in COLUMNS:
            synchronise(a.device)
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            synchronise(a.device)
            if turn >= 2:  # two rounds of warm-up
                spent[name].append((time.perf_counter() - start) * 1e3)
    gathered: list = [None] * a.ranks
    dist.all_gather_object(gathered, (spent, found))
    dist.destroy_process_group()
    worst = {name: max(theirs[name] for _, theirs in gathered) for name in found}
    bad = not all(value <= LIMITS[dtype] for value in worst.values())  # NaN is bad
    if rank == 0:
        slowest = {name: [max(turn) for turn in zip(*(s[name] for s, _ in gathered), strict=True)] for name in COLUMNS}
        result = {
            "machine": machine(), "network": network, "ranks": a.ranks, "shape": shape, "errors": worst,
            "status": "wrong" if bad else "ok", "ms_p50": {n: statistics.median(t) for n, t in slowest.items()},
        }  # fmt: skip
        print(f"{network}, {a.ranks} ranks, {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}")
        print("  ".join(f"{name} {ms:.3f} ms" for name, ms in result["ms_p50"].items()))
        print(f"{result['status']}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
        if a.json:
            a.json.write_text(json.dumps(result, indent=1) + "\n")
    if bad:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), help="rows x width x vocabulary")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.ranks < 2 or a.rounds < 1 or (a.shape is not None and len(a.shape) != 3):
        parser.error("--ranks takes 2 or more, --rounds 1 or more, --shape rows x width x vocabulary")
    if a.device == "cuda" and torch.cuda.device_count() < a.ranks:
        parser.error(
            f"{a.ranks} ranks need as many cards, here are {torch.cuda.device_count()}; --device cpu uses gloo"
        )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (a, str(Path(folder, "meeting"))), nprocs=a.ranks)


if __name__ == "__main__":
    main()
