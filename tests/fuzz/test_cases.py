"""A few random cases of every op, in each of their forms; `python -m tests.fuzz` runs more."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton runs the kernels of half the backends")
from . import every_op, report

OPS = every_op()
FEW, MANY = 20, 400
# Kinds of faults that are known and not yet mended: (op, backend, what).
KNOWN: set[tuple[str, str, str]] = {
    *((op, "reference", "autocast") for op in ("moe_experts", "shared_prefix_attention")),  # backward inside the region
    ("moe_experts", "reference", "raises"),  # the same in float16
    ("route_experts", "reference", "z_stat"),  # infinite instead of NaN where all logits of a row are -inf
}


@pytest.mark.parametrize("name", OPS)
def test_a_few_cases(name):
    complain(name, range(FEW))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OPS)
def test_many_cases(name):
    complain(name, range(FEW, MANY))


def complain(name: str, numbers: range) -> None:
    op = OPS[name]
    found = report.kinds(report.search(op, 0, numbers, None, None))
    new = {kind: group for kind, group in found.items() if kind not in KNOWN}
    assert not new, "\n" + "\n".join(report.describe(op, group[0], len(group), None) for group in new.values())
