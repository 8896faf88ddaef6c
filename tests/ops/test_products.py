"""Products with float32 sums: rounded once, or added to a float32 matrix; a card's calls are played on the CPU."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import products
from prism_fast.ops.products import add_product, product
from tests.support import played_card

LONG = 151_936
CARDS = ["cpu", "played", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=CARDS)
def device(request, monkeypatch) -> str:
    if request.param == "played":
        played_card.play(monkeypatch)
    return "cuda" if request.param == "cuda" else "cpu"


def operands(generator, m: int, k: int, n: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A transposed left matrix, and a right one whose rows lie apart."""
    a = torch.randn(k, m, generator=generator).to(dtype).t()
    return a.to(device), torch.randn(k, n + 8, generator=generator).to(dtype).to(device)[:, :n]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_sum_is_rounded_once(dtype, device, generator):
    a, b = operands(generator, 24, LONG, 40, dtype, device)
    exact = a.double() @ b.double()
    found = product(a, b, dtype)
    assert found.dtype == dtype
    # Half a unit of the result, and what a float32 sum over so many terms may be off by.
    slack = 1e-6 * (a.double().norm(dim=1)[:, None] * b.double().norm(dim=0))
    assert ((found.double() - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + slack).all()


def test_a_sum_in_pieces_would_be_seen(monkeypatch, generator):
    a, b = operands(generator, 24, LONG, 40, torch.bfloat16, "cpu")
    played_card.play(monkeypatch)
    once = product(a, b, torch.bfloat16)
    pieces = torch.mm(a, b)
    exact = a.double() @ b.double()
    assert (pieces.double() - exact).norm() > 1.5 * (once.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_wider_than_the_operands(dtype, device, generator):
    a, b = operands(generator, 24, 40, 32, dtype, device)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b, torch.float32).double(), exact, rtol=1e-5, atol=1e-5)
    for kind in (torch.float32, torch.float64):
        out = torch.randn((24, 32), generator=generator).to(kind).to(device)
        wanted = out.double() + exact
        add_product(out, a, b)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m,k,n", [(0, 3, 2), (2, 0, 3), (3, 2, 0)])
def test_empty_products(m, k, n, device, generator):
    a, b = operands(generator, m, k, n, torch.bfloat16, device)
    out = torch.ones((m, n), device=device)
    add_product(out, a, b)
    assert (
        product(a, b, torch.bfloat16).eq(0).all() and product(a, b, torch.bfloat16).shape == (m, n) and out.eq(1).all()
    )


def test_calls_on_a_card(monkeypatch, generator):
    """A sum is asked for in float32 unless the output is large enough to be cut into tiles instead."""
    calls = played_card.play(monkeypatch)
    a, b = operands(generator, 4, 6, 5, torch.bfloat16, "cpu")
    product(a, b, torch.bfloat16)
    add_product(torch.zeros(4, 5), a, b)
    monkeypatch.setattr(products, "MANY", 19)
    product(a, b, torch.bfloat16)
    product(a, b, torch.float32)
    kinds = [(call.name, call.out_dtype) for call in calls]
    wide = torch.float32
    assert kinds == [("mm", wide), ("addmm", wide), ("mm", None), ("mm", wide)]


def test_torch_has_the_overloads():
    """What is played here is what the installed torch offers on CUDA."""
    schemas = [str(s) for name in ("aten::mm", "aten::addmm") for s in torch._C._jit_get_schemas_for_operator(name)]
    for head in ("aten::mm.dtype(", "aten::addmm.dtype_out("):
        assert any(s.startswith(head) and "ScalarType out_dtype" in s for s in schemas), schemas
