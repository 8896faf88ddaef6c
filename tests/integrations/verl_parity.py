"""Our losses in verl's registry against verl's own, in one process. Prints a table; exit code 0 if all agree.

    make verl-parity VERL_PYTHON=path/to/python

``--write FILE`` also stores verl's losses and gradients for test_verl.py, which runs where verl is not installed.
Not a test file: verl's requirements exclude the transformers that we use, so it lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import verl  # noqa: F401  (its absence is to be the first message)
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig

from prism_fast.integrations import verl as ours

B, T = 5, 9
# Name: verl's loss mode, its aggregation, settings of the actor.
CASES = {
    "GRPO": ("vanilla", "seq-mean-token-mean", {"clip_ratio_c": 1.3}),
    "DAPO": ("vanilla", "token-mean", {"clip_ratio_high": 0.28, "clip_ratio_c": 10.0}),
    "GSPO": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 3e-2, "clip_ratio_high": 4e-2}),
    "Dr.GRPO": ("vanilla", "seq-mean-token-sum-norm", {"loss_scale_factor": 64}),
    "Dr.GRPO, no scale": ("vanilla", "seq-mean-token-sum-norm", {}),
    "CISPO": ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.3}),
    "SAPO": ("sapo", "seq-mean-token-mean", {"tau_neg": 1.25}),
    "sums": ("vanilla", "seq-mean-token-sum", {}),
}
# What the worker knows of the global batch: nothing, or its counts over two ranks.
GLOBAL = {"local": {}, "global": {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 11}}


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(B, T, generator=generator, dtype=torch.float64)

    old = -1.5 + noise(0.4)
    lengths = torch.tensor([T, 4, 1, 0, 7])
    return {
        "old_log_prob": old,
        "log_prob": old + noise(0.5),
        "advantages": noise(1.0)[:, :1].expand(B, T).contiguous(),
        "response_mask": torch.arange(T) < lengths[:, None],
        "rollout_is_weights": noise(0.3).exp(),
    }


def run(name: str, case: str, known: str, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(loss, gradient [B, T], metrics) of a registered loss."""
    _, aggregation, settings = CASES[case]
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation, **settings
    )
    config.global_batch_info.update(GLOBAL[known] | {"loss_scale_factor": config.loss_scale_factor})
    logp = x["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(**x | {"log_prob": logp}, loss_agg_mode=aggregation, config=config)
    return loss.detach(), *torch.autograd.grad(loss, logp), metrics


def compare_loss(case: str, known: str, seed: int) -> tuple[float, float, float]:
    """(error of the loss relative to the gradient, relative error of the gradient, largest difference of a metric)."""
    x = batch(seed)
    if seed % 2:
        del x["rollout_is_weights"]
    mode = CASES[case][0]
    loss, slope, metrics = run(f"prism_{mode}", case, known, x)
    wanted, gradient, theirs = run(mode, case, known, x)
    if set(metrics) != set(theirs) or loss.dtype != wanted.dtype:
        raise AssertionError(f"{case}: {metrics} {loss.dtype} against {theirs} {wanted.dtype}")
    assert gradient.any() and slope[~x["response_mask"]].eq(0).all()
    apart = max(abs(metrics[name] - theirs[name]) for name in theirs)
    scale = gradient.abs().sum()
    return ((loss - wanted).abs() / scale).item(), ((slope - gradient).norm() / gradient.norm()).item(), apart


def write(path: Path) -> None:
    """verl's results on one batch, numbers in full."""
    x = batch(0)
    rows = []
    for case, (mode, aggregation, settings) in CASES.items():
        for known, info in GLOBAL.items():
            loss, gradient, metrics = run(mode, case, known, x)
            row = {"case": case, "mode": mode, "aggregation": aggregation, "settings": settings, "global": info}
            rows.append(row | {"loss": loss.item(), "gradient": gradient.tolist(), "metrics": metrics})
    inputs = {name: value.tolist() for name, value in x.items()}
    path.write_text(json.dumps({"verl": version("verl"), "inputs": inputs, "rows": rows}) + "\n")


def compare_head(seed: int) -> tuple[float, float]:
    """(largest difference of log-probabilities and entropies, relative error of the gradients), float32 operands."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 13, 16, generator=generator)
    weight = torch.randn(97, 16, generator=generator) * 0.5
    labels = torch.randint(0, 97, (2, 13), generator=generator)
    sides = []
    for forward in (ours._fused_linear, FusedLinearForPPO.forward):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        module = SimpleNamespace(impl_backend="torch", chunk_size=8)
        logp, entropy = forward(module, *leaves, labels, temperature=0.8)
        sides.append((torch.stack((logp, entropy)).detach(), *torch.autograd.grad((logp * 2 - entropy).sum(), leaves)))
    (values, *slopes), (wanted, *gradients) = sides
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(slopes, gradients, strict=True)]
    return (values - wanted).abs().max().item(), max(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("verl", "torch", "tensordict", "transformers")}
    print(f"python {platform.python_version()}, " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    print("losses, float64; errors relative to the gradient, metrics absolute")
    assert ours.register() == tuple(f"prism_{name}" for name in ours.LOSSES)
    failed = 0
    for case in CASES:
        for known in GLOBAL:
            results = [compare_loss(case, known, seed) for seed in range(8)]
            loss, slope, metric = (max(column) for column in zip(*results, strict=True))
            ok = loss < 1e-13 and slope < 1e-13 and metric < 1e-6  # verl's metrics are means in float32
            failed += not ok
            end = "ok" if ok else "DIFFERS"
            print(f"{f'{case}, {known}':<26} loss {loss:.1e}  gradient {slope:.1e}  metrics {metric:.1e}  {end}")
    value, slope = (max(column) for column in zip(*map(compare_head, range(8)), strict=True))
    ok = value < 1e-5 and slope < 1e-5
    print(f"{'FusedLinearForPPO, float32':<26} values {value:.1e}  gradients {slope:.1e}  {'ok' if ok else 'DIFFERS'}")
    if arguments.write:
        write(arguments.write)
    before = FusedLinearForPPO.forward
    ours.use_linear_logprob()
    assert FusedLinearForPPO.forward is ours._fused_linear is not before
    return 1 if failed or not ok else 0


if __name__ == "__main__":
    sys.exit(main())
