"""``group_advantage`` and ``pairwise_loss``, group by group."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from prism_fast import ops

from .draw import Case, Draw
from .op import Op

# ------------------------------------------------------------------------------------------------ group_advantage


def draw(d: Draw) -> Case:
    dtype = d.dtype()
    rows, columns = d.size(0, 14, 3000), d.size(0, 3) if d.chance(0.3) else d.size(1, 3)
    kind = d.pick("normal", "normal", "ties", "far", "equal", "wide")
    scores = d.normal(rows, columns)
    if kind == "ties":
        scores = (scores * 2).round() * 0.3
    elif kind == "far":
        scores = scores + 1000.0
    elif kind == "equal":
        scores = torch.full_like(scores, d.pick(0.9, 0.1, -3.3))
    elif kind == "wide":
        scores = scores * d.pick(1e-4, 1e4)
    o = {
        "normalize": d.pick("per_score", "per_score", "combined", "mean_only", "leave_one_out", "batch"),
        "invalid": d.pick("below_min", "exclude", "as_is"),
        "singleton": d.pick("zero", "identity"),
    }
    if d.chance(0.5):
        o["eps"] = d.pick(1e-6, 1e-4, 1.0, 0.0)
    if o["normalize"] in ("per_score", "combined") and d.chance(0.3):
        o["power"] = d.pick(0.5, 2.0, 1.5)
    o["per_score"] = o["normalize"] != "combined" and d.chance(0.3)
    tensors = {"scores": scores.to(dtype)}
    groups = d.size(1, max(1, rows))
    matrix = (groups, rows // groups) if d.chance(0.25) else None  # a group per row of scores [P, n, K]
    if matrix:
        rows = math.prod(matrix)
        tensors = {"scores": tensors["scores"][:rows]}
        tensors["group"] = torch.arange(groups).repeat_interleave(matrix[1])
    else:
        tensors["group"] = d.whole(0, groups, rows)
    if d.chance(0.1) and not matrix:
        tensors["group"] = d.scattered(tensors["group"], d.pick(-1, rows, 2**30), 0.2)
    if d.chance(0.6):
        tensors["valid"] = d.mask(rows, probability=d.pick(0.2, 0.7, 1.0))
    if d.chance(0.4):
        tensors["gate"] = d.scattered(d.normal(rows), 0.0, 0.2).to(d.like(dtype))
    if not o["per_score"]:
        if d.chance(0.4):
            tensors["offset"] = d.normal(rows).to(d.like(dtype))
        if d.chance(0.4):
            o["invalid_penalty"] = d.pick(0.5, 1.0, -0.3)
    weights = d.scattered(d.normal(columns), 0.0, 0.2)
    if d.chance(0.5):
        tensors["weights"] = weights.to(d.like(dtype))
    else:
        o["weights"] = weights.tolist()
    if matrix:
        for name in {"scores", "valid", "gate", "offset"} & set(tensors):
            tensors[name] = tensors[name].reshape(*matrix, *tensors[name].shape[1:])
        if columns == 1 and d.chance(0.5):
            tensors["scores"] = tensors["scores"][..., 0]
    tensors = {name: d.strided(x) for name, x in tensors.items()}
    return Case(tensors, o, facts={"dtype": dtype, "matrix": matrix}, large=d.large)


def call(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    given = t | {"group": None} if case.facts["matrix"] else t
    found = ops.group_advantage(**given, **case.options, backend=backend)
    return {"advantage": found.flatten(0, 1) if case.facts["matrix"] else found}


def _standardised(x: Tensor, o: dict, spread: Tensor | None, eps: float) -> Tensor:
    """GN of one group's counted scores [n] of one kind; ``spread``: standard deviation of the batch."""
    n, normalize = len(x), o["normalize"]
    if n == 1:
        if o["singleton"] == "zero":
            return torch.zeros_like(x)
        if normalize in ("per_score", "combined"):
            return x / (1.0 + eps)
        return x / (spread + eps) if normalize == "batch" else x
    if bool((x == x[0]).all()):
        return torch.zeros_like(x)
    if normalize == "leave_one_out":
        return torch.stack([x[i] - (x.sum() - x[i]) / (n - 1) for i in range(n)])
    centred = x - x.mean()
    if normalize == "mean_only":
        return centred
    if normalize == "batch":
        return centred / (spread + eps)
    return _divided(centred, x.std(), eps)


