"""``route_experts``, ``plan_experts`` and ``moe_experts``, token by token and expert by expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism_fast import ops

from .draw import Case, Draw
from .op import Op

MOST_EXPERTS, MOST_CHOSEN = 256, 8  # that the compiled kernels hold


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan(experts: list[list[int]], count: int, top_k: int) -> dict[str, Tensor]:
    """The parts of a `Routing` that follow from the chosen experts of each token."""
    order = sorted((e, t, j) for t, row in enumerate(experts) for j, e in enumerate(row))
    slots = torch.zeros((len(experts), top_k), dtype=torch.int32)
    for slot, (_, t, j) in enumerate(order):
        slots[t, j] = slot
    sizes = torch.bincount(torch.tensor([e for e, _, _ in order], dtype=torch.int64), minlength=count)
    return {
        "experts": torch.tensor(experts, dtype=torch.int64).reshape(len(experts), top_k),
        "permutation": torch.tensor([t * top_k + j for _, t, j in order], dtype=torch.int64),
        "tokens": torch.tensor([t for _, t, _ in order], dtype=torch.int32),
        "slots": slots,
        "offsets": torch.cat((torch.zeros(1), sizes.cumsum(0))).int(),
    }


def natives(case: Case) -> list[str]:
    fits = case.facts["experts"] <= MOST_EXPERTS and case.facts["top_k"] <= MOST_CHOSEN
    return ["reference", *["native"] * fits]


# -------------------------------------------------------------------------------------------------- route_experts


def draw_route(d: Draw) -> Case:
    dtype = d.dtype()
    rows, experts = d.size(0, 12, 2500), d.size(1, 12, 40) if d.chance(0.9) else d.pick(64, 128, 256, 300)
    if d.cap is not None:
        experts = min(experts, d.cap)
    top_k = d.size(1, min(experts, 9))
    logits = d.normal(rows, experts, scale=d.pick(1.0, 1.0, 10.0, 100.0, 1e-3), dtype=dtype)
    if d.chance(0.3):
        logits = logits.round()  # ties
    if d.chance(0.1):
        logits = logits + d.pick(-1e4, 1e4)
    if d.chance(0.2):  # banned experts
        logits = d.scattered(logits, -math.inf, d.pick(0.3, 0.7))
    if d.chance(0.15):
        bad = d.mask(rows, probability=0.3)
        for value in (math.nan, math.inf, -math.inf):
            logits = torch.where(bad[:, None] & d.mask(rows, experts, probability=d.pick(0.1, 1.0)), value, logits)
    logits = logits.to(dtype)
    upstream = {}
    for name, shape in (("weights", (rows, top_k)), ("load", (experts,)), ("z_stat", ())):
        if d.chance(0.7):
            upstream[name] = d.upstream(shape, wide(dtype))
    o = {"top_k": top_k}
    if d.chance(0.6):
        o["renormalize"] = d.chance(0.5)
    facts = {"dtype": dtype, "experts": experts, "top_k": top_k}
    upstream = upstream or {"weights": d.upstream((rows, top_k), wide(dtype))}
    return Case(
        {"router_logits": d.strided(logits)}, o, d.learns("router_logits"), upstream, facts=facts, large=d.large
    )


def call_route(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    return ops.route_experts(**t, **case.options, backend=backend)._asdict()


def route_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    x, top_k = t["router_logits"], case.options["top_k"]
    count = x.shape[1]
    chosen = []
    for row in x.tolist():
        broken = any(math.isnan(v) or v == math.inf for v in row) or all(v == -math.inf for v in row)
        order = range(count) if broken else sorted(range(count), key=lambda e: (-row[e], e))
        chosen.append(list(order)[:top_k])
    experts = torch.tensor(chosen, dtype=torch.int64).reshape(len(chosen), top_k)
    probability = torch.softmax(x, -1)
    weights = probability.gather(1, experts)
    if case.options.get("renormalize", True):
        weights = weights / weights.sum(-1, keepdim=True)
    # A row without a softmax has no statistic either, also where every logit is -inf and its log-sum-exp is -inf.
    z = torch.logsumexp(x, -1) + 0.0 * probability.detach().sum(-1)
    return plan(chosen, count, top_k) | {"weights": weights, "load": probability.sum(0), "z_stat": (z * z).sum()}


# --------------------------------------------------------------------------------------------------- plan_experts


def draw_choice(d: Draw, rows: int, experts: int, top_k: int) -> Tensor:
    """[rows, top_k] different experts for each token, mostly."""
    if top_k <= experts and d.chance(0.8):
        scores = torch.rand((rows, experts), generator=d.generator)
        if d.chance(0.3):  # some experts get nothing
            scores[:, d.size(0, experts - 1) :] -= 1.0
        return scores.argsort(1)[:, :top_k]
    return d.whole(0, experts, rows, top_k, dtype=torch.int64)


def draw_plan(d: Draw) -> Case:
    dtype = d.dtype()
    rows, experts, top_k = d.size(0, 12, 2500), d.size(1, 12), d.size(1, 9) if d.chance(0.9) else 0
    index = draw_choice(d, rows, experts, top_k)
    if d.chance(0.2):
        index = d.scattered(index, d.pick(-1, experts, 2**30), 0.2)
    tensors = {
        "top_k_index": d.strided(index.to(d.pick(torch.int64, torch.int32))),
        "top_k_weights": d.strided(d.normal(rows, top_k, dtype=dtype)),
    }
    facts = {"dtype": dtype, "experts": experts, "top_k": top_k}
    upstream = {"weights": d.upstream((rows, top_k), wide(dtype))}
    return Case(tensors, {"num_experts": experts}, d.learns("top_k_weights"), upstream, facts=facts, large=d.large)


def call_plan(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    return ops.plan_experts(**t, **case.options, backend=backend)._asdict()


def plan_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    count, index = case.options["num_experts"], t["top_k_index"].long()
    known = (index >= 0) & (index < count)
    chosen = torch.where(known, index, 0)
    weights = torch.where(known, t["top_k_weights"], math.nan)
    nothing = torch.zeros(0)
    return plan(chosen.tolist(), count, index.shape[1]) | {"weights": weights, "load": nothing, "z_stat": nothing}


# ---------------------------------------------------------------------------------------------------- moe_experts


def draw_moe(d: Draw) -> Case:
    dtype = d.dtype()
    rows, experts = d.size(0, 12, 3000), d.size(1, 5)
    top_k = d.size(1, min(experts, 3))
    aligned = d.chance(0.6)
    width, inner = (8 * d.size(1, 3), 8 * d.size(1, 3)) if aligned else (d.size(0, 20), d.size(0, 17))
    index = draw_choice(d, rows, experts, top_k)
    scale = d.pick(1.0, 1.0, 0.03, 3.0)
    hidden = d.normal(rows, width, scale=scale)
    if d.chance(0.15) and dtype in (torch.float64, torch.float32):  # gates far from 0 on either side
        hidden = hidden * 100.0
    weights = d.normal(rows, top_k).abs() + 0.01
    if d.chance(0.2):
        weights = d.scattered(weights, 0.0, 0.3)
    kind = wide(dtype) if d.chance(0.8) else dtype
    tensors = {
        "hidden": d.strided(hidden.to(dtype)),
        "gate_up": d.strided(d.normal(experts, 2 * inner, width, scale=max(1, width) ** -0.5, dtype=dtype)),
        "down": d.strided(d.normal(experts, width, inner, scale=max(1, inner) ** -0.5, dtype=dtype)),
        "weights": d.strided(weights.to(kind)),
    }
    parts = {name: d.strided(x) for name, x in plan(index.tolist(), experts, top_k).items()}
    facts = {"dtype": dtype, "plan": parts}
    o = {"recompute": True} if d.chance(0.4) else {}
    upstream = {"out": d.upstream((rows, width), dtype)}
    learns = d.learns("hidden", "gate_up", "down", "weights")
    return Case(tensors, o, learns, upstream, facts=facts, large=d.large)


def moe_backends(case: Case) -> list[str]:
    half = case.dtype != torch.float64
    size = case.tensors["hidden"].element_size()
    width, inner = case.tensors["down"].shape[1:]
    grouped = half and width * size % 16 == 0 and inner * size % 16 == 0
    grouped = grouped and addressable(case.tensors["gate_up"]) and addressable(case.tensors["down"])
    return ["reference", "native", *["stock"] * grouped, *["triton"] * (half and not case.large)]


def addressable(weight: Tensor) -> bool:
    """Whether grouped_mm can read it: rows or columns dense, all starts at multiples of 16 bytes."""
    expert, row, column = weight.stride()
    starts = (expert, row if column == 1 else column, weight.storage_offset())
    return 1 in (row, column) and not any(x * weight.element_size() % 16 for x in starts)


def call_moe(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    nothing = torch.zeros(0)  # the plan is made here, so that nothing but the experts is tried
    routing = ops.Routing(weights=t["weights"], **case.facts["plan"], load=nothing, z_stat=nothing)
    return {"out": ops.moe_experts(t["hidden"], t["gate_up"], t["down"], routing, **case.options, backend=backend)}


def moe_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """As transformers' eager experts have it."""
    hidden, index = t["hidden"], case.facts["plan"]["experts"]
    out = torch.zeros_like(hidden)
    for e in range(t["gate_up"].shape[0]):
        token, choice = (index == e).nonzero(as_tuple=True)
        gate, up = (hidden[token] @ t["gate_up"][e].T).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ t["down"][e].T
        rows = rows * t["weights"][token, choice, None]
        out = out.index_add(0, token, rows.to(hidden.dtype))
    return {"out": out}


OPS = [
    Op("route_experts", draw_route, call_route, route_formula, natives),
    Op("plan_experts", draw_plan, call_plan, plan_formula, natives),
    Op("moe_experts", draw_moe, call_moe, moe_formula, moe_backends),
]
