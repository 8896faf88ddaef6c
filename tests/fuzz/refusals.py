"""Arguments of a wrong kind, one at a time: each is refused with the op's and the argument's name, or is legitimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prism_fast import ops

N, B, H, V, E, T = 6, 2, 16, 5, 3, 4
CU = torch.tensor([0, 4, 6], dtype=torch.int32)
REFUSED = (ValueError, NotImplementedError, TypeError)


def floats(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


LAYOUT = ops.PrefixLayout(
    cu_branch=torch.tensor([0, 2, 3, 4], dtype=torch.int32),
    prefix_start=torch.tensor([0], dtype=torch.int32),
    prefix_len=torch.tensor([2], dtype=torch.int32),
    branch_prefix=torch.tensor([-1, 0, 0], dtype=torch.int32),
    max_prefix=2,
    max_branch=2,
)


def calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """op -> (function, valid arguments)."""
    head = {
        "hidden": floats(N, H), "weight": floats(V, H), "target": torch.arange(N) % V, "bias": floats(V),
        "temperature": 1.5, "softcap": 30.0, "ignore_index": -100, "weight_grad_out": None, "backend": None,
    }  # fmt: skip
    policy = {
        "advantage": floats(B), "cu_seqlens": CU, "old_logp": floats(N), "token_advantage": None, "loss": "grpo",
        "clip": (0.2, 0.2), "delta": None, "dual_clip": 3.0, "sapo_temperature": (1.0, 1.0),
        "aggregation": "token_mean", "denominator": 6, "norm_length": None, "entropy_coef": 0.1,
        "ref_logp": floats(N), "kl": "k3", "kl_coef": 0.1, "is_weight": floats(N).abs(),
        "mask": torch.ones(N, dtype=torch.bool), "backend": None,
    }  # fmt: skip
    routing = ops.route_experts(floats(T, E), 2, backend="reference")
    return {
        "selected_logprob": (
            ops.selected_logprob,
            {"logits": floats(N, V), "target": torch.arange(N) % V, "temperature": 1.5, "entropy": True,
             "ignore_index": -100, "backend": None},
        ),
        "linear_logprob": (
            ops.linear_logprob, head | {"entropy": True, "save": "auto", "save_limit_bytes": 1 << 20}
        ),
        "linear_policy_loss": (
            ops.linear_policy_loss,
            head | policy | {"loss": "gspo", "dual_clip": None, "aggregation": None, "entropy": True,
                             "borders": [0, 4, 6], "logp_out": None},
        ),
        "linear_cross_entropy": (
            ops.linear_cross_entropy,
            {k: x for k, x in head.items() if k not in ("temperature", "softcap")}
            | {"reduction": "mean", "denominator": 6, "label_smoothing": 0.1, "z_loss": 0.1},
        ),
        "policy_loss": (ops.policy_loss, {"logp": floats(N), "entropy": floats(N).abs()} | policy),
        "group_advantage": (
            ops.group_advantage,
            {"scores": floats(N, 2), "group": torch.arange(N) // 3, "weights": [0.5, 0.5],
             "valid": torch.ones(N, dtype=torch.bool), "gate": floats(N), "offset": floats(N),
             "normalize": "per_score", "eps": 1e-6, "invalid": "exclude", "invalid_penalty": 0.5, "singleton": "zero",
             "power": 1.0, "per_score": False, "backend": None},
        ),
        "importance_weights": (
            ops.importance_weights,
            {"rollout_logp": floats(N), "logp": floats(N), "cu_seqlens": CU, "mode": "token_mask", "low": 0.5,
             "high": 2.0, "backend": None},
        ),
        "pairwise_loss": (
            ops.pairwise_loss,
            {"teacher": floats(2, 2), "student": floats(N, 2), "group": torch.arange(N) % 2,
             "valid": torch.ones(N, dtype=torch.bool), "clip": 5.0,
             "lengths": (torch.ones(2, 2), torch.ones(N, 2)), "length_penalty": 0.1, "l2": 0.1, "spread": 0.1,
             "denominator": 6, "l2_denominator": 16, "backend": None},
        ),
        "route_experts": (
            ops.route_experts, {"router_logits": floats(T, E), "top_k": 2, "renormalize": True, "backend": None}
        ),
        "plan_experts": (
            ops.plan_experts,
            {"top_k_index": routing.experts, "top_k_weights": routing.weights, "num_experts": E, "backend": None},
        ),
        "moe_experts": (
            ops.moe_experts,
            {"hidden": floats(T, H), "gate_up": floats(E, 16, H), "down": floats(E, H, 8), "routing": routing,
             "recompute": False, "backend": None},
        ),
        "shared_prefix_attention": (
            ops.shared_prefix_attention,
            {"q": floats(T, 2, 8), "k": floats(T, 1, 8), "v": floats(T, 1, 8), "layout": LAYOUT, "scale": 0.3,
             "backend": None},
        ),
    }  # fmt: skip


# kind -> (what is passed, given the valid argument; the argument is left alone where this gives `SKIP`)
SKIP = object()


def of_tensor(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda value: change(value) if isinstance(value, Tensor) else SKIP


def of_number(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    numeric = (int, float)
    return lambda v: change(v) if isinstance(v, numeric) and not isinstance(v, bool) else SKIP


JUNK: dict[str, Callable[[Any], Any]] = {
    "None": lambda value: SKIP if value is None else None,
    "a string": lambda value: "junk",
    "a list of a string": lambda value: ["junk"],
    "an object": lambda value: object(),
    "a dict": lambda value: {},
    "an empty list": lambda value: [],
    "a bool": lambda value: SKIP if isinstance(value, bool) else True,
    "one and a half": lambda value: 1.5,
    "a complex number": lambda value: 1j,
    "NaN": lambda value: math.nan,
    "infinity": lambda value: math.inf,
    "a negative number": of_number(lambda value: -3),
    "a tensor [2, 3, 1, 1, 2]": lambda value: torch.zeros(2, 3, 1, 1, 2),
    "a tensor [7]": lambda value: torch.ones(7),
    "its list": of_tensor(lambda value: value.tolist()),
    "its array": of_tensor(lambda value: value.numpy()),
    "one row more": of_tensor(lambda value: torch.cat((value, value[:1])) if value.dim() else value[None]),
    "one row less": of_tensor(lambda value: value[:-1]),
    "a column": of_tensor(lambda value: value[..., None]),
    "complex": of_tensor(lambda value: value.to(torch.complex64)),
    "int8": of_tensor(lambda value: value.to(torch.int8)),
    "float for integers": of_tensor(lambda value: SKIP if value.is_floating_point() else value.float()),
    "integers for float": of_tensor(lambda value: value.long() if value.is_floating_point() else SKIP),
    "meta": of_tensor(lambda value: value.to("meta")),
}
# What is no junk for the argument: (op or "", argument, kind). Everything else has to be refused.
LEGITIMATE = {
    *(("", name, "None") for name in (
        "bias", "softcap", "old_logp", "delta", "dual_clip", "aggregation", "denominator", "ref_logp", "is_weight",
        "mask", "valid", "gate", "offset", "clip", "l2_denominator", "scale",
    )),
    ("linear_policy_loss", "borders", "None"),
    *(("", name, kind) for name in ("softcap", "temperature", "power", "eps", "clip", "low", "high", "l2", "spread",
                                    "length_penalty", "denominator", "l2_denominator", "norm_length", "dual_clip",
                                    "entropy_coef", "kl_coef", "scale", "invalid_penalty", "save_limit_bytes", "z_loss")
      for kind in ("one and a half",)),
    *(("", name, "a negative number") for name in ("ignore_index", "entropy_coef", "kl_coef", "invalid_penalty",
                                                   "length_penalty", "scale")),
    *(("route_experts", "router_logits", kind) for kind in ("one row more", "one row less", "meta")),
    *(("importance_weights", "cu_seqlens", kind) for kind in ("one row more", "one row less")),  # other sequences
    ("", "mask", "float for integers"),
    ("linear_logprob", "save_limit_bytes", "None"),
    ("", "mask", "integers for float"),
}  # fmt: skip


def with_value(x: Tensor, at: int, value: int) -> Tensor:
    changed = x.clone()
    changed[at] = value
    return changed


def of_the_layout(name: str, at: int, value: Callable[[ops.PrefixLayout, int], int]) -> Callable:
    """Change one number of a tensor that is not empty."""

    def change(layout: ops.PrefixLayout, tokens: int) -> ops.PrefixLayout | None:
        x = getattr(layout, name)
        return layout._replace(**{name: with_value(x, at, value(layout, tokens))}) if len(x) else None

    return change


def past_the_end(layout: ops.PrefixLayout, tokens: int) -> ops.PrefixLayout | None:
    cu = layout.cu_branch
    return layout._replace(cu_branch=with_value(cu, -1, tokens + 1)) if len(cu) > 1 else None


def longer_prefix(layout: ops.PrefixLayout, tokens: int) -> ops.PrefixLayout | None:
    if not (layout.prefix_len > 0).any():
        return None
    at = int(layout.prefix_len.argmax())
    return layout._replace(prefix_len=with_value(layout.prefix_len, at, int(layout.prefix_len[at]) + 1))


def too_small(name: str, needed: Callable[[ops.PrefixLayout], int]) -> Callable:
    """A bound one below what the layout needs, where it needs any."""

    def change(layout: ops.PrefixLayout, tokens: int) -> ops.PrefixLayout | None:
        least = needed(layout)
        return layout._replace(**{name: least - 1}) if least > 0 else None

    return change


def backwards(layout: ops.PrefixLayout, tokens: int) -> ops.PrefixLayout | None:
    cu = layout.cu_branch
    return layout._replace(cu_branch=with_value(cu, -2, int(cu[-1]) + 1)) if len(cu) > 2 else None


def most_queries(layout: ops.PrefixLayout) -> int:
    lengths = layout.cu_branch.diff()
    seen = [int(lengths[layout.branch_prefix == p].sum()) * int(n > 0) for p, n in enumerate(layout.prefix_len)]
    return max(seen, default=0)


# How the message goes on -> layout and tokens to a layout that does not fit, None where this one has no such fault.
BAD_LAYOUTS: dict[str, Callable[[ops.PrefixLayout, int], ops.PrefixLayout | None]] = {
    "cu_branch must start with 0": of_the_layout("cu_branch", 0, lambda layout, tokens: -1),
    "cu_branch must not decrease": backwards,
    "cu_branch must end within": past_the_end,
    "branch_prefix must be": of_the_layout("branch_prefix", 0, lambda layout, tokens: len(layout.prefix_start)),
    "prefix_len must not be negative": of_the_layout("prefix_len", 0, lambda layout, tokens: -1),
    "prefix_start and prefix_len must be": longer_prefix,
    "max_prefix=": too_small("max_prefix", lambda layout: max(layout.prefix_len.tolist(), default=0)),
    "max_branch=": too_small("max_branch", lambda layout: max(layout.cu_branch.diff().tolist(), default=0)),
    "max_queries=": too_small("max_queries", most_queries),
}


# Kinds that are wrong beside the other arguments only, and ops that hand arguments on to others.
TOGETHER = ("one row more", "one row less", "meta", "None")
PARTS = {"linear_policy_loss": ("policy_loss",)}


def legitimate(op: str, name: str, kind: str) -> bool:
    return (op, name, kind) in LEGITIMATE or ("", name, kind) in LEGITIMATE


def attempt(op: str, name: str, kind: str, backend: str | None) -> str | None:
    """What is wrong with the answer to one argument of a wrong kind."""
    function, given = calls()[op]
    value = JUNK[kind](given[name])
    if value is SKIP or legitimate(op, name, kind):
        return None
    given = given | {name: value} | ({} if name == "backend" else {"backend": backend})
    try:
        function(**given)
    except REFUSED as error:
        text = str(error)
        if not text.startswith(tuple(f"{named}:" for named in (op, *PARTS.get(op, ())))):
            return f"{type(error).__name__} does not begin with the op's name: {text[:160]}"
        # Of two arguments that do not fit together the message may name the other one.
        named = ("",) if kind == "meta" else function_arguments(op) if kind in TOGETHER else (name,)
        return None if any(n in text for n in named) else f"{type(error).__name__} names no {name}: {text[:160]}"
    except Exception as error:
        return f"{type(error).__name__} instead of a refusal: {str(error)[:160]}"
    return "is taken in silence"


def function_arguments(op: str) -> tuple[str, ...]:
    return tuple(calls()[op][1])


def attempts(op: str) -> list[tuple[str, str]]:
    _, given = calls()[op]
    return [(name, kind) for name in given for kind in JUNK if JUNK[kind](given[name]) is not SKIP]
