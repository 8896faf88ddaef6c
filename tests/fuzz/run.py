"""One case against every backend: values, gradients, and what a caller may rely on besides."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.poison import poisoned

from .contract import RUNS, Rounding, complaint, same
from .draw import Case, Draw, Formula
from .op import Op
from .surroundings import small


class Outcome(NamedTuple):
    results: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of the tensors that learn; zeros where autograd gives none


class Fault(NamedTuple):
    op: str
    seed: int
    number: int
    backend: str
    what: str  # the check, and the result or gradient where there is one
    text: str


def leaves(case: Case, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    found = {}
    for name, x in case.tensors.items():
        found[name] = change(x.detach())
        if name in case.learns:
            found[name].requires_grad_()
    return found


def as_given(case: Case) -> dict[str, Tensor | None]:
    """Leaves in the memory of the case itself, buffers in memory of their own."""
    found = leaves(case, lambda x: x)
    return found | {name: case.tensors[name].clone() for name in case.buffers}


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def as_computed(case: Case) -> Callable[[Tensor], Tensor]:
    """Arguments as eager PyTorch gets them: those wider than the op computes in (float32 for half precision and
    float32) are rounded to that first."""
    narrow = case.dtype != torch.float64
    return lambda x: x.float() if narrow and x.dtype == torch.float64 else x


def differentiate(results: dict, tensors: dict, case: Case, retain: bool = False) -> dict[str, Tensor]:
    """Gradients of the tensors that learn."""
    names = [n for n in case.upstream if n in results and results[n].requires_grad]
    found: list = [None] * len(case.learns)
    if names and case.learns:
        found = torch.autograd.grad(
            [results[n] for n in names],
            [tensors[n] for n in case.learns],
            [case.upstream[n].to(results[n].dtype) for n in names],
            allow_unused=True,
            retain_graph=retain,
        )
    pairs = zip(case.learns, found, strict=True)
    return {n: torch.zeros_like(tensors[n], requires_grad=False) if g is None else g for n, g in pairs}


def by_formula(op: Op, case: Case, change: Callable[[Tensor], Tensor], formula: Formula | None = None) -> Outcome:
    tensors = leaves(case, change)
    results = (formula or op.formula)(case, tensors)
    gradients = differentiate(results, tensors, case)
    for buffer, source in case.buffers.items():
        total = case.tensors[buffer].double()
        if source in gradients:
            total = total + gradients.pop(source)
        gradients[buffer] = total
    return Outcome({n: x.detach() for n, x in results.items()}, gradients)


def by_op(op: Op, case: Case, backend: str | None) -> Outcome:
    tensors = as_given(case)
    results = op.call(case, tensors, backend)
    gradients = differentiate(results, tensors, case)
    for buffer, source in case.buffers.items():
        if bool(gradients.get(source, torch.zeros(())).any()):
            raise AssertionError(f"{source} has a gradient of its own beside {buffer}")
        gradients.pop(source, None)
        gradients[buffer] = tensors[buffer]
    return Outcome({n: x.detach() for n, x in results.items()}, gradients)


def references(op: Op, case: Case, formula: Formula | None = None) -> tuple[Outcome, list[Outcome]]:
    """(truth, eager PyTorch in the dtypes of the case, as it is and as it might have been rounded)."""
    truth = by_formula(op, case, widened)
    usual = as_computed(case)
    eagers = [by_formula(op, case, usual, formula)]
    half = case.dtype in (torch.bfloat16, torch.float16)
    if half and not all(bool(x.isfinite().all()) for part in eagers[0] for x in part.values()):
        # Where half precision overflows there is no error to compare with; float32 has one.
        eagers.append(by_formula(op, case, lambda x: x.float() if x.is_floating_point() else x, formula))
    for seed in range(RUNS):
        with Rounding(seed):
            eagers.append(by_formula(op, case, usual, formula))
    return truth, eagers


def run(op: Op, seed: int, number: int, cap: int | None = None, only: str | None = None) -> list[Fault]:
    """Every fault that the case shows."""
    case = op.draw(Draw(seed, op.name, number, cap))
    faults: list[Fault] = []

    def note(backend: str, what: str, text: str | None) -> None:
        if text is not None:
            faults.append(Fault(op.name, seed, number, backend, what, text))

    torch.set_num_threads(1)
    truth, eagers = references(op, case)
    fused = eagers if op.fused is None else eagers + references(op, case, op.fused)[1]
    for backend in op.backends(case):
        if only is not None and backend != only:
            continue
        with small(number):
            try:
                check(op, case, number, backend, truth, eagers if backend == "reference" else fused, note)
            except Exception as error:  # whatever a backend throws at a valid call is a finding
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:300]} ({where.filename.split('/')[-1]}:{where.lineno})"
                note(backend, "raises", text)
            finally:
                torch.set_num_threads(1)
    return faults


def check(op: Op, case: Case, number: int, backend: str, truth: Outcome, eagers: list[Outcome], note) -> None:
    before = [storage(x).clone() for x in inputs(case)]
    with poisoned(float("nan")):
        found = by_op(op, case, backend)
    sizes = op.sizes(case, leaves(case, widened)) if op.sizes else {}
    for name, true in truth.results.items():
        ours = found.results[name]
        half = case.dtype in (torch.bfloat16, torch.float16)
        c = (op.forward if half else 2.0) + (case.dtype == torch.float64)  # the truth of float64 is rounded as well
        note(backend, name, complaint(ours, true, [e.results[name] for e in eagers], c, sizes.get(name)))
    terms = by_formula(op, case, widened, op.terms).gradients if op.terms else {}
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, true in truth.gradients.items():
        c = 2.0 + (case.dtype == torch.float64)
        usual = [e.gradients[name] for e in eagers]
        note(backend, f"d {name}", complaint(found.gradients[name], true, usual, c, terms.get(name), wide))
        given = case.tensors[name]
        if found.gradients[name].dtype != given.dtype:
            note(backend, f"d {name}", f"dtype {found.gradients[name].dtype} for {given.dtype}")
    for x, old in zip(inputs(case), before, strict=True):
        if not same(storage(x), old):
            note(backend, "inputs", "an input, or what lies around it, was changed")

    def again(what: str, outcome: Outcome) -> None:
        for part, old in (("results", found.results), ("gradients", found.gradients)):
            for name, x in getattr(outcome, part).items():
                if not same(x, old[name]):
                    where = (x.double() - old[name].double()).abs().nan_to_num(0.0)
                    note(backend, what, f"{part} {name}: other bits, by up to {float(where.max()):.3g}")

    slow = backend == "triton"  # in the interpreter
    if not slow or number % 4 == 0:
        with poisoned(3e4):
            again("twice", by_op(op, case, backend))
    # What is compiled promises the same bits on any number of threads; PyTorch's matrix products do not.
    if backend == "native" and (case.large or number % 4 == 0):
        torch.set_num_threads(2)
        again("threads", by_op(op, case, backend))
        torch.set_num_threads(1)
    if number % 4 == 1 and (not slow or number % 8 == 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again("autocast", by_op(op, case, backend))
    if number % 4 == 2 and not slow:
        with torch.no_grad():
            results = op.call(case, as_given(case), backend)
        again("no_grad", Outcome({n: x.detach() for n, x in results.items()}, {}))
    if number % 4 == 3 and not slow and not case.buffers:
        twice(op, case, backend, found, note)


def twice(op: Op, case: Case, backend: str, found: Outcome, note) -> None:
    """A second backward gives the same gradients, or says which op cannot and what to do."""
    tensors = as_given(case)
    results = op.call(case, tensors, backend)
    differentiate(results, tensors, case, retain=True)
    try:
        gradients = differentiate(results, tensors, case)
    except RuntimeError as error:
        if op.name not in str(error) or "pass" not in str(error):
            note(backend, "second backward", f"the message names no op or no cure: {error}")
        return
    for name, x in gradients.items():
        if not same(x, found.gradients[name]):
            note(backend, "second backward", f"other gradient of {name}")


def inputs(case: Case) -> list[Tensor]:
    return [*case.tensors.values(), *case.upstream.values()]


def storage(x: Tensor) -> Tensor:
    """All numbers in the memory that ``x`` is a part of."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
