"""The options of the policy losses: one frozen object, checked when it is made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks
from .reference.aggregation import LOSSES, OF_LOSS, SEQ_MEAN_TOKEN_SUM_NORM

OP = "policy_loss"
KL = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CLIP_OF_LOSS = {
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "gspo_token": (3e-4, 4e-4),
    "dr_grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2),
    "cispo": (1.0, 4.0),
}
TWO_SIDED = ("grpo", "dapo", "dr_grpo", "bnpo")
# Names in other codes and their equivalents here; tests/ops/test_other_names.py checks that each is equivalent.
_PPO = "use loss='grpo' with aggregation='token_mean' and old_logp"
_REINFORCE = "it has no ratio: use loss='grpo' with old_logp=None, which has the same gradient"
_GMPO = "its clip acts on tokens before their geometric mean; use loss='gspo', the same where nothing is clipped"
ELSEWHERE = {
    "ppo": f"{_PPO}; advantages of a value function go in as token_advantage",
    "vanilla": _PPO,
    "reinforce": _REINFORCE,
    "gpg": _REINFORCE,
    "rloo": f"{_REINFORCE}, and advantages of group_advantage(normalize='leave_one_out')",
    "reinforce++": f"{_PPO}, and advantages of group_advantage(normalize='batch') (REINFORCE++-baseline)",
    "geo_mean": _GMPO,
    "gmpo": _GMPO,
}
KL_ELSEWHERE = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "kl+": "k1+", "low_var_kl+": "k3+", "mse+": "k2"}

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class PolicyLossOptions:
    """The arguments of ``policy_loss`` and ``linear_policy_loss`` that are not tensors; ``policy_loss`` explains them.

    One object serves every call of a run; its values are checked once, here.

    Raises ValueError or NotImplementedError for values and combinations that no loss has.
    """

    loss: str = "grpo"
    clip: tuple[float, float] | None = None
    delta: float | None = None
    dual_clip: float | None = None
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    aggregation: str | None = None
    norm_length: float | Tensor | None = None
    entropy_coef: float = 0.0
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_importance: bool = False

    def __post_init__(self) -> None:
        _check_loss(self)
        _check_bounds(self)
        _check_kl(self.kl)
        checks.number(OP, "entropy_coef", self.entropy_coef)
        checks.number(OP, "kl_coef", self.kl_coef)
        checks.flag(OP, "kl_importance", self.kl_importance)

    @property
    def aggregates(self) -> str:
        """The aggregation; without one, the loss's default."""
        return OF_LOSS[self.loss][0] if self.aggregation is None else self.aggregation

    @property
    def clips(self) -> tuple[float, float]:
        """(lo, hi); without ``clip`` the loss's default; (0, 0) for sapo, which has none."""
        return CLIP_OF_LOSS.get(self.loss, (0.0, 0.0)) if self.clip is None else self.clip

    @property
    def bound(self) -> float | None:
        """Largest ratio where A < 0: ``dual_clip`` or ``delta``."""
        return self.dual_clip if self.delta is None else self.delta


NAMES = tuple(field.name for field in fields(PolicyLossOptions))
_remembered = functools.lru_cache(maxsize=256, typed=True)(PolicyLossOptions)


def spelled_out(function: F) -> F:
    """Let ``help`` and ``inspect.signature`` list the options in the place of ``**settings`` of ``function``."""
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = inspect.signature(PolicyLossOptions).parameters.values()
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
    function.__signature__ = signature.replace(parameters=[*given, *options])
    return function


def gather(function: Callable, options: PolicyLossOptions | None, settings: dict[str, Any]) -> PolicyLossOptions:
    """The options of a call of ``function``, as an object or from its keywords.

    Raises TypeError for an unknown keyword or one beside an object, and the errors of `PolicyLossOptions`.
    """
    if options is not None:
        if not isinstance(options, PolicyLossOptions):
            raise TypeError(f"{function.__name__}: options must be PolicyLossOptions, got {type(options).__name__}")
        if settings:
            raise TypeError(
                f"{function.__name__}: got options and {', '.join(settings)}; change the object with "
                "dataclasses.replace, or pass keywords alone"
            )
        return options
    for name in settings:
        if name not in NAMES:
            raise TypeError(_unknown(function, name))
    # No cache while compiling, because compilers warn about it; none for a tensor, because it would stay alive there.
    if torch.compiler.is_compiling() or isinstance(settings.get("norm_length"), Tensor):
        return PolicyLossOptions(**settings)
    try:
        return _remembered(**settings)
    except TypeError:  # something unhashable, a list for example
        return PolicyLossOptions(**settings)


def _unknown(function: Callable, name: str) -> str:
    known = list(inspect.signature(function).parameters)
    near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{function.__name__}: no argument {name!r}; the nearest is {near!r}"


def _check_loss(o: PolicyLossOptions) -> None:
    checks.choice(OP, "loss", o.loss, (*LOSSES, *ELSEWHERE), shown=LOSSES)
    if o.loss in ELSEWHERE:
        raise NotImplementedError(f"{OP}: loss={o.loss!r} is not offered: {ELSEWHERE[o.loss]}")
    allowed = OF_LOSS[o.loss]
    if o.aggregates not in allowed:
        raise ValueError(f"{OP}: loss={o.loss!r} with aggregation={o.aggregation!r}; it allows {', '.join(allowed)}")
    if (o.aggregates == SEQ_MEAN_TOKEN_SUM_NORM) != (o.norm_length is not None):
        need = "needs norm_length, the constant it divides by" if o.norm_length is None else "does not use norm_length"
        raise ValueError(f"{OP}: aggregation={o.aggregates!r} {need}")
    if o.norm_length is not None:
        checks.scalar(OP, "norm_length", o.norm_length, None)


def _check_bounds(o: PolicyLossOptions) -> None:
    if o.loss == "sapo" and o.clip is not None:
        raise ValueError(f"{OP}: loss='sapo' has no clip range; its softness is sapo_temperature")
    _pair("clip", o.clips, strict=False)
    _pair("sapo_temperature", o.sapo_temperature, strict=True)
    if o.delta is not None and o.dual_clip is not None:
        raise ValueError(f"{OP}: delta and dual_clip are one bound under two names; pass one of them")
    for name, bound, least in (("delta", o.delta, 1.0 + o.clips[1]), ("dual_clip", o.dual_clip, 1.0)):
        if bound is not None:
            if o.loss not in TWO_SIDED:
                raise ValueError(f"{OP}: loss={o.loss!r} has no {name}; only {', '.join(TWO_SIDED)} have")
            checks.number(OP, name, bound, low=least, strict=True)


def _check_kl(kl: str) -> None:
    checks.choice(OP, "kl", kl, (*KL, *KL_ELSEWHERE, "k2+", "full"), shown=KL)
    if kl in KL_ELSEWHERE:
        raise ValueError(f"{OP}: kl={kl!r} is called {KL_ELSEWHERE[kl]!r} here")
    if kl == "k2+":
        raise ValueError(f"{OP}: kl='k2+' is kl='k2': straight through means the gradient of k2, which it has already")
    if kl == "full":
        raise NotImplementedError(f"{OP}: kl='full' needs both distributions over the vocabulary; use 'k3'")


def _pair(name: str, value: object, *, strict: bool) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{OP}: {name} must be a pair of numbers, got {value!r}")
    for part in value:
        checks.number(OP, name, part, low=0.0, strict=strict)
