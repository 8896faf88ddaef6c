"""The mixture-of-experts layer: choice of experts with its plan, and the experts themselves.

Shapes are tokens x experts x top_k and tokens x hidden x inner x experts x top_k.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from prism_fast import ops

from . import rivals
from .losses import noise
from .op import Inputs, Op, Provider, Unsupported

# --- route_experts: tokens x experts x top_k -------------------------------------------------------------------------


def routing_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    tokens, experts, top_k = shape
    make = noise(shape, device)
    logits = make(tokens, experts).mul(2.0).to(dtype).requires_grad_()
    return {"logits": logits, "upstream": make(tokens, top_k), "top_k": torch.zeros(top_k)}


def eager_routing(x: Inputs) -> tuple[Tensor, ...]:
    """The operations of transformers between a router's logits and its grouped products."""
    logits = x["logits"]
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights, chosen = torch.topk(torch.softmax(logits, -1, dtype=wide), x["top_k"].shape[0], -1)
    weights = weights / weights.sum(-1, keepdim=True)
    expert, permutation = torch.sort(chosen.flatten())
    torch.empty_like(permutation)[permutation] = torch.arange(len(permutation), device=logits.device)
    experts = logits.shape[1]
    torch.cumsum(torch.histc(expert.float(), bins=experts, min=0, max=experts - 1), 0, dtype=torch.int32)
    return (weights,)


def ours_routing(backend: str) -> Provider:
    return lambda x: (ops.route_experts(x["logits"], x["top_k"].shape[0], backend=backend).weights,)


def routing_bytes(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Forward reads the logits and writes 28 bytes per assignment, backward writes the gradient and reads 16."""
    tokens, experts, top_k = shape
    forward = tokens * (experts * dtype.itemsize + top_k * 28)
    backward = tokens * (experts * dtype.itemsize + top_k * 16)
    return {"inference": forward, "forward": forward, "backward": backward, "full": forward + backward}[mode]


# --- moe_experts: tokens x hidden x inner x experts x top_k ----------------------------------------------------------


def expert_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    tokens, hidden, inner, experts, top_k = shape
    make = noise(shape, device)
    chosen = torch.topk(make(tokens, experts), top_k, -1).indices
    weights = torch.softmax(make(tokens, top_k), -1)

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * make(*size)).to(dtype).requires_grad_()

    return {
        "hidden": leaf(tokens, hidden),
        "gate_up": leaf(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down": leaf(experts, hidden, inner, scale=inner**-0.5),
        "weights": weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "chosen": chosen,
        "upstream": make(tokens, hidden),
    }


@lru_cache(maxsize=8)
def transformers_experts(hidden: int, inner: int, experts: int, top_k: int):
    """A module of transformers without weights of its own."""
    module = rivals.package("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe", "transformers")
    config = module.Qwen3VLMoeTextConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=top_k
    )
    with torch.device("meta"):
        found = module.Qwen3VLMoeTextExperts(config)
    del found.gate_up_proj, found.down_proj
    return found


def stock_experts(implementation: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        hidden, down, chosen = x["hidden"], x["down"], x["chosen"]
        if implementation == "batched_mm" and (hidden.device.type == "cpu" or len(hidden) * down.numel() > 2**33):
            raise Unsupported("gathers the weights of every assignment")
        module = transformers_experts(hidden.shape[1], down.shape[2], down.shape[0], chosen.shape[1])
        module.config._experts_implementation = implementation
        module.gate_up_proj, module.down_proj = x["gate_up"], down
        return (module(hidden, chosen, x["weights"].to(hidden.dtype)),)

    return run


def liger_experts(x: Inputs) -> tuple[Tensor, ...]:
    function = rivals.package("liger_kernel.ops.fused_moe", "liger-kernel").LigerFusedMoEFunction
    rivals.cuda_only(x, "hidden")
    weights = x["weights"].to(x["hidden"].dtype)
    return (function.apply(x["hidden"], x["gate_up"], x["down"], x["chosen"].int(), weights),)


def ours_experts(backend: str, recompute: bool = False) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        if backend == "triton":
            rivals.cuda_only(x, "hidden")
        if backend == "native" and x["hidden"].device.type != "cpu":
            raise Unsupported("reads the offsets on the host: for the CPU")
        routing = ops.plan_experts(x["chosen"], x["weights"], len(x["down"]))
        try:
            return (ops.moe_experts(*(x[n] for n in WEIGHTED), routing, recompute=recompute, backend=backend),)
        except NotImplementedError as error:
            if backend != "stock":
                raise
            raise Unsupported(str(error)) from None

    return run


WEIGHTED = ("hidden", "gate_up", "down")


def expert_flop(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Three products of T · top_k rows forward, six backward; recomputed products do not count."""
    tokens, hidden, inner, _, top_k = shape
    forward = 6.0 * tokens * top_k * hidden * inner
    return forward * {"inference": 1, "forward": 1, "backward": 2, "full": 3}[mode]


OPS = (
    Op(
        "route_experts",
        {"cuda": ((32768, 4, 2), (32768, 128, 8)), "cpu": ((4096, 4, 2), (4096, 128, 8)), "small": ((64, 4, 2),)},
        routing_inputs,
        eager_routing,
        {
            "eager": eager_routing,
            "prism_fast native": ours_routing("native"),
            "prism_fast reference": ours_routing("reference"),
        },
        ("logits",),
        "GB/s",
        routing_bytes,
        ("upstream",),
        dtypes={"cuda": (torch.bfloat16,), "cpu": (torch.float32,)},
    ),
    Op(
        "moe_experts",
        {
            "cuda": (
                *((tokens, 2048, 6144, 4, 2) for tokens in (512, 4096, 32768, 65536)),
                *((tokens, 2048, 768, 128, 8) for tokens in (512, 4096, 32768, 65536)),
            ),
            "cpu": ((4096, 256, 768, 4, 2),),
            "small": ((40, 24, 20, 4, 2),),
        },
        expert_inputs,
        ours_experts("reference"),
        {
            "eager": stock_experts("eager"),
            "transformers grouped_mm": stock_experts("grouped_mm"),
            "transformers batched_mm": stock_experts("batched_mm"),
            "liger": liger_experts,
            "prism_fast triton": ours_experts("triton"),
            "prism_fast triton, recompute": ours_experts("triton", recompute=True),
            "prism_fast native": ours_experts("native"),
            "prism_fast native, recompute": ours_experts("native", recompute=True),
            "prism_fast stock": ours_experts("stock"),
            "prism_fast reference": ours_experts("reference"),
        },
        (*WEIGHTED, "weights"),
        "TFLOP/s",
        expert_flop,
        ("upstream",),
    ),
)
