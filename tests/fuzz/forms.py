"""The same calls in other forms: on meta tensors, in a compiled graph, under forward mode, functorch, double backward.

A backend without a form refuses it by name: which op, which backend, what to do. A derivative is never dropped in
silence.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_map

from .contract import complaint
from .draw import Case, Draw
from .op import Op
from .run import as_computed, as_given, by_formula, by_op, differentiate, leaves, references, widened
from .surroundings import small

FORMS = ("meta", "compiled", "forward mode", "functorch", "double backward")


def run(op: Op, seed: int, number: int, form: str) -> list[tuple[str, str]]:
    """(backend, what is wrong) of one case in one form."""
    case = op.draw(Draw(seed, op.name, number, cap=6))
    faults = []
    for backend in op.backends(case):
        if backend == "triton" or (form == "meta" and backend != "reference"):
            continue
        with small(number):
            text = CHECKS[form](op, case, None if form == "meta" else backend)
        if text is not None:
            faults.append((backend, f"case {number}: {text}"))
    return faults


def on_meta(op: Op, case: Case, backend: str | None) -> str | None:
    """Shapes and dtypes come from shapes and dtypes alone, forward and backward; or the op refuses by its name."""

    def moved(x):
        return x.to("meta") if isinstance(x, Tensor) else x

    there = dataclasses.replace(
        case, tensors=tree_map(moved, case.tensors), upstream=tree_map(moved, case.upstream),
        facts=tree_map(moved, case.facts),
    )  # fmt: skip
    try:
        found = by_op(op, there, backend)
    except NotImplementedError as error:
        return None if str(error).startswith(f"{op.name}: ") else f"refused without the op's name: {error}"
    wanted = by_op(op, case, "reference")
    for part in ("results", "gradients"):
        for name, x in getattr(wanted, part).items():
            y = getattr(found, part)[name]
            if y.device.type != "meta" or y.shape != x.shape or y.dtype != x.dtype:
                return f"{part} {name}: {y.dtype}{list(y.shape)} on {y.device}, elsewhere {x.dtype}{list(x.shape)}"
    return None


def compiled(op: Op, case: Case, backend: str | None) -> str | None:
    """One graph, forward and backward, within the same contract."""
    torch._dynamo.reset()
    truth, eagers = references(op, case)
    call = torch.compile(lambda t: op.call(case, t, backend), fullgraph=True, backend="aot_eager", dynamic=False)
    tensors = as_given(case)
    results = call(tensors)
    gradients = differentiate(results, tensors, case)
    for name, true in truth.results.items():
        text = complaint(results[name].detach(), true, [e.results[name] for e in eagers], 3.0)
        if text is not None:
            return f"{name}: {text}"
    terms = by_formula(op, case, widened, op.terms).gradients if op.terms else {}
    for name, true in truth.gradients.items():
        ours = tensors[name] if name in case.buffers else gradients[name]
        text = complaint(ours, true, [e.gradients[name] for e in eagers], 3.0, terms.get(name))
        if text is not None:
            return f"d {name}: {text}"
    return None


def total(case: Case, results: dict[str, Tensor]) -> Tensor:
    """One number of all results that get a gradient; wide, for a sum in half precision may be endless."""
    parts = [(results[n].double() * case.upstream[n].to(results[n].dtype).double()).sum() for n in case.upstream]
    return sum(parts[1:], parts[0])


def directions(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(case.tensors[n].shape, generator=generator, dtype=torch.float64) for n in case.learns}


def refused(op: Op, error: Exception) -> str | None:
    """What is wrong with a refusal."""
    text = str(error)
    named = isinstance(error, NotImplementedError) and text.startswith(f"{op.name}: backend=")
    if named and re.search(r"; pass \w+=|compose it of torch operations", text):
        return None
    return f"no refusal by op, backend and cure: {type(error).__name__}: {text[:200]}"


def tangent_of(call: Callable, case: Case, tensors: dict[str, Tensor | None]) -> float | None:
    along = directions(case)
    with forward_ad.dual_level():
        given = {n: x.detach() for n, x in tensors.items()}
        for n in case.learns:
            given[n] = forward_ad.make_dual(given[n], along[n].to(given[n].dtype))
        found = forward_ad.unpack_dual(total(case, call(given))).tangent
    return None if found is None else float(found)


def under_forward_mode(op: Op, case: Case, backend: str | None) -> str | None:
    """A tangent goes in: the right one comes out, or the op says that it has none."""
    if not case.learns:
        return None
    truth = by_formula(op, case, widened).gradients
    if any(name in case.buffers for name in truth):
        return None
    along = directions(case)
    wanted = sum(float((truth[n] * along[n]).sum()) for n in case.learns)
    try:
        tangent = tangent_of(lambda t: op.call(case, t, backend), case, case.tensors)
    except Exception as error:
        return refused(op, error)
    if wanted == 0.0 or wanted != wanted:
        return None
    if tangent is None:
        return "the tangent is dropped in silence"
    # Gradients are what is left of upstream gradients that cancel, and tangents of what lies before these.
    size = sum(float((truth[n] * along[n]).abs().sum()) for n in case.learns)
    above = max(float(g.abs().max()) if g.numel() else 0.0 for g in case.upstream.values())
    size += above * sum(float(along[n].abs().sum()) for n in case.learns)
    kinds = (case.dtype, *(case.tensors[n].dtype for n in case.learns))
    allowed = 100.0 * max(torch.finfo(kind).eps for kind in kinds) * size
    usual = tangent_of(lambda t: op.formula(case, t), case, leaves(case, as_computed(case)))
    if usual is not None and math.isfinite(usual):
        allowed += 4.0 * abs(usual - wanted)
    return None if abs(tangent - wanted) <= allowed else f"the tangent is {tangent}, should be {wanted}"


def under_functorch(op: Op, case: Case, backend: str | None) -> str | None:
    if not case.learns or case.buffers:
        return None
    truth, eagers = references(op, case)
    rest = {n: x.detach() for n, x in case.tensors.items()}

    def scalar(learned: dict[str, Tensor]) -> Tensor:
        return total(case, op.call(case, rest | learned, backend))

    try:
        found = torch.func.grad(scalar)({n: rest[n] for n in case.learns})
    except Exception as error:
        return refused(op, error)
    terms = by_formula(op, case, widened, op.terms).gradients if op.terms else {}
    for n, x in found.items():
        text = complaint(x, truth.gradients[n], [e.gradients[n] for e in eagers], 3.0, terms.get(n))
        if text is not None:
            return f"torch.func.grad, d {n}: {text}"
    return None


def differentiated_twice(op: Op, case: Case, backend: str | None) -> str | None:
    """The gradient of a gradient is right, or refused."""
    if not case.learns or case.buffers or case.dtype != torch.float64:
        return None

    def second(call: Callable, tensors: dict[str, Tensor | None]) -> dict[str, Tensor] | None:
        leaves = [tensors[n] for n in case.learns]
        value = total(case, call(tensors))
        if not value.requires_grad:
            return None
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        along = directions(case)
        pairs = [(g, along[n]) for n, g in zip(case.learns, first, strict=True) if g is not None]
        again = sum((g * v).sum() for g, v in pairs)
        if not isinstance(again, Tensor) or not again.requires_grad:
            return {n: torch.zeros(()) for n in case.learns}
        found = torch.autograd.grad(again, leaves, allow_unused=True)
        return {n: torch.zeros(()) if g is None else g for n, g in zip(case.learns, found, strict=True)}

    wanted = second(lambda t: op.formula(case, t), leaves(case, widened))
    try:
        found = second(lambda t: op.call(case, t, backend), as_given(case))
    except Exception as error:
        return refused(op, error)
    for n in case.learns if found is not None and wanted is not None else ():
        ours, true = (x.double().expand(case.tensors[n].shape) for x in (found[n], wanted[n]))
        scale = float(true.abs().max()) if true.numel() else 0.0
        if scale < 1e100 and not torch.allclose(ours, true, rtol=1e-5, atol=1e-6 * scale, equal_nan=True):
            return f"second gradient of {n} is wrong and not refused"
    return None


CHECKS = {
    "meta": on_meta,
    "compiled": compiled,
    "forward mode": under_forward_mode,
    "functorch": under_functorch,
    "double backward": differentiated_twice,
}
