"""Head and loss: memory and time of `linear_logprob` and `linear_policy_loss` beside materialised logits.

Each provider runs forward and backward on the same random inputs. Its peak memory comes from a process of its own (what
it takes beyond the inputs, gradients included); times come from one process in which the providers take turns, and
count only if their losses and gradients agree with the materialised version's in the same run.

    python bench/linear_logprob_bench.py --json out.json              N 2048, H 512, V 32768, float32 on the CPU
    python bench/linear_logprob_bench.py --device cuda --json out.json    the head shapes of large models, bf16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CPU_SHAPES = ((2048, 512, 32768),)
GPU_SHAPES = ((8192, 2560, 151936), (8192, 4096, 151936))
SEQUENCES = 4
CHUNK = 1024
BASELINE = {"logprob": "materialised", "policy": "materialised"}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Hidden states [N, H] and weight [V, H] whose logits have a spread of a few nats; sequences of equal length."""
    n, h, v = shape
    generator = torch.Generator(device).manual_seed(n + h + v)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    bounds = torch.linspace(0, n, SEQUENCES + 1, device=device).to(torch.int32)
    return {
        "hidden": noise(n, h).to(dtype).requires_grad_(),
        "weight": (noise(v, h) * (2.0 / h**0.5)).to(dtype).requires_grad_(),
        "target": torch.randint(0, v, (n,), generator=generator, device=device),
        "upstream": noise(n),
        "advantage": noise(SEQUENCES),
        "old_logp": noise(n) * 0.1 - 10.0,
        "cu_seqlens": bounds,
    }


def materialised_logp(x: dict) -> torch.Tensor:
    logits = torch.nn.functional.linear(x["hidden"], x["weight"])
    return torch.log_softmax(logits.float(), -1).gather(1, x["target"][:, None])[:, 0]


def chunked_logp(x: dict) -> torch.Tensor:
    """Slices of rows, each formed again in backward: what trainers do in plain PyTorch."""

    def part(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, weight).float()
        return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]

    return torch.cat(
        [
            torch.utils.checkpoint.checkpoint(part, h, x["weight"], t, use_reentrant=False)
            for h, t in zip(x["hidden"].split(CHUNK), x["target"].split(CHUNK), strict=True)
        ]
    )


def logprob(logp: Callable[[dict], torch.Tensor]) -> Callable[[dict], torch.Tensor]:
    def run(x: dict) -> torch.Tensor:
        return (logp(x) * x["upstream"]).sum()

    return run


def policy(x: dict, logp: torch.Tensor) -> torch.Tensor:
    from prism_fast.ops import policy_loss

    return policy_loss(logp, x["advantage"], x["cu_seqlens"], old_logp=x["old_logp"])[0]


def ours(save: str) -> Callable[[dict], torch.Tensor]:
    def run(x: dict) -> torch.Tensor:
        from prism_fast.ops import linear_logprob

        return linear_logprob(x["hidden"], x["weight"], x["target"], save=save).logp

    return run


def ours_policy(x: dict) -> torch.Tensor:
    from prism_fast.ops import linear_policy_loss

    return linear_policy_loss(
        x["hidden"], x["weight"], x["target"], x["advantage"], x["cu_seqlens"], old_logp=x["old_logp"]
    )[0]


PROVIDERS: dict[tuple[str, str], Callable[[dict], torch.Tensor]] = {
    ("logprob", "materialised"): logprob(materialised_logp),
    ("logprob", "chunked"): logprob(chunked_logp),
    ("logprob", "prism_fast recompute"): logprob(ours("recompute")),
    ("logprob", "prism_fast logits"): logprob(ours("logits")),
    ("policy", "materialised"): lambda x: policy(x, materialised_logp(x)),
    ("policy", "prism_fast"): ours_policy,
}
# Goals of one run on the CPU: at most this share of the baseline's memory and time.
GOALS = {("logprob", "prism_fast recompute"): (0.25, 1.35), ("policy", "prism_fast"): (0.25, 1.1)}


def step(provider: Callable[[dict], torch.Tensor], x: dict) -> tuple[torch.Tensor, ...]:
    """(loss, gradient of hidden, gradient of weight)."""
    loss = provider(x)
    return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["weight"]))


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024


