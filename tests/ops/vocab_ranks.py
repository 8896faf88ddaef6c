"""One of two processes that share out a vocabulary: run by test_vocab_parallel, prints what it found as JSON lines."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from prism_fast import ops

N, H, V = 41, 16, 83
SHARDS = (30, 53)  # ragged
CASES = {
    "plain": {},
    "entropy": {"entropy": True},
    "everything": {"entropy": True, "bias": True, "softcap": 3.0, "temperature": "rows", "save": "recompute"},
    "kept": {"entropy": True, "save": "logits", "temperature": 0.7},
    "weight_grad_out": {"weight_grad_out": True, "save": "logits"},
}


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    target = torch.randint(0, V, (N,), generator=generator)
    target[:6] = torch.tensor([0, SHARDS[0] - 1, SHARDS[0], V - 1, -100, 4])  # the borders of the shards
    target[6:9] = torch.tensor([V, -1, 2**40])  # outside
    return {
        "hidden": draw(N, H), "weight": 2 * draw(V, H), "bias": draw(V), "target": target, "g": draw(N),
        "h": draw(N), "heat": draw(N).abs() + 0.5,
    }  # fmt: skip


def evaluate(case: dict, x: dict[str, torch.Tensor], rows: slice, backend: str, group) -> list[torch.Tensor]:
    """logp, entropy, gradients of hidden, of the rank's weight and bias."""
    options = dict(case)
    hidden = x["hidden"].clone().requires_grad_()
    weight = x["weight"][rows].clone().requires_grad_()
    bias = x["bias"][rows].clone().requires_grad_() if options.pop("bias", False) else None
    if options.get("temperature") == "rows":
        options["temperature"] = x["heat"]
    bank = None
    if options.pop("weight_grad_out", False):
        bank = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    found = ops.linear_logprob(
        hidden, weight, x["target"], bias=bias, vocab_group=group, weight_grad_out=bank, backend=backend, **options
    )
    inside = torch.ones(N, dtype=torch.bool)
    inside[6:9] = False
    total = (found.logp * x["g"].to(found.logp.dtype))[inside].sum()
    if options.get("entropy"):
        total = total + (found.entropy * x["h"].to(found.entropy.dtype)).sum()
    total.backward()
    slopes = [hidden.grad, weight.grad if bank is None else bank, None if bias is None else bias.grad]
    return [found.logp.detach(), found.entropy.detach(), *slopes]


def error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    """Largest difference over the largest number; NaN counts as 0."""
    if found is None or not found.numel():
        return 0.0
    found, wanted = found.double().nan_to_num(0.0), wanted.nan_to_num(0.0)
    return ((found - wanted).abs().max() / (wanted.abs().max() + 1)).item()


def main(backend: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    start = sum(SHARDS[:rank])
    rows = slice(start, start + SHARDS[rank])
    dtype = torch.float64 if backend == "reference" else torch.float32
    x = inputs(dtype)
    for name, case in CASES.items():
        ops.bad_values("cpu")
        found = evaluate(case, x, rows, backend, dist.group.WORLD)
        bad = ops.bad_values("cpu")
        again = evaluate(case, x, rows, backend, dist.group.WORLD)
        same = all(
            a is b or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, again, strict=True)
        )
        everyone = [torch.empty_like(found[0]) for _ in SHARDS]
        dist.all_gather(everyone, found[0])
        alike = torch.equal(everyone[0].nan_to_num(7.0), everyone[1].nan_to_num(7.0))
        wanted = evaluate(case, {k: v.double() if v.is_floating_point() else v for k, v in x.items()}, slice(0, V),
                          "reference", None)  # fmt: skip
        wanted[3:] = [None if w is None else w[rows] for w in wanted[3:]]
        errors = [error(a, b) for a, b in zip(found, wanted, strict=True)]
        nan = [a is None or torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, wanted, strict=True)]
        lines = {"case": name, "rank": rank, "errors": errors, "nan": nan, "same": same, "alike": alike, "bad": bad}
        print(json.dumps(lines), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        from prism_fast.kernels.logprob import tiles
        from prism_fast.ops.triton import head
        from tests.kernels.logprob_cases import SMALL

        tiles.TILES = {b: SMALL._replace(split=not b.rich) for b in tiles.TILES}
        head.WAVE_UNIT, head.WAVE_BYTES = 24, 1  # several waves
    main(sys.argv[1])
