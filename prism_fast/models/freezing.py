"""Weights that do not learn, chosen by patterns over parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters whose names match one of ``patterns`` (globs: ``*``, ``?``, ``[ab]``), in place.

    A frozen parameter gets no gradient, no master and no moments, and is exported with the bits that it was loaded
    with. A tied parameter is frozen by either of its names.

    Returns:
        The names of all parameters that match.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found = matching(named, patterns, "model.freeze", "parameter")
    for name in found:
        named[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model.freeze {list(patterns)} matches every parameter: nothing is left to train")
    return found


def matching(names: Iterable[str], patterns: Sequence[str], key: str, kind: str) -> list[str]:
    """The ``names`` that match one of ``patterns``, in their order.

    Raises:
        ValueError: a pattern matches none; ``key`` and ``kind`` are for its message.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            middle = names[len(names) // 2] if names else "none"
            raise ValueError(f"{key}: {pattern!r} matches no {kind}; the model's are named like {names[0]} or {middle}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers learn, and how many the model holds in all; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
