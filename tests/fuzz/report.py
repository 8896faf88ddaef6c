"""Faults by kind, shrunk, with what is needed to see them again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .draw import Case, Draw
from .op import Op
from .run import Fault, run

FEW = 48  # numbers of a tensor that are printed


def search(op: Op, seed: int, numbers: Iterable[int], cap: int | None, backend: str | None) -> list[Fault]:
    return [fault for number in numbers for fault in run(op, seed, number, cap, backend)]


def kind(fault: Fault) -> tuple[str, str, str]:
    return fault.op, fault.backend, fault.what


def kinds(faults: Iterable[Fault]) -> dict[tuple[str, str, str], list[Fault]]:
    found: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in faults:
        found.setdefault(kind(fault), []).append(fault)
    return found


def shrunk(op: Op, fault: Fault) -> tuple[Fault, int | None]:
    """The same fault in the smallest bound of sizes that still shows it."""
    for cap in (1, 2, 3, 4, 6, 9):
        for again in run(op, fault.seed, fault.number, cap, fault.backend):
            if kind(again) == kind(fault):
                return again, cap
    return fault, None


def describe(op: Op, fault: Fault, count: int, cap: int | None) -> str:
    if cap is None:
        fault, cap = shrunk(op, fault)
    case = op.draw(Draw(fault.seed, op.name, fault.number, cap))
    bound = "" if cap is None else f" --cap {cap}"
    lines = [
        f"  {fault.op} [{fault.backend}] {fault.what}, {count} cases: {fault.text}",
        f"    python -m tests.fuzz --seed {fault.seed} --op {fault.op} --backend {fault.backend} "
        f"--case {fault.number}{bound}",
        *(f"    {line}" for line in show(case)),
    ]
    return "\n".join(lines)


def show(case: Case) -> list[str]:
    """The case as far as it is short."""
    lines = [f"options {case.options}", f"learns {case.learns}, buffers {case.buffers}"]
    for title, tensors in (("", case.tensors), ("upstream ", case.upstream)):
        lines += [f"{title}{name} = {_tensor(x)}" for name, x in tensors.items()]
    return lines


def _tensor(x: Tensor) -> str:
    kind = str(x.dtype).removeprefix("torch.")
    where = "" if x.is_contiguous() and not x.storage_offset() else f", strides {x.stride()}, from {x.storage_offset()}"
    return f"{kind}{list(x.shape)}{where}" + (f" {x.tolist()}" if x.numel() <= FEW else "")
