"""``policy_loss`` and ``importance_weights``, sequence by sequence."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from prism_fast import ops

from .draw import Case, Draw
from .op import Op

CLIPS = {
    "grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "dr_grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2), "cispo": (1.0, 4.0), "sapo": None,
}  # fmt: skip
FIRST = {
    "grpo": "seq_mean_token_mean", "dapo": "token_mean", "gspo": "seq_mean_token_mean",
    "gspo_token": "seq_mean_token_mean", "dr_grpo": "seq_mean_token_sum_norm", "bnpo": "token_mean",
    "cispo": "token_mean", "sapo": "seq_mean_token_mean",
}  # fmt: skip
OTHERS = {
    "grpo": ("token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"), "cispo": ("seq_mean_token_mean",),
    "sapo": ("token_mean",),
}  # fmt: skip
TWO_SIDED = ("grpo", "dapo", "dr_grpo", "bnpo")
KL = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
COLUMNS = ("old_logp", "token_advantage", "ref_logp", "is_weight", "entropy")
COUNTS = (torch.int32, torch.int64, torch.float32, torch.float64)
SEQUENCE = ("gspo", "gspo_token")


STATS = (
    "tokens", "sequences", "policy_loss", "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "ratio_mean",
    "ratio_max", "approx_kl", "kl", "entropy",
)  # fmt: skip
# ------------------------------------------------------------------------------------------------------- formulas


def cut(borders: list[int], rows: int) -> bool:
    """Whether offsets cut ``rows`` into sequences (and padding)."""
    return borders[0] == 0 and borders[-1] <= rows and borders == sorted(borders)


def _kl(new: Tensor, ref: Tensor, kind: str) -> Tensor:
    """Schulman's estimators with verl's clamps."""
    if kind.endswith("+"):
        square = 0.5 * (new - ref) ** 2
        return _kl(new, ref, kind[:-1]).detach() + square - square.detach()
    if kind == "k1":
        return new - ref
    if kind == "abs":
        return (new - ref).abs()
    if kind == "k2":
        return 0.5 * (new - ref) ** 2
    k = (ref - new).clamp(-20.0, 20.0)
    return (k.exp() - k - 1.0).clamp(-10.0, 10.0)


def _number(x) -> float | Tensor:
    return x.to(torch.float64) if isinstance(x, Tensor) else float(x)


def formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    t = {name: x.reshape(-1) if x is not None and x.dim() == 2 else x for name, x in t.items()}  # padded rows
    o, new = case.options, t["logp"]
    loss = o.get("loss", "grpo")
    clip = o.get("clip") or CLIPS[loss]
    aggregation = o.get("aggregation") or FIRST[loss]
    borders = t["cu_seqlens"].tolist()
    if not cut(borders, len(new)):
        everything = (new * math.nan).sum() + math.nan
        if o.get("entropy_coef"):
            everything = everything + (t["entropy"] * math.nan).sum()
        return {"loss": everything, **dict.fromkeys(STATS, torch.tensor(math.nan))}
    mask = t.get("mask")
    rows = [
        torch.tensor([i for i in range(a, b) if mask is None or bool(mask[i] != 0)], dtype=torch.long)
        for a, b in pairwise(borders)
    ]
    tokens, sequences = sum(map(len, rows)), sum(len(r) > 0 for r in rows)
    given = o.get("denominator", t.get("denominator"))
    given = (tokens if aggregation == "token_mean" else sequences) if given is None else float(given)
    count = 1.0 if given == 0 else given
    norm = o.get("norm_length", t.get("norm_length"))
    total, pure, sums = [new.new_zeros(0)], [new.new_zeros(0)], {}

    def note(name: str, value: Tensor) -> None:
        sums.setdefault(name, []).append(value.detach())

    for b, r in enumerate(rows):
        if not len(r):
            continue
        logp = new[r]
        old = logp.detach() if t.get("old_logp") is None else t["old_logp"][r].detach()
        a = t["token_advantage"][r] if t.get("token_advantage") is not None else t["advantage"][b].expand(len(r))
        a = a.detach()
        difference = logp - old
        if loss in SEQUENCE:  # GSPO eq. 14: value of the sequence's ratio, gradient of each token's own
            mean = difference.detach().mean()
            ratio = (mean + (logp - logp.detach())).clamp(max=10.0).exp()
            measured = difference.detach()
        else:
            measured = difference.clamp(-20.0, 20.0)
            ratio = measured.exp()
        low = high = dual = torch.zeros_like(a, dtype=torch.bool)
        r_value = ratio.detach()
        if loss == "sapo":
            up, down = o.get("sapo_temperature", (1.0, 1.05))
            tau = torch.full_like(logp.detach(), down).masked_fill(a > 0, up)
            each = -a * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
        elif loss == "cispo":
            each = -a * r_value.clamp(1.0 - clip[0], 1.0 + clip[1]) * logp
            low, high = r_value < 1.0 - clip[0], r_value > 1.0 + clip[1]
        else:
            each = torch.maximum(-a * ratio, -a * ratio.clamp(1.0 - clip[0], 1.0 + clip[1]))
            low, high = (a < 0) & (r_value < 1.0 - clip[0]), (a > 0) & (r_value > 1.0 + clip[1])
            bound = o.get("dual_clip") or o.get("delta")
            if bound is not None:
                dual = (a < 0) & (r_value > bound)
                each = torch.where(a < 0, torch.minimum(each, -a * bound), each)
        if t.get("is_weight") is not None:
            each = each * t["is_weight"][r].detach()
        share = 1.0 / count
        if aggregation == "seq_mean_token_mean":
            share = share / len(r)
        elif aggregation == "seq_mean_token_sum_norm":
            share = share / float(norm)
        pure.append(each * share)
        loses = each
        if t.get("ref_logp") is not None:
            divergence = _kl(logp, t["ref_logp"][r].detach(), o.get("kl", "k3"))
            if o.get("kl_importance"):
                whole = (logp - old).mean().clamp(max=10.0).exp() if loss in SEQUENCE else ratio
                divergence = divergence * whole
            note("kl", divergence)
            loses = loses + o.get("kl_coef", 0.0) * divergence if o.get("kl_coef") else loses
        if t.get("entropy") is not None:
            note("entropy", t["entropy"][r])
            loses = loses - o.get("entropy_coef", 0.0) * t["entropy"][r] if o.get("entropy_coef") else loses
        broken = loses.isnan().nonzero()[:, 0]
        if len(broken):  # what is not a number shows in the gradients too
            sick = logp[broken] * math.nan
            if o.get("entropy_coef"):
                sick = sick + t["entropy"][r[broken]] * math.nan
            loses = loses.index_put((broken,), sick.to(loses.dtype))
        total.append(loses * share)
        for name, value in (("low", low), ("high", high), ("dual", dual), ("ratio", r_value), ("drift", -measured)):
            note(name, value)

    kind = new.dtype

    def mean(name: str) -> Tensor:
        parts = [x.to(kind) for x in sums.get(name, [])]
        return torch.cat(parts).mean() if parts else torch.tensor(math.nan, dtype=kind)

    return {
        "loss": torch.cat(total).sum(),
        "tokens": torch.tensor(float(tokens)),
        "sequences": torch.tensor(float(sequences)),
        "policy_loss": torch.cat(pure).sum().detach(),
        "clip_fraction_low": mean("low"),
        "clip_fraction_high": mean("high"),
        "dual_clip_fraction": mean("dual"),
        "ratio_mean": mean("ratio"),
        "ratio_max": torch.cat(sums["ratio"]).max() if tokens else torch.tensor(math.nan, dtype=kind),
        "approx_kl": mean("drift"),
        "kl": mean("kl"),
        "entropy": mean("entropy"),
    }


# ---------------------------------------------------------------------------------------------------------- cases


def draw_lengths(d: Draw) -> tuple[list[int], int]:
    """(lengths of the sequences, rows with some padding behind them)."""
    lengths = d.lengths(d.size(0, 5, 40), 7, 60)
    return lengths, sum(lengths) + (d.size(0, 3) if d.chance(0.4) else 0)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)


def spoiled(d: Draw, tensors: dict, rows: int) -> None:
    """Now and then offsets that cut no sequences: they do not begin at 0, end behind the rows, or go back."""
    if d.chance(0.06):
        cu, at = tensors["cu_seqlens"], d.size(0, len(tensors["cu_seqlens"]) - 1)
        cu[at] = d.pick(-1, 1, rows + 1, 2**30) if at == 0 else d.pick(-1, rows + 1, 2**30)


def draw_options(
    d: Draw, tensors: dict, lengths: list[int], rows: int, logp: Tensor, dtype: torch.dtype, kept: Tensor | None = None
) -> dict:
    """Options of a policy loss of rows with log-probabilities ``logp``; adds its columns to ``tensors``.

    ``kept``: rows that take part for other reasons than the mask.
    """
    o: dict = {"loss": d.pick(*CLIPS)} if d.chance(0.9) else {}
    loss = o.get("loss", "grpo")
    if d.chance(0.4) and loss in OTHERS:
        o["aggregation"] = d.pick(*OTHERS[loss])
    elif d.chance(0.3):
        o["aggregation"] = FIRST[loss]
    if o.get("aggregation", FIRST[loss]) == "seq_mean_token_sum_norm":
        norm = d.pick(1.0, 7.0, 1024, 0.5)
        if d.chance(0.5):
            tensors["norm_length"] = torch.tensor(norm, dtype=d.pick(torch.float32, torch.float64))
        else:
            o["norm_length"] = norm
    if loss != "sapo" and d.chance(0.5):
        o["clip"] = d.pick((0.2, 0.28), (0.0, 0.0), (0.5, 0.0), (1.0, 4.0), (0.03, 0.02), (3.0, 3.0))
    high = (o.get("clip") or CLIPS[loss] or (0, 0))[1]
    if loss in TWO_SIDED and d.chance(0.4):
        o.update({"dual_clip": d.pick(1.1, 3.0, 20.0)} if d.chance(0.5) else {"delta": 1.0 + high + d.pick(0.3, 2.0)})
    if loss == "sapo" and d.chance(0.5):
        o["sapo_temperature"] = d.pick((1.0, 1.05), (0.1, 30.0), (5.0, 0.5))
    if d.chance(0.5):
        count = d.pick(0, 1, 3, 40, 1000)
        if d.chance(0.5):
            tensors["denominator"] = torch.tensor(count, dtype=d.pick(*COUNTS))
        else:
            o["denominator"] = count if d.chance(0.5) else float(count)
    used = torch.arange(rows) < sum(lengths)
    if d.chance(0.5):
        mask = d.mask(rows, probability=d.pick(0.2, 0.7, 1.0))
        used = used & mask
        if d.chance(0.4):
            mask = mask.to(d.pick(torch.float32, dtype)) * d.pick(1.0, 0.5, -2.0)
        tensors["mask"] = mask
    if kept is not None:
        used = used & kept

    def column(values: Tensor) -> Tensor:
        values = values.to(d.like(dtype))
        return d.junk(values, ~used) if d.chance(0.4) else values

    finite = logp.double().clamp(-1e4, 0.0).nan_to_num(0.0, 0.0, 0.0)
    spread = d.pick(0.0, 0.05, 0.4, 3.0, 30.0)
    if d.chance(0.8):
        tensors["old_logp"] = column(finite + d.normal(rows, scale=spread))
    if loss != "gspo" and d.chance(0.4):
        tensors["token_advantage"] = column(d.scattered(d.normal(rows), 0.0, 0.2))
    else:
        a = d.scattered(d.normal(len(lengths), scale=d.pick(1.0, 1.0, 1e-3, 50.0)), 0.0, 0.2)
        tensors["advantage"] = a.to(d.like(dtype))
    if d.chance(0.4):
        tensors["ref_logp"] = column(finite + d.normal(rows, scale=d.pick(0.0, 0.1, 1.0, 30.0)))
        o["kl"] = d.pick(*KL)
        if d.chance(0.8):
            o["kl_coef"] = d.pick(0.05, 1.0, -0.5)
        if d.chance(0.4):
            o["kl_importance"] = True
    if d.chance(0.4):
        tensors["is_weight"] = column(d.normal(rows).exp())
    if d.chance(0.3):
        o["entropy_coef"] = d.pick(0.01, 1.0, -0.3)
    tensors["cu_seqlens"] = offsets(lengths)
    away_from_kinks(o, tensors, lengths, logp)
    return o


def away_from_kinks(o: dict, tensors: dict, lengths: list[int], logp: Tensor) -> None:
    """Take columns to the log-probabilities themselves where a rounding would decide on which side of a bend they lie.

    A loss with corners has no gradient there that two precisions could agree on. The distance kept is 2^-10 of the
    bound, hundreds of roundings of the ratio in float32. Ratio 1 and difference 0, to which the columns are taken, are
    exact in every precision.
    """
    loss, near = o.get("loss", "grpo"), 2.0**-10
    new = logp.double()
    if tensors.get("old_logp") is not None:
        old = tensors["old_logp"].double()
        ratio_bounds, log_bounds = [], [-20.0, 20.0]
        clip = o.get("clip") or CLIPS[loss]
        if loss in SEQUENCE:
            log_bounds = [10.0]
        if clip is not None:
            ratio_bounds += [1.0 - clip[0], 1.0 + clip[1]]
        ratio_bounds += [x for x in (o.get("dual_clip"), o.get("delta")) if x is not None]
        log_bounds += [math.log(x) for x in ratio_bounds if x > 0.0]
        x, start = new - old, 0
        mask = tensors.get("mask")
        for n in lengths if loss in SEQUENCE else ():
            use = torch.arange(start, start + n)
            use = use if mask is None else use[mask[use] != 0]
            x[use] = x[use].mean() if len(use) else x[use]
            start += n
        # Halves of a log-probability in the hundreds are far apart in float32; the distance grows with it.
        slack = near * 0.25 * (1.0 + torch.maximum(new.abs(), old.abs()).nan_to_num(0.0, 0.0, 0.0) * 2.0**-6)
        close = torch.zeros_like(x, dtype=torch.bool)
        for bound in log_bounds:
            close |= ((x - bound).abs() < slack) & (x != 0.0)
        if loss in SEQUENCE and bool(close.any()):
            close = torch.ones_like(close)  # a sequence's ratio can only be moved as a whole
        tensors["old_logp"] = _taken(tensors["old_logp"], new, close)
    if tensors.get("ref_logp") is not None:
        k = (tensors["ref_logp"].double() - new).clamp(-20.0, 20.0)
        distance = (k.abs() - 20.0).abs() if o["kl"].startswith("k3") else k.abs()
        if o["kl"].startswith("k3"):
            distance = torch.minimum(distance, (k.exp() - k - 11.0).abs() / 10.0)
        if o["kl"].startswith(("k3", "abs")):
            slack = near * (1.0 + new.abs().nan_to_num(0.0, 0.0, 0.0) * 2.0**-6)
            tensors["ref_logp"] = _taken(tensors["ref_logp"], new, (distance < slack) & (k != 0.0))


def _taken(column: Tensor, to: Tensor, where: Tensor) -> Tensor:
    """``to`` in the places ``where``, in a dtype that holds it."""
    if not bool(where.any()):
        return column
    return torch.where(where, to, column.double()).to(torch.float64)


def draw(d: Draw) -> Case:
    dtype = d.dtype()
    lengths, rows = draw_lengths(d)
    padded = (d.size(0, 5, 40), d.size(0, 7, 60)) if d.chance(0.25) else None
    if padded:
        lengths, rows = [padded[1]] * padded[0], math.prod(padded)
    tensors: dict = {}
    logp = -d.normal(rows, scale=d.pick(1.0, 1.0, 0.1, 20.0), dtype=dtype).abs()
    options = draw_options(d, tensors, lengths, rows, logp, dtype)
    used = torch.arange(rows) < sum(lengths)
    if "mask" in tensors:
        used &= tensors["mask"] != 0
    if "entropy_coef" in options or d.chance(0.2):
        tensors["entropy"] = d.normal(rows).abs().to(d.like(dtype))
    tensors["logp"] = logp
    for name in ("logp", "entropy"):
        if name in tensors and d.chance(0.3):
            tensors[name] = d.junk(tensors[name], ~used)
    if d.chance(0.06) and rows:  # a token that takes part and is not a number
        tensors[d.pick("logp", *["old_logp"] * ("old_logp" in tensors))][d.size(0, rows - 1)] = math.nan
    if padded:
        for name in {"logp", "entropy", "mask", *COLUMNS} & set(tensors):
            tensors[name] = tensors[name].reshape(padded)
    else:
        spoiled(d, tensors, rows)
    tensors = {name: d.strided(x) for name, x in tensors.items()}
    learns = d.learns("logp", *["entropy"] * ("entropy" in tensors)) or ("logp",)
    upstream = {"loss": d.upstream((), torch.float64 if dtype == torch.float64 else torch.float32)}
    return Case(tensors, options, learns, upstream, facts={"dtype": dtype}, large=d.large)


def call(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    more = {k: x for k, x in t.items() if k not in ("logp", "advantage", "cu_seqlens")}
    loss, stats = ops.policy_loss(
        t["logp"], t.get("advantage"), None if t["logp"].dim() == 2 else t["cu_seqlens"], **more, **case.options,
        backend=backend,
    )  # fmt: skip
    return {"loss": loss, **stats._asdict()}


# --------------------------------------------------------------------------------------------- importance_weights


def draw_weights(d: Draw) -> Case:
    dtype = d.dtype()
    lengths, rows = draw_lengths(d)
    logp = -d.normal(rows, scale=d.pick(1.0, 10.0), dtype=dtype).abs()
    rollout = (logp.double() + d.normal(rows, scale=d.pick(0.0, 0.1, 1.0, 15.0))).to(d.like(dtype))
    low = d.pick(0.0, 0.0, 0.5, 0.9)
    options = {
        "mode": d.pick("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        "low": low,
        "high": d.pick(1.0, 1.1, 2.0, 8.0, 1e6) if low < 1.0 else low,
    }
    tensors = {"rollout_logp": rollout, "logp": logp, "cu_seqlens": offsets(lengths)}
    # A weight that is masked jumps at its bound; as for the losses, keep away from it.
    x, start = logp.double() - rollout.double(), 0
    for n in lengths if options["mode"].startswith("sequence") else ():
        x[start : start + n] = x[start : start + n].sum()
        start += n
    bounds = [math.log(b) for b in (low, options["high"]) if b > 0.0] + [-20.0, 20.0]
    close = torch.zeros_like(x, dtype=torch.bool)
    for b in bounds:
        close |= ((x - b).abs() < 2.0**-10 * (1.0 + x.abs())) & (x != 0.0)
    if bool(close.any()):
        tensors["rollout_logp"] = logp.double()
    for name in ("logp", "rollout_logp"):
        if d.chance(0.3):
            tensors[name] = d.junk(tensors[name], torch.arange(rows) >= sum(lengths))
        if d.chance(0.05) and rows:
            tensors[name] = d.scattered(tensors[name], math.nan, 0.1)
    spoiled(d, tensors, rows)
    tensors = {name: d.strided(x) for name, x in tensors.items()}
    return Case(tensors, options, facts={"dtype": dtype}, large=d.large)


def call_weights(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    return ops.importance_weights(**t, **case.options, backend=backend)._asdict()


def weights_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    mode, low, high = (case.options[name] for name in ("mode", "low", "high"))
    borders = t["cu_seqlens"].tolist()
    x = t["logp"] - t["rollout_logp"]
    if not cut(borders, len(x)):
        names = ("effective_sample_size", "masked_fraction", "clipped_fraction")
        return {"weight": x * math.nan, **dict.fromkeys(names, torch.tensor(math.nan))}
    rows = [slice(a, b) for a, b in pairwise(borders) if b > a]
    if mode.startswith("token"):
        ratios = torch.cat([x[r] for r in rows] or [x[:0]]).clamp(-20.0, 20.0).exp()
    else:
        ratios = torch.stack([x[r].sum() for r in rows] or list(x[:0])).clamp(-20.0, 20.0).exp() if rows else x[:0]
    inside = (ratios >= low) & (ratios <= high)
    high = min(high, torch.finfo(x.dtype).max)
    moved = (~inside).to(torch.float64).mean()
    kept = ratios.clamp(low, high) if mode.endswith("truncate") else torch.where(inside, ratios, 0.0)
    kept = torch.where(ratios.isnan(), math.nan, kept)
    weight, at = torch.zeros_like(x), 0
    for i, r in enumerate(rows):
        n = r.stop - r.start
        weight[r] = kept[at : at + n] if mode.startswith("token") else kept[i]
        at += n
    square = (kept * kept).sum()
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "weight": weight,
        "effective_sample_size": kept.sum() ** 2 / square if square != 0 else zero,
        "masked_fraction": moved if mode.endswith("mask") else zero,
        "clipped_fraction": zero if mode.endswith("mask") else moved,
    }


OPS = [
    Op("policy_loss", draw, call, formula, lambda case: ["reference", "native"]),
    Op("importance_weights", draw_weights, call_weights, weights_formula, lambda case: ["reference"]),
]
