"""A few random cases of every op, in each of their forms; `python -m tests.fuzz` runs more."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton runs the kernels of half the backends")
from . import every_op, report

OPS = every_op()
FEW, MANY = 5, 400


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
    assert not found, "\n" + "\n".join(report.describe(op, group[0], len(group), None) for group in found.values())