def _divided(centred: Tensor, std: Tensor, eps: float) -> Tensor:
    return torch.where(centred == 0, 0.0, centred / (std + eps))


def formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    if case.facts["matrix"]:
        flat = {name: t[name].flatten(0, 1) for name in ("scores", "valid", "gate", "offset") if name in t}
        t = t | flat | {"scores": flat["scores"][:, None] if flat["scores"].dim() == 1 else flat["scores"]}
    o, x, group = case.options, t["scores"], t["group"].tolist()
    rows, columns = x.shape
    eps = o.get("eps", 1e-6)
    w = t["weights"].to(x.dtype) if "weights" in t else torch.tensor(o["weights"], dtype=x.dtype)
    valid = [True] * rows if t.get("valid") is None else t["valid"].tolist()
    members: dict[int, list[int]] = {}
    for i, g in enumerate(group):
        if 0 <= g < rows:
            members.setdefault(g, []).append(i)
    excluded = [o["invalid"] == "exclude" and not v for v in valid]
    x = x.clone()
    for own in members.values():
        good = [i for i in own if valid[i]]
        bad = [i for i in own if not valid[i]]
        if o["invalid"] == "below_min" and bad:
            x[bad] = x[good].amin(0) - 1.0 if good else torch.full((columns,), -1.0, dtype=x.dtype)
    if o["normalize"] == "combined":
        x = (x * w).sum(1, keepdim=True)
    counted = [i for own in members.values() for i in own if not excluded[i]]
    z = torch.zeros_like(x)
    for k in range(x.shape[1]):
        spread = None
        if o["normalize"] == "batch":
            spread = x[counted, k].std() if len(counted) > 1 else x.new_zeros(())
        for own in members.values():
            use = [i for i in own if not excluded[i]]
            if not use:
                continue
            z[use, k] = _standardised(x[use, k], o, spread, eps)
            p = o.get("power", 1.0)
            if p != 1.0 and len(use) > 1:
                shaped = z[use, k].sign() * z[use, k].abs() ** p
                equal = bool((shaped == shaped[0]).all())
                z[use, k] = torch.zeros_like(shaped) if equal else _divided(shaped - shaped.mean(), shaped.std(), eps)
    terms = z if o["normalize"] == "combined" else z * w
    if t.get("gate") is not None:
        terms = terms * t["gate"][:, None]
    if not o["per_score"]:
        terms = terms.sum(1)
        if t.get("offset") is not None:
            terms = terms + t["offset"]
        terms = terms - o.get("invalid_penalty", 0.0) * torch.tensor([not v for v in valid]).to(x.dtype)
    known = torch.tensor([0 <= g < rows for g in group], dtype=torch.bool)
    return {"advantage": torch.where(known if terms.dim() == 1 else known[:, None], terms, math.nan)}


# -------------------------------------------------------------------------------------------------- pairwise_loss


def draw_pairs(d: Draw) -> Case:
    dtype = d.dtype()
    groups, columns = d.size(0, 4, 300), d.size(1, 3)
    rows = d.size(0, 12, 3000) if groups else 0
    scale = d.pick(1.0, 1.0, 0.1, 30.0)
    teacher, student = d.normal(groups, columns, scale=scale), d.normal(rows, columns, scale=scale)
    if d.chance(0.3):
        teacher, student = (x.round() * 0.5 for x in (teacher, student))
    o: dict = {}
    tensors: dict = {"group": d.whole(0, groups, rows)}
    valid = None
    if d.chance(0.5):
        valid = tensors["valid"] = d.mask(rows, probability=d.pick(0.2, 0.7, 1.0))
    if d.chance(0.5):
        o["clip"] = d.pick(5.0, 1.0, 0.3, 20.0)
    if d.chance(0.3):
        o["length_penalty"] = d.pick(0.1, -0.05, [d.between(0, 0.3) for _ in range(columns)])
        kind = d.pick(torch.int32, torch.int64, torch.float32)
        tensors["lengths[0]"] = d.whole(0, 300, groups, columns, dtype=kind)
        tensors["lengths[1]"] = d.whole(0, 300, rows, columns, dtype=kind)
    if d.chance(0.4):
        o["l2"] = d.pick(0.01, 1.0)
    if d.chance(0.4):
        o["spread"] = d.pick(0.01, 1.0)
    for name in ("denominator", "l2_denominator"):
        if d.chance(0.3):
            count = d.pick(0, 1, 7, 64)
            if d.chance(0.5):
                o[name] = count
            else:
                tensors[name] = torch.tensor(count, dtype=d.pick(torch.int64, torch.float32))
    if "clip" in o:  # no two precisions agree about a corner; lengths only move scores that are not on it
        teacher, student = (torch.where((x.abs() - o["clip"]).abs() < 0.02, 0.125, x) for x in (teacher, student))
    if valid is not None and "l2" not in o and d.chance(0.4):
        student = d.junk(student, ~valid)
    tensors |= {"teacher": teacher.to(dtype), "student": student.to(dtype)}
    if "clip" in o and "lengths[0]" in tensors:
        o["clip"] = 100.0
    tensors = {name: d.strided(x) for name, x in tensors.items()}
    upstream = {"loss": d.upstream((), torch.float64 if dtype == torch.float64 else torch.float32)}
    return Case(
        tensors, o, d.learns("teacher", "student") or ("student",), upstream, facts={"dtype": dtype}, large=d.large
    )


