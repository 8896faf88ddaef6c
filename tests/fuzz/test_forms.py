"""The same ops on meta tensors, in a graph, under forward mode, functorch and double backward."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton runs the kernels of half the backends")
from . import every_op, forms

OPS = every_op()
DERIVATIVES = tuple(form for form in forms.FORMS if form != "compiled")


@pytest.mark.parametrize("form", DERIVATIVES)
@pytest.mark.parametrize("name", OPS)
def test_other_forms(name, form):
    complain(name, form, range(8))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", DERIVATIVES)
@pytest.mark.parametrize("name", OPS)
def test_other_forms_of_many_cases(name, form):
    complain(name, form, range(8, 100))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OPS)
def test_one_graph(name):
    complain(name, "compiled", range(4))


def complain(name: str, form: str, numbers: range) -> None:
    found = [fault for number in numbers for fault in forms.run(OPS[name], 0, number, form)]
    assert not found, "\n".join(f"{name} [{backend}] {form}: {text}" for backend, text in found)
