"""``linear_cross_entropy`` by the definition of cross entropy with a smoothed target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism_fast import ops

from .draw import Case, Draw
from .heads import collect, draw_head, draw_targets, head_backends, head_scores, ignore_index, of_targets, wide
from .op import Op


def draw(d: Draw) -> Case:
    dtype = d.dtype()
    rows = d.size(0, 12, 300)
    tensors, options = draw_head(d, rows, dtype)
    tensors.pop("temperature", None)
    options.pop("temperature", None)
    vocabulary = tensors["weight"].shape[0]
    ignore = ignore_index(d, vocabulary, options)
    target = tensors["target"] = draw_targets(d, rows, vocabulary, ignore, d.chance(0.1))
    if "softcap" not in options and d.chance(0.5):
        options["label_smoothing"] = d.pick(0.1, 0.5, 1.0)
    if "bias" in tensors:  # a banned target, or a share of the target on a banned token, is an infinite loss
        known = target[(target >= 0) & (target < vocabulary)].long()
        tensors["bias"][known] = 0.25
        if "label_smoothing" in options:
            tensors["bias"] = tensors["bias"].nan_to_num(neginf=-3.0)
    if d.chance(0.5):
        options["z_loss"] = d.pick(1e-4, 0.1, 1.0)
    if d.chance(0.3):
        options["reduction"] = "sum"
    elif d.chance(0.4):
        count = d.pick(0, 1, 7, 1000)
        if d.chance(0.5):
            options["denominator"] = count
        else:
            tensors["denominator"] = torch.tensor(count, dtype=d.pick(torch.int64, torch.float32))
    if d.chance(0.2):
        tensors["hidden"] = d.junk(tensors["hidden"], target == ignore)
    buffers = collect(d, tensors)
    one = bool(buffers) or d.chance(0.5)
    upstream = {"loss": torch.ones((), dtype=wide(dtype)) if one else d.upstream((), wide(dtype))}
    tensors = {name: x if name == "target" else d.strided(x) for name, x in tensors.items()}
    learns = d.learns("hidden", "weight", *["bias"] * ("bias" in tensors))
    return Case(tensors, options, learns, upstream, buffers, facts={"dtype": dtype}, large=d.large)


def call(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    t = dict(t)
    first = (t.pop("hidden"), t.pop("weight"), t.pop("target"))
    return {"loss": ops.linear_cross_entropy(*first, **t, **case.options, backend=backend)}


def formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    o = case.options
    rows = (t["target"] != o.get("ignore_index", -100)).nonzero()[:, 0]
    target = t["target"][rows].long()
    z = head_scores(case, t, rows)
    if o.get("softcap") is not None:
        ban = torch.where(z.detach() == -math.inf, -math.inf, 0.0).to(z.dtype)
        z = o["softcap"] * torch.tanh(z / o["softcap"]) + ban
    every, lse = torch.log_softmax(z, -1), torch.logsumexp(z, -1)
    known = (target >= 0) & (target < z.shape[1])
    each = -every.gather(1, torch.where(known, target, 0)[:, None])[:, 0]
    smoothing = o.get("label_smoothing", 0.0)
    if smoothing:
        each = (1.0 - smoothing) * each - smoothing * every.mean(-1)
    each = each + o.get("z_loss", 0.0) * lse * lse if o.get("z_loss") else each
    if not bool(known.all()):
        each = each * torch.where(known, 1.0, math.nan).to(each.dtype)
    if o.get("reduction") == "sum":
        return {"loss": each.sum()}
    given = o.get("denominator", t.get("denominator"))
    count = len(rows) if given is None else (float(given) or 1.0)
    return {"loss": each.sum() / count if count else each.sum() + math.nan}


def terms(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The loss that the targets' own scores alone would give: see `heads.of_targets`."""
    o, target = case.options, t["target"]
    own = of_targets(head_scores)(case, t)["logp"].nan_to_num(0.0, 0.0, 0.0)
    given = o.get("denominator", t.get("denominator"))
    count = int((target != o.get("ignore_index", -100)).sum()) if given is None else float(given)
    return {"loss": own.sum() / (1.0 if o.get("reduction") == "sum" else count or 1.0)}


OPS = [Op("linear_cross_entropy", draw, call, formula, head_backends, terms=terms)]
