"""Group advantages + policy loss, forward and backward: the compiled ops against the formula in plain PyTorch.

One step is what the alignment recipe does between log-probabilities and backward through the model: advantages from two
scores per response with the format rule (an invalid response scores its group's lowest valid score - 1 and pays a
penalty), the clipped loss with its statistics and the mean entropy, the gradient with respect to logp. ``eager`` writes
it as trainers do, on padded [B, T] tensors with a mask, groups by scatter, with the same statistics; ``eager_bare``
leaves the statistics out; ``reference`` is the executable specification on packed tokens. All sequences are full, so
padding costs eager nothing. The providers take turns in one process; before anything is timed, loss and gradient of
each are compared with float64.

    python bench/policy_bench.py --json out.json        on the CPU, or on the GPU where there is one
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prism_fast import ops

SHAPES = ((16, 512), (64, 4096))  # sequences, tokens of each
MODES = ("grpo", "gspo")
PROVIDERS = ("native", "eager", "eager_bare", "reference")
GROUP = 8  # responses per prompt
CLIP = {"grpo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
WEIGHTS = (0.5, 0.5)
EPS = 1e-6
PENALTY = 1.5


def batch(sequences: int, tokens: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Tensor]:
    """Log-probabilities of a policy a few updates away from the one that sampled."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.randn(sequences * tokens, generator=generator, dtype=torch.float64).abs() * 0.6
    drift = 0.08 * torch.randn(sequences * tokens, generator=generator, dtype=torch.float64)
    data = {
        "old": old,
        "logp": old + drift,
        "scores": torch.randn(sequences, len(WEIGHTS), generator=generator, dtype=torch.float64),
        "weights": torch.tensor(WEIGHTS, dtype=torch.float64),
    }
    data = {name: value.to(dtype).to(device) for name, value in data.items()}
    data["entropy"] = -data["old"]
    data["group"] = (torch.arange(sequences) // GROUP)[torch.randperm(sequences, generator=generator)].to(device)
    data["valid"] = (torch.rand(sequences, generator=generator) < 0.9).to(device)
    data["cu_seqlens"] = torch.arange(0, (sequences + 1) * tokens, tokens, dtype=torch.int32, device=device)
    data["mask"] = torch.ones(sequences, tokens, dtype=dtype, device=device)
    return data


def packed(x: dict[str, Tensor], mode: str, backend: str) -> tuple[Tensor, Tensor]:
    """(loss, gradient) by our ops; the denominator is a tensor, as a trainer over several ranks has it."""
    logp = x["logp"].detach().requires_grad_()
    advantage = ops.group_advantage(
        x["scores"],
        x["group"],
        weights=x["weights"],
        valid=x["valid"],
        invalid_penalty=PENALTY,
        eps=EPS,
        backend=backend,
    )
    loss, _ = ops.policy_loss(
        logp,
        advantage,
        x["cu_seqlens"],
        old_logp=x["old"],
        entropy=x["entropy"],
        loss=mode,
        clip=CLIP[mode],
        backend=backend,
    )
    loss.backward()
    return loss.detach(), logp.grad


def eager_advantage(x: dict[str, Tensor]) -> Tensor:
    """[B] advantages; per group of any rows: the format rule, then z-scores of each score, then their weighted sum."""
    scores, group, valid = x["scores"], x["group"], x["valid"]
    rows, columns = scores.shape
    slot = group.unsqueeze(-1).expand(-1, columns)
    blank = scores.new_zeros(rows, columns)
    lowest = torch.full_like(blank, torch.inf).scatter_reduce(
        0, slot, scores.masked_fill(~valid.unsqueeze(-1), torch.inf), "amin"
    )
    floor = torch.where(lowest.isinf(), 0.0, lowest) - 1.0
    scores = torch.where(valid.unsqueeze(-1), scores, floor[group])
    size = scores.new_zeros(rows).index_add(0, group, torch.ones_like(scores[:, 0])).unsqueeze(-1)
    centered = scores - (blank.index_add(0, group, scores) / size.clamp(min=1))[group]
    spread = (blank.index_add(0, group, centered.square()) / (size - 1).clamp(min=1)).sqrt()
    advantage = (centered / (spread[group] + EPS) * x["weights"]).sum(-1)
    return advantage - PENALTY * (~valid).to(scores.dtype)


def eager(x: dict[str, Tensor], mode: str, with_statistics: bool) -> tuple[Tensor, Tensor]:
    """(loss, gradient) by the formula."""
    mask = x["mask"]
    shape = mask.shape
    logp = x["logp"].detach().requires_grad_()
    advantage = eager_advantage(x).unsqueeze(-1)
    low, high = CLIP[mode]
    new, old = logp.view(shape), x["old"].view(shape)
    lengths = mask.sum(-1)
    log_ratio = new - old
    if mode == "gspo":
        drift = (log_ratio * mask).sum(-1) / lengths.clamp(min=1)
        exponent = (new - new.detach() + drift.detach().unsqueeze(-1)).clamp(max=10.0)
    else:
        exponent = log_ratio.clamp(-20.0, 20.0)
    ratio = exponent.exp()
    plain = -advantage * ratio
    held = -advantage * ratio.clamp(1 - low, 1 + high)
    each = torch.maximum(plain, held)
    loss = (((each * mask).sum(-1) / lengths.clamp(min=1)).sum()) / (lengths > 0).sum()
    loss.backward()
    if with_statistics:
        with torch.no_grad():
            count = mask.sum()
            holds = (held > plain).to(mask.dtype) * mask

            def mean(value: Tensor) -> Tensor:
                return (value * mask).sum() / count

            _ = (
                count, (lengths > 0).sum(), mean(holds * (advantage < 0)), mean(holds * (advantage > 0)), mean(ratio),
                torch.where(mask > 0, ratio, -torch.inf).amax(), mean(-log_ratio), mean(x["entropy"].view(shape)),
            )  # fmt: skip
    return loss.detach(), logp.grad


def run(provider: str, x: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    if provider.startswith("eager"):
        return eager(x, mode, with_statistics=provider == "eager")
    return packed(x, mode, provider)


def errors(provider: str, x: dict[str, Tensor], mode: str) -> tuple[float, float]:
    """Relative error of the loss and normwise error of the gradient against float64."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    loss, gradient = eager(exact, mode, with_statistics=False)
    found, slope = run(provider, x, mode)
    # The loss is a mean of terms of both signs that nearly cancel: its error is measured against their size.
    size = gradient.abs().sum()
    return (
        ((found.double() - loss).abs() / size).item(),
        ((slope.double() - gradient).norm() / gradient.norm()).item(),
    )


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, everything that it enqueues included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(sequences: int, tokens: int, mode: str, device: str, seconds: float, providers=PROVIDERS) -> list[dict]:
    """One row per provider; ``speedup`` is the provider's median time over the native one's."""
    x = batch(sequences, tokens, torch.float32, device, seed=sequences + tokens)
    rows = []
    for provider in providers:
        loss_error, gradient_error = errors(provider, x, mode)
        ok = loss_error < 1e-6 and gradient_error < 1e-5
        rows.append(
            {"op": "group_advantage+policy_loss", "provider": provider, "mode": mode, "shape": f"{sequences}x{tokens}"}
            | {"dtype": "float32", "status": "ok" if ok else "wrong"}
            | {"error_loss": loss_error, "error_gradient": gradient_error}
        )
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for _ in range(3):
        for provider in providers:
            run(provider, x, mode)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["native"]) < 10:
        for provider in providers:
            times[provider].append(timed(lambda p=provider: run(p, x, mode), device))
    native = statistics.median(times["native"])
    for row in rows:
        each = sorted(times[row["provider"]])
        row |= {f"ms_p{q}": each[len(each) * q // 100] for q in (20, 50, 80)}
        row |= {"runs": len(each), "speedup_of_native": statistics.median(each) / native}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per shape and mode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = [
        row
        for sequences, tokens in SHAPES
        for mode in MODES
        for row in measure(sequences, tokens, mode, arguments.device, arguments.seconds)
    ]
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    result = {"device": card, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    result["load"] = os.getloadavg()  # of the machine at the end: a busy one is no place for absolute times
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['shape']:>8} {row['mode']:<5} {row['provider']:<10} {row['status']:<5} {row['ms_p50']:9.3f} ms "
            f"x{row['speedup_of_native']:6.2f}  error {row['error_gradient']:.1e}"
        )
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
