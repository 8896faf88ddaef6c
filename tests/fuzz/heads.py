"""Log-probabilities: ``selected_logprob``, ``linear_logprob``, ``linear_policy_loss``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prism_fast import ops

from . import policies
from .draw import Case, Draw
from .op import Op

SELECTED, LINEAR, LINEAR_LOSS = "selected_logprob", "linear_logprob", "linear_policy_loss"


def logprob_formula(case: Case, z: Tensor, target: Tensor, temperature, softcap, want_entropy: bool):
    """(log p of the targets, entropy of each row) of raw scores ``z`` [n, V], by the definition; of targets outside of
    the vocabulary nothing in particular."""
    if softcap is not None:
        ban = torch.where(z.detach() == -math.inf, -math.inf, 0.0).to(z.dtype)  # holds under a soft cap
        z = softcap * torch.tanh(z / softcap) + ban
    z = z / (temperature.to(z.dtype) if isinstance(temperature, Tensor) else temperature)
    every = torch.log_softmax(z, -1)
    known = (target >= 0) & (target < z.shape[1])
    logp = every.gather(1, torch.where(known, target.long(), 0)[:, None])[:, 0]
    p = every.exp()
    # p log p -> 0 for a banned token; masked twice, so that its gradient is 0 as well and not 0 * infinity.
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, every)).sum(-1) if want_entropy else None
    return logp, entropy


def by_rows(case: Case, scores, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Results of a call whose raw scores of some rows are ``scores(rows)``.

    Rows that are ignored, or whose upstream gradients are exactly 0, are not part of the graph: whatever they hold,
    they add nothing.
    """
    o, target = case.options, t["target"]
    ignore = o.get("ignore_index", -100)
    vocabulary = case.tensors["weight"].shape[0] if "weight" in case.tensors else case.tensors["logits"].shape[1]
    ignored = target == ignore
    g, h = (case.upstream.get(name) for name in ("logp", "entropy"))
    moved = [torch.zeros_like(target, dtype=torch.bool) if x is None else (x != 0) & ~ignored for x in (g, h)]
    temperature = t.get("temperature", o.get("temperature", 1.0))
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(target.shape[0])[:, None]

    def found(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        own = temperature[rows] if isinstance(temperature, Tensor) else temperature
        return logprob_formula(case, scores(rows), target[rows], own, o.get("softcap"), o.get("entropy", False))

    def marked(logp: Tensor, rows: Tensor) -> Tensor:
        """NaN where the target is outside the vocabulary, and so is the gradient."""
        known = (target[rows] >= 0) & (target[rows] < vocabulary)
        return logp if bool(known.all()) else logp * torch.where(known, 1.0, math.nan).to(logp.dtype)

    with torch.no_grad():
        everything = torch.arange(target.shape[0])
        logp, entropy = found(everything)
        logp = marked(logp, everything).masked_fill(ignored, 0.0)
        entropy = logp.new_empty(0) if entropy is None else entropy.masked_fill(ignored, 0.0)
    rows = (moved[0] | moved[1]).nonzero()[:, 0]
    if len(rows):
        own_logp, own_entropy = found(rows)
        use = moved[0][rows]
        logp = logp.index_put((rows[use],), marked(own_logp[use], rows[use]))
        if own_entropy is not None:
            use = moved[1][rows]
            entropy = entropy.index_put((rows[use],), own_entropy[use])
    return {"logp": logp, "entropy": entropy}


def of_targets(scores):
    """The gradients that the targets' own scores alone would give: g [j = target] without - g p_j.

    Where a probability rounds to 1 the two cancel, and what is left is as large as the rounding of either.
    """

    def terms(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
        o, target = case.options, t["target"]
        z = scores(case, t, torch.arange(len(target)))
        known = (target >= 0) & (target < z.shape[1]) & (target != o.get("ignore_index", -100))
        temperature = t.get("temperature", o.get("temperature", 1.0))
        own = z.gather(1, torch.where(known, target.long(), 0)[:, None])[:, 0]
        temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
        return {"logp": torch.where(known, own / temperature, 0.0)}

    return terms


def draw_targets(d: Draw, rows: int, vocabulary: int, ignore: int, outside: bool) -> Tensor:
    target = d.whole(0, vocabulary, rows)
    if d.chance(0.5):
        target = target.masked_fill(d.mask(rows, probability=0.3), ignore)
    if outside:
        for value in (vocabulary, -1, 2**31 - 1):
            if value != ignore:
                target = target.masked_fill(d.mask(rows, probability=0.2), value)
    return d.strided(target)


def draw_temperature(d: Draw, rows: int, tensors: dict, options: dict) -> None:
    """None, a number, a tensor [] or [rows]; from very cold to very hot."""
    kind = d.pick("none", "number", "number", "one", "rows", "rows")
    low, high = d.pick((-0.3, 0.3), (-0.3, 0.3), (-3, 3))
    if kind == "number":
        options["temperature"] = d.pick(1.0, d.power(low, high))
    elif kind != "none":
        shape = () if kind == "one" else (rows,)
        temperature = torch.tensor(
            [d.power(low, high) for _ in range(math.prod(shape))], dtype=d.pick(torch.float32, d.dtype())
        )
        temperature = temperature.reshape(shape)
        tensors["temperature"] = temperature.reshape(()).expand(()) if kind == "one" else d.strided(temperature)


def draw_upstream(d: Draw, rows: int, entropy: bool, wide: torch.dtype) -> dict[str, Tensor]:
    names = [n for n, there in (("logp", d.chance(0.9)), ("entropy", entropy and d.chance(0.8))) if there]
    return {n: d.upstream((rows,), wide) for n in names or ["logp"]}


def ignore_index(d: Draw, vocabulary: int, options: dict) -> int:
    if d.chance(0.3):
        options["ignore_index"] = d.pick(-1, 0, vocabulary - 1, -100, 7)
    return options.get("ignore_index", -100)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def idle_rows(d: Draw, rows: int, target: Tensor, ignore: int, upstream: dict[str, Tensor]) -> Tensor:
    """Rows that nobody may look at for a gradient."""
    moved = torch.zeros(rows, dtype=torch.bool)
    for g in upstream.values():
        moved |= g != 0
    return (target == ignore) | ~moved


# ---------------------------------------------------------------------------------------------- selected_logprob


def draw_selected(d: Draw) -> Case:
    dtype = d.dtype()
    rows, vocabulary = d.size(0, 9, 300), d.size(1, 40, 3000)
    options, tensors = {}, {}
    entropy = options["entropy"] = d.chance(0.5)
    ignore = ignore_index(d, vocabulary, options)
    draw_temperature(d, rows, tensors, options)
    target = draw_targets(d, rows, vocabulary, ignore, d.chance(0.15))
    upstream = draw_upstream(d, rows, entropy, wide(dtype))
    logits = d.normal(rows, vocabulary, scale=d.pick(1.0, 1.0, 1e-3, 30.0, 1e3), dtype=dtype)
    if d.chance(0.2):
        logits = logits + d.pick(-1.0, 1.0) * d.pick(100.0, 3e4)
    if d.chance(0.2):  # banned tokens, never a whole row
        logits = d.scattered(logits, -math.inf, 0.4).index_fill(1, torch.tensor([0]), 0.5)
    if d.chance(0.2):
        logits = d.junk(logits, idle_rows(d, rows, target, ignore, upstream))
    if d.chance(0.1):
        logits = logits.round()  # ties
    tensors |= {"logits": d.strided(logits.to(dtype)), "target": target}
    return Case(tensors, options, d.learns("logits"), upstream, facts={"dtype": dtype}, large=d.large)


def call_selected(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    more = {"temperature": t["temperature"]} if "temperature" in t else {}
    return ops.selected_logprob(t["logits"], t["target"], **more, **case.options, backend=backend)._asdict()


def given_scores(case: Case, t: dict[str, Tensor | None], rows: Tensor) -> Tensor:
    return t["logits"][rows]


def selected_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return by_rows(case, lambda rows: given_scores(case, t, rows), t)


# ------------------------------------------------------------------------------------------------ linear_logprob


def draw_head(d: Draw, rows: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """(tensors, options) of a head without its targets."""
    vocabulary = d.size(1, 40, 900)
    width = 16 * d.size(1, 3, 6) if d.chance(0.6) else d.size(0, 20, 90)
    scale = d.pick(1.0, 1.0, 0.1, 4.0)
    options: dict = {}
    tensors = {
        "hidden": d.normal(rows, width, scale=scale, dtype=dtype),
        "weight": d.normal(vocabulary, width, scale=d.pick(1.0, 0.3, 1.0), dtype=dtype),
    }
    if d.chance(0.15):  # all in one direction: scores as far apart as the numbers allow
        size = d.pick(3.0, 10.0, 30.0)
        signs = torch.where(d.mask(vocabulary, 1), 1.0, -1.0).to(dtype)
        tensors["hidden"] = torch.full((rows, width), size, dtype=dtype)
        tensors["weight"] = (signs * size).expand(vocabulary, width).clone()
    if d.chance(0.4):
        options["softcap"] = d.pick(30.0, 30.0, 5.0, 0.5, 200.0)
    if d.chance(0.5):
        bias = d.normal(vocabulary, scale=d.pick(1.0, 10.0), dtype=dtype)
        if d.chance(0.4):
            bias = d.scattered(bias, -math.inf, 0.4)
            bias[0] = 0.25
        tensors["bias"] = bias
    if dtype in (torch.bfloat16, torch.float16) and d.chance(0.25):  # as under autocast
        for name in ("weight", "bias"):
            if name in tensors and d.chance(0.7):
                tensors[name] = tensors[name].float() * 1.0001
    draw_temperature(d, rows, tensors, options)
    return tensors, options


def collect(d: Draw, tensors: dict) -> dict[str, str]:
    """Now and then the weight's gradient goes into a buffer that holds something."""
    if not d.chance(0.25):
        return {}
    shape = tensors["weight"].shape
    tensors["weight_grad_out"] = d.normal(*shape, dtype=d.pick(torch.float32, torch.float64))
    return {"weight_grad_out": "weight"}


def draw_linear(d: Draw) -> Case:
    dtype = d.dtype()
    rows = d.size(0, 12, 300)
    tensors, options = draw_head(d, rows, dtype)
    vocabulary = tensors["weight"].shape[0]
    entropy = options["entropy"] = d.chance(0.5)
    options["save"] = d.pick("auto", "logits", "recompute")
    if options["save"] == "auto" and d.chance(0.3):
        options["save_limit_bytes"] = d.pick(0, rows * vocabulary * 2, 10**6)
    ignore = ignore_index(d, vocabulary, options)
    tensors["target"] = draw_targets(d, rows, vocabulary, ignore, d.chance(0.15))
    upstream = draw_upstream(d, rows, entropy, wide(dtype))
    if d.chance(0.2):
        idle = idle_rows(d, rows, tensors["target"], ignore, upstream)
        tensors["hidden"] = d.junk(tensors["hidden"], idle)
    buffers = collect(d, tensors)
    tensors = {name: x if name == "target" else d.strided(x) for name, x in tensors.items()}
    learns = d.learns("hidden", "weight", *["bias"] * ("bias" in tensors))
    return Case(tensors, options, learns, upstream, buffers, facts={"dtype": dtype}, large=d.large)


def call_linear(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    more = {name: t[name] for name in ("bias", "temperature", "weight_grad_out") if name in t}
    return ops.linear_logprob(t["hidden"], t["weight"], t["target"], **more, **case.options, backend=backend)._asdict()


def head_scores(case: Case, t: dict[str, Tensor | None], rows: Tensor) -> Tensor:
    w = t["weight"]
    if case.tensors["weight"].dtype != case.dtype:  # a float32 matrix is rounded for the product; gradients pass
        w = w + (w.detach().to(case.dtype).to(w.dtype) - w.detach())
    z = t["hidden"][rows] @ w.to(t["hidden"].dtype).T
    return z if t.get("bias") is None else z + t["bias"].to(z.dtype)


def linear_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return by_rows(case, lambda rows: head_scores(case, t, rows), t)


def head_backends(case: Case) -> list[str]:
    width = case.tensors["hidden"].shape[1]
    fits = case.dtype != torch.float64 and width > 0 and width % 16 == 0 and not case.large
    return ["reference", *["triton"] * fits]


# -------------------------------------------------------------------------------------------- linear_policy_loss


def draw_linear_loss(d: Draw) -> Case:
    dtype = d.dtype()
    lengths, rows = policies.draw_lengths(d)
    tensors, options = draw_head(d, rows, dtype)
    vocabulary = tensors["weight"].shape[0]
    ignore = ignore_index(d, vocabulary, options)
    target = tensors["target"] = draw_targets(d, rows, vocabulary, ignore, d.chance(0.05))
    if "bias" in tensors:  # a token that was sampled was not banned
        tensors["bias"][target[(target >= 0) & (target < vocabulary)].long()] = 0.25
    with torch.no_grad():
        exact = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
        found = linear_formula(Case(tensors, {**options, "entropy": True}, facts={"dtype": dtype}), exact)
    chosen = policies.draw_options(d, tensors, lengths, rows, found["logp"], dtype, tensors["target"] != ignore)
    options |= chosen
    if d.chance(0.3):
        options["entropy"] = True
    buffers = collect(d, tensors)
    one = bool(buffers) or d.chance(0.5)
    upstream = {"loss": torch.ones((), dtype=wide(dtype)) if one else d.upstream((), wide(dtype))}
    tensors = {name: x if name == "target" else d.strided(x) for name, x in tensors.items()}
    learns = d.learns("hidden", "weight", *["bias"] * ("bias" in tensors))
    facts = {"dtype": dtype, "logp_out": d.chance(0.3), "borders": tensors["cu_seqlens"].tolist()}
    return Case(tensors, options, learns, upstream, buffers, facts=facts, large=d.large)


def call_linear_loss(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    more = {k: x for k, x in t.items() if k not in ("hidden", "weight", "target", "advantage", "cu_seqlens")}
    if case.facts["logp_out"]:
        more["logp_out"] = torch.full(t["target"].shape, 7.0, dtype=wide(case.dtype))
    if t["cu_seqlens"].is_meta and case.options.get("loss") in policies.SEQUENCE:
        more["borders"] = case.facts["borders"]  # which cannot be read from there
    loss, stats = ops.linear_policy_loss(
        t["hidden"], t["weight"], t["target"], t.get("advantage"), t["cu_seqlens"], **more, **case.options,
        backend=backend,
    )  # fmt: skip
    given = {"logp_out": more["logp_out"]} if case.facts["logp_out"] else {}
    return {"loss": loss, **stats._asdict(), **given}


def linear_loss_formula(
    case: Case, t: dict[str, Tensor | None], change: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Tensor]:
    o, ignore = case.options, case.options.get("ignore_index", -100)
    coefficient = o.get("entropy_coef", 0.0)
    reports = o.get("entropy", False) or coefficient != 0.0
    kept = t["target"] != ignore
    if t.get("mask") is not None:
        kept = kept & (t["mask"] != 0)
    active = kept & (torch.arange(len(kept)) < t["cu_seqlens"][-1])
    # Only rows that take part stand in the graph.
    head = {k: o[k] for k in ("softcap", "temperature", "ignore_index") if k in o} | {"entropy": reports}
    moved = {"logp": active.double(), "entropy": active.double()}
    found = linear_formula(Case(case.tensors, head, upstream=moved, facts=case.facts), t)
    entropies = change(found["entropy"]) if reports else None
    columns = {**t, "logp": change(found["logp"]), "mask": kept, "entropy": entropies}
    given = {"logp_out": found["logp"].detach()} if case.facts["logp_out"] else {}
    return policies.formula(Case(case.tensors, o), columns) | given


def linear_loss_terms(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The loss with the gradient that the targets' own scores alone would give: see `of_targets`. Of the entropy too,
    whose slope p (log p + H) is as exact as a sum of exponentials near 1."""
    own = of_targets(head_scores)(case, t)["logp"].nan_to_num(0.0, 0.0, 0.0)
    return linear_loss_formula(case, t, lambda x: x.detach() + own - own.detach())


def linear_loss_sizes(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The mean of differences of log-probabilities is as exact as these are, which err the same way where rows are
    alike; an entropy near 0 is that of a sum of exponentials near 1."""
    head = {k: case.options[k] for k in ("softcap", "temperature", "ignore_index") if k in case.options}
    with torch.no_grad():
        logp = linear_formula(Case(case.tensors, head, upstream={}, facts=case.facts), t)["logp"]
    usual = logp[logp.isfinite() & (logp > -1e4)]
    return {"approx_kl": usual.abs().amax() if len(usual) else logp.new_zeros(()), "entropy": logp.new_ones(())}


OPS = [
    Op(
        SELECTED,
        draw_selected,
        call_selected,
        selected_formula,
        lambda case: ["reference", "native"],
        1.0,
        of_targets(given_scores),
    ),
    Op(LINEAR, draw_linear, call_linear, linear_formula, head_backends, 1.0, of_targets(head_scores)),
    Op(
        LINEAR_LOSS,
        draw_linear_loss,
        call_linear_loss,
        linear_loss_formula,
        head_backends,
        terms=linear_loss_terms,
        sizes=linear_loss_sizes,
    ),
]
