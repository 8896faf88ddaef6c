"""What the fuzz knows of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .draw import Case, Draw, Formula


class Op(NamedTuple):
    """``call(case, tensors, backend)`` runs the op itself; ``formula(case, tensors)`` is written from its docstring and
    its papers, knows nothing of the package, and computes in whatever dtype its tensors have. Both give results by
    name. ``forward``: c of the accuracy contract for half-precision results (2 otherwise, and for gradients).
    ``terms``: a formula whose gradients say how large the terms are that cancel in the op's; ``sizes``: the same of
    results, by name. ``fused``: the same
    results and gradients in an order of steps that is less exact, where the docstring says that backends other than
    "reference" take it."""

    name: str
    draw: Callable[[Draw], Case]
    call: Callable[[Case, dict[str, Tensor | None], str | None], dict[str, Tensor]]
    formula: Formula
    backends: Callable[[Case], list[str]]
    forward: float = 2.0
    terms: Formula | None = None
    fused: Formula | None = None
    sizes: Callable[[Case, dict[str, Tensor | None]], dict[str, Tensor]] | None = None
