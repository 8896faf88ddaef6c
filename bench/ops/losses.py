"""Ops after the head: log-probabilities from logits, advantages with the policy loss, the discriminator's loss.

``eager`` computes a loss as trainers do, on padded [B, T] tensors with a mask and with the statistics that they log
(``eager bare``: without). All sequences have full length here, so padding costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prism_fast import ops

from . import rivals
from .op import Inputs, Op, Provider, Unsupported, require

GROUP = 8  # responses per prompt
CLIP = {"grpo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
WEIGHTS = (0.5, 0.5)
EPS = 1e-6
PENALTY = 1.5


def noise(shape: tuple[int, ...], device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return lambda *size: torch.randn(size, generator=generator, device=device)


# --- selected_logprob: rows x vocabulary -----------------------------------------------------------------------------


def logits_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    n, v = shape
    make = noise(shape, device)
    return {
        "logits": (make(n, v) * 2.0).to(dtype).requires_grad_(),
        "target": make(n).mul(1e3).long().abs() % v,
        "upstream": make(n),
    }


def eager_selected(x: Inputs) -> tuple[Tensor, ...]:
    return (torch.log_softmax(x["logits"].float(), -1).gather(1, x["target"][:, None])[:, 0],)


def ours_selected(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["logits"])
        return ops.selected_logprob(x["logits"], x["target"], backend=backend)[:1]

    return run


def logits_bytes(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Forward reads the logits, backward reads them again and writes their gradient."""
    return shape[0] * shape[1] * dtype.itemsize * {"inference": 1.0, "forward": 1.0, "backward": 2.0, "full": 3.0}[mode]


# --- group_advantage: responses x scores ------------------------------------------------------------------------------