def call_pairs(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    t = dict(t)
    lengths = {"lengths": (t.pop("lengths[0]"), t.pop("lengths[1]"))} if "lengths[0]" in t else {}
    loss, stats = ops.pairwise_loss(
        t.pop("teacher"), t.pop("student"), t.pop("group"), **t, **lengths, **case.options, backend=backend
    )
    return {"loss": loss, **{"part" if name == "loss" else name: x for name, x in stats._asdict().items()}}


def pairs_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    o, group = case.options, t["group"].tolist()
    teacher, student, columns = t["teacher"], t["student"], t["student"].shape[1]
    valid = [True] * len(group) if t.get("valid") is None else t["valid"].tolist()
    if "length_penalty" in o:
        b = o["length_penalty"]
        b = torch.tensor(b if isinstance(b, list) else [b] * columns, dtype=torch.float64)
        teacher = teacher - (b * torch.log1p(t["lengths[0]"].double())).to(teacher.dtype)
        student = student - (b * torch.log1p(t["lengths[1]"].double())).to(student.dtype)
    before = (teacher.detach(), student.detach())
    if "clip" in o:
        teacher, student = (x.clamp(-o["clip"], o["clip"]) for x in (teacher, student))
    use = [i for i, v in enumerate(valid) if v]
    own = [group[i] for i in use]
    margin = teacher[own] - student[use]  # [pairs, K]
    pairs = len(use)

    def count(name: str, default: int) -> float:
        given = o.get(name, t.get(name))
        given = default if given is None else float(given)
        return 1.0 if given == 0 else float(given)

    share = count("denominator", pairs)
    part = -torch.nn.functional.logsigmoid(margin).sum(0) / share
    loss = part.sum()
    if o.get("l2"):
        squares = (teacher**2).sum() + (student**2).sum()
        loss = loss + o["l2"] * squares / count("l2_denominator", teacher.numel() + student.numel())
    if o.get("spread"):
        total = []
        for g in sorted(set(own)):
            mine = [i for i in use if group[i] == g]
            n = len(mine)
            if n < 2:
                continue
            for k in range(columns):
                s = student[mine, k]
                _, order = s.detach().sort(stable=True)  # among equals the earlier row has the lower rank
                aims = torch.tensor([NormalDist().inv_cdf((j + 0.5) / n) for j in range(n)], dtype=torch.float64)
                total.append(((s[order] - s.mean() - aims.to(s.dtype)) ** 2).sum())
        if total:
            loss = loss + o["spread"] * torch.stack(total).sum() / share
    same = before[0][own] == before[1][use]
    ahead = before[0][own] > before[1][use]
    kind = torch.float64
    return {
        "loss": loss,
        "pairs": torch.full((columns,), pairs),
        "ties": same.sum(0),
        "correct": ahead.sum(0),
        "margin": margin.detach().mean(0) if pairs else torch.full((columns,), math.nan, dtype=kind),
        "accuracy": ahead.sum(0).to(kind) / (pairs - same.sum(0)).to(kind),
        "teacher": teacher[own].detach().mean(0) if pairs else torch.full((columns,), math.nan, dtype=kind),
        "student": student[use].detach().mean(0) if pairs else torch.full((columns,), math.nan, dtype=kind),
        "part": part.detach(),
    }


OPS = [
    Op("group_advantage", draw, call, formula, lambda case: ["reference", "native"]),
    Op("pairwise_loss", draw_pairs, call_pairs, pairs_formula, lambda case: ["reference", "native"]),
]