def measure_memory(key: tuple[str, str], shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    """MiB beyond the inputs at the highest point of one forward and backward. For a fresh process."""
    step(PROVIDERS[key], inputs((64, 64, 256), dtype, device))  # libraries load and start their threads
    x = inputs(shape, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(PROVIDERS[key], x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step(PROVIDERS[key], x)
    return resident("VmHWM") - before


def memory_of(key: tuple[str, str], shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    code = f"import bench_module as b, torch; print(b.measure_memory({key!r}, {shape!r}, {dtype}, {device!r}))"
    code = f"import sys, importlib.util as u; s = u.spec_from_file_location('bench_module', {__file__!r}); " \
        f"m = u.module_from_spec(s); sys.modules['bench_module'] = m; s.loader.exec_module(m); {code}"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{key} at {shape}: {done.stderr[-2000:]}")
    return float(done.stdout)


def errors(found: tuple[torch.Tensor, ...], baseline: tuple[torch.Tensor, ...]) -> list[float]:
    """Normwise difference of loss and gradients from the baseline's."""
    pairs = zip(found, baseline, strict=True)
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]


def seconds(provider: Callable[[dict], torch.Tensor], x: dict, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step(provider, x)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run(shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int, memory: bool) -> list[dict]:
    x = inputs(shape, dtype, device)
    # Products of half-precision operands differ in their last bit; the rest of a difference would be a mistake.
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in PROVIDERS}
    difference = {}
    for op, name in BASELINE.items():
        expected = step(PROVIDERS[op, name], x)
        for key in PROVIDERS:
            if key[0] == op:
                difference[key] = errors(step(PROVIDERS[key], x), expected)  # also the warm-up
    for _ in range(rounds):
        for key, provider in PROVIDERS.items():
            times[key].append(seconds(provider, x, device))
    rows = []
    for key, spent in times.items():
        base = (key[0], BASELINE[key[0]])
        paired = [a / b for a, b in zip(spent, times[base], strict=True)]
        row = {
            "op": key[0],
            "provider": key[1],
            "mode": "full",
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "ms_p50": statistics.median(spent) * 1e3,
            "time_ratio": statistics.median(paired),
            "difference": difference[key],
            "status": "ok" if max(difference[key]) <= limit else "wrong",
        }
        if memory:
            row["peak_mib"] = memory_of(key, shape, dtype, device)
        rows.append(row)
    for row in rows:
        base = next(r for r in rows if (r["op"], r["provider"]) == (row["op"], BASELINE[row["op"]]))
        row["memory_ratio"] = row["peak_mib"] / base["peak_mib"] if memory else None
    return rows


def line(row: dict) -> str:
    memory = f"{row['peak_mib']:9.1f} MiB ({row['memory_ratio']:.3f})" if row["memory_ratio"] is not None else ""
    return (
        f"{row['op']:<8} {row['provider']:<22} {row['shape']:<20} {row['dtype']:<9} {row['ms_p50']:10.1f} ms "
        f"({row['time_ratio']:.3f}) {memory}  {row['status']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="NxHxV instead of the default shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 unless the CPU goals hold")
    a = parser.parse_args()
    shapes = GPU_SHAPES if a.device == "cuda" else CPU_SHAPES
    if a.shape:
        shapes = (tuple(int(part) for part in a.shape.split("x")),)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    rows = []
    for shape in shapes:
        rows += run(shape, dtype, a.device, a.rounds, not a.no_memory)
        print(*map(line, rows[-len(PROVIDERS) :]), sep="\n", flush=True)
        if a.json:
            versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            a.json.write_text(json.dumps({"machine": versions, "rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row["status"] != "ok"]
    missed = [
        row
        for row in rows
        if (goal := GOALS.get((row["op"], row["provider"])))
        and (row["time_ratio"] > goal[1] or (row["memory_ratio"] is not None and row["memory_ratio"] > goal[0]))
    ]
    if wrong or (a.check and missed):
        raise SystemExit("linear_logprob_bench:\n" + "\n".join(map(line, wrong + missed)))


if __name__ == "__main__":
    main()