def advantage_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, columns = shape
    make = noise(shape, device)
    return {
        "scores": make(rows, columns).to(dtype),
        "weights": torch.full((columns,), 1.0 / columns, dtype=dtype, device=device),
        "group": (torch.arange(rows, device=device) // GROUP)[torch.argsort(make(rows))],
        "valid": make(rows) < 1.3,
    }


def ours_advantage(x: Inputs, backend: str) -> Tensor:
    return ops.group_advantage(
        x["scores"], x["group"], weights=x["weights"], valid=x["valid"], invalid_penalty=PENALTY, eps=EPS,
        backend=backend,
    )  # fmt: skip


def only_advantage(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["scores"])
        return (ours_advantage(x, backend),)

    return run


def in_graph(provider: Provider) -> Provider:
    """The provider as a CUDA graph, captured at the first call with these inputs; later calls replay it."""
    held: list = []  # the inputs, whose addresses the graph holds, the graph, its results

    def run(x: Inputs) -> tuple[Tensor, ...]:
        if x["scores"].device.type != "cuda":
            raise Unsupported("a CUDA graph: needs CUDA tensors")
        if not held or held[0] is not x:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                provider(x)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = provider(x)
            held[:] = [x, graph, results]
        held[1].replay()
        return held[2]

    return run


def advantage_bytes(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Reads scores, group and validity, writes the advantage."""
    return shape[0] * (shape[1] * dtype.itemsize + 8 + 1 + dtype.itemsize)


# --- group_advantage + policy_loss: sequences x tokens ---------------------------------------------------------------


def policy_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """Log-probabilities of a policy a few updates away from the one that sampled, two scores per response."""
    sequences, tokens = shape
    make = noise(shape, device)
    old = -make(sequences * tokens).abs() * 0.6
    order = torch.argsort(make(sequences))
    return {
        "old": old.to(dtype),
        "logp": (old + 0.08 * make(sequences * tokens)).to(dtype).requires_grad_(),
        "scores": make(sequences, len(WEIGHTS)).to(dtype),
        "weights": torch.tensor(WEIGHTS, dtype=dtype, device=device),
        "entropy": -old.to(dtype),
        "group": (torch.arange(sequences, device=device) // GROUP)[order],
        "valid": make(sequences) < 1.3,
        "cu_seqlens": torch.arange(0, (sequences + 1) * tokens, tokens, dtype=torch.int32, device=device),
        "mask": torch.ones(sequences, tokens, dtype=dtype, device=device),
    }


def ours_policy(mode: str, backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["logp"])
        loss, _ = ops.policy_loss(
            x["logp"], ours_advantage(x, backend), x["cu_seqlens"], old_logp=x["old"], entropy=x["entropy"], loss=mode,
            clip=CLIP[mode], backend=backend,
        )  # fmt: skip
        return (loss,)

    return run


def eager_advantage(x: Inputs) -> Tensor:
    """[B]: per group the rule for invalid formats, then z-scores of each score, then their weighted sum."""
    scores, group, valid = x["scores"], x["group"], x["valid"]
    rows, columns = scores.shape
    slot = group.unsqueeze(-1).expand(-1, columns)
    lowest = torch.full_like(scores, torch.inf).scatter_reduce(
        0, slot, scores.masked_fill(~valid.unsqueeze(-1), torch.inf), "amin"
    )
    floor = torch.where(lowest.isinf(), torch.zeros_like(lowest), lowest - 1.0)
    scores = torch.where(valid.unsqueeze(-1), scores, floor[group])
    blank = torch.zeros_like(scores)
    size = scores.new_zeros(rows).index_add(0, group, torch.ones_like(scores[:, 0])).unsqueeze(-1)
    centered = scores - (blank.index_add(0, group, scores) / size.clamp(min=1))[group]
    deviation = (blank.index_add(0, group, centered.square()) / (size - 1).clamp(min=1)).sqrt()
    advantage = (centered / (deviation[group] + EPS) * x["weights"]).sum(-1)
    return advantage - PENALTY * (~valid).to(scores.dtype)


def eager_policy(x: Inputs, mode: str, statistics: bool) -> tuple[Tensor, ...]:
    mask = x["mask"]
    advantage = eager_advantage(x).unsqueeze(-1)
    low, high = CLIP[mode]
    new, old = x["logp"].view(mask.shape), x["old"].view(mask.shape)
    lengths = mask.sum(-1)
    log_ratio = new - old
    if mode == "gspo":
        drift = (log_ratio * mask).sum(-1) / lengths.clamp(min=1)
        exponent = (new - new.detach() + drift.detach().unsqueeze(-1)).clamp(max=10.0)
    else:
        exponent = log_ratio.clamp(-20.0, 20.0)
    ratio = exponent.exp()
    plain, held = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    loss = (((torch.maximum(plain, held) * mask).sum(-1) / lengths.clamp(min=1)).sum()) / (lengths > 0).sum()
    if statistics:
        with torch.no_grad():
            count = mask.sum()
            holds = (held > plain).to(mask.dtype) * mask

            def mean(value: Tensor) -> Tensor:
                return (value * mask).sum() / count

            _ = (
                count, (lengths > 0).sum(), mean(holds * (advantage < 0)), mean(holds * (advantage > 0)), mean(ratio),
                torch.where(mask > 0, ratio, -torch.inf).amax(), mean(-log_ratio), mean(x["entropy"].view(mask.shape)),
            )  # fmt: skip
    return (loss,)


def policy_bytes(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Reads logp, old_logp and entropy; writes the gradient."""
    tokens = shape[0] * shape[1] * dtype.itemsize
    return tokens * {"inference": 3.0, "forward": 3.0, "backward": 1.0, "full": 4.0}[mode]


# --- pairwise_loss: prompts x responses x scores ---------------------------------------------------------------------


def pairs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    groups, size, columns = shape
    make = noise(shape, device)
    return {
        "teacher": make(groups, columns).add(0.5).to(dtype).requires_grad_(),
        "student": make(groups * size, columns).to(dtype).requires_grad_(),
        "group": torch.arange(groups, device=device).repeat_interleave(size),
        "valid": make(groups * size) < 1.3,
    }


def eager_pairs(x: Inputs) -> tuple[Tensor, ...]:
    """Bradley-Terry with a mask and an L2 term, as in ``update_critic`` of PRISM's code, with the metrics it logs."""
    teacher, student = x["teacher"].clamp(-10, 10), x["student"].clamp(-10, 10)
    margin = teacher[x["group"]] - student
    valid = x["valid"].to(margin.dtype).unsqueeze(-1)
    count = valid.sum().clamp(min=1)
    loss = (-torch.nn.functional.logsigmoid(margin) * valid).sum() / count
    squares = x["teacher"].square().sum() + x["student"].square().sum()
    loss = loss + 1e-3 * squares / (x["teacher"].numel() + x["student"].numel())
    with torch.no_grad():
        for value in (margin, (margin > 0).to(margin.dtype), teacher[x["group"]], student):
            _ = (value * valid).sum(0) / count
    return (loss,)


def ours_pairs(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["teacher"])
        return ops.pairwise_loss(
            x["teacher"], x["student"], x["group"], valid=x["valid"], clip=10.0, l2=1e-3, backend=backend
        )[:1]

    return run


def pair_bytes(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    scores = shape[0] * (shape[1] + 1) * shape[2] * dtype.itemsize
    return scores * {"inference": 1.0, "forward": 1.0, "backward": 1.0, "full": 2.0}[mode]


_compiled: dict[str, Callable] = {}


def compiled(name: str, function: Provider) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        if name not in _compiled:
            _compiled[name] = torch.compile(function, dynamic=False)
        return _compiled[name](x)

    return run


def _policy(mode: str) -> Op:
    return Op(
        f"group_advantage+policy_loss({mode})",
        {"cuda": ((16, 512), (64, 4096)), "cpu": ((16, 512), (64, 4096)), "small": ((16, 32),)},
        policy_inputs,
        partial(eager_policy, mode=mode, statistics=False),
        {
            "eager": partial(eager_policy, mode=mode, statistics=True),
            "eager bare": partial(eager_policy, mode=mode, statistics=False),
            "torch.compile": compiled(mode, partial(eager_policy, mode=mode, statistics=True)),
            "prism_fast native": ours_policy(mode, "native"),
            "prism_fast reference": ours_policy(mode, "reference"),
        },
        ("logp",),
        "GB/s",
        policy_bytes,
        dtypes={"cuda": (torch.float32,), "cpu": (torch.float32,)},
    )


OPS = (
    Op(
        "selected_logprob",
        {"cuda": ((8192, 151936),), "cpu": ((1024, 32768),), "small": ((64, 300),)},
        logits_inputs,
        ours_selected("reference"),
        {
            "eager": eager_selected,
            "torch.compile": compiled("selected", eager_selected),
            "trl triton": rivals.trl_selected,
            "prism_fast native": ours_selected("native"),
            "prism_fast reference": ours_selected("reference"),
        },
        ("logits",),
        "GB/s",
        logits_bytes,
        ("upstream",),
    ),
    Op(
        "group_advantage",
        {
            "cuda": ((64, 2), (512, 2), (4096, 2)),
            "cpu": ((64, 2), (512, 2), (4096, 2)),
            "small": ((64, 2),),
        },
        advantage_inputs,
        lambda x: (eager_advantage(x),),
        {
            "eager": lambda x: (eager_advantage(x),),
            "prism_fast native": only_advantage("native"),
            "prism_fast native, graph": in_graph(only_advantage("native")),
            "prism_fast reference": only_advantage("reference"),
        },
        (),
        "GB/s",
        advantage_bytes,
        dtypes={"cuda": (torch.float32,), "cpu": (torch.float32,)},
    ),
    _policy("grpo"),
    _policy("gspo"),
    Op(
        "pairwise_loss",
        {"cuda": ((8, 16, 2), (64, 16, 2)), "cpu": ((8, 16, 2), (64, 16, 2)), "small": ((4, 8, 2),)},
        pairs,
        eager_pairs,
        {
            "eager": eager_pairs,
            "torch.compile": compiled("pairs", eager_pairs),
            "prism_fast native": ours_pairs("native"),
            "prism_fast reference": ours_pairs("reference"),
        },
        ("teacher", "student"),
        "GB/s",
        pair_bytes,
        dtypes={"cuda": (torch.float32,), "cpu": (torch.float32,)},
    ),
)
