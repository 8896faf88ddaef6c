"""The persistent product against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels.gemm import Tile, add_product, matmul, product
from tests.support.triton_device import DEVICE

SMALL = Tile(m=64, n=64, k=32, group=2, stages=2, warps=4)


def operand(rows: int, columns: int, transposed: bool, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn((rows, columns), generator=generator).bfloat16().to(DEVICE)
    return x.t().contiguous().t() if transposed else x


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
def test_product_matches_float64_on_ragged_shapes(a_transposed, b_transposed, out_dtype, generator):
    m, n, k = 136, 200, 72  # no dimension is a multiple of its tile
    a, b = operand(m, k, a_transposed, generator), operand(k, n, b_transposed, generator)
    out = torch.full((m, n), float("nan"), dtype=out_dtype, device=DEVICE)
    matmul(a, b, out=out, tile=SMALL)
    exact = a.double() @ b.double()
    eager = (a.float() @ b.float()).to(out_dtype).double()
    limit = 2 * (eager - exact).abs().max() + 4 * torch.finfo(out_dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("m,n,k", [(1, 8, 8), (64, 64, 32), (65, 72, 8), (300, 64, 64)])
def test_degenerate_and_exact_shapes(m, n, k, generator):
    a, b = operand(m, k, False, generator), operand(k, n, False, generator)
    out = matmul(a, b, out_dtype=torch.float32, tile=SMALL)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_default_tile(generator):
    a, b = operand(144, 64, False, generator), operand(64, 264, True, generator)
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        with pytest.raises(NotImplementedError, match="compute capability"):
            matmul(a, b)
        return
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=2**-7, atol=2**-5)


def test_empty_product_is_zero():
    a = torch.zeros((4, 0), dtype=torch.bfloat16, device=DEVICE)
    assert matmul(a, a.new_zeros((0, 8))).eq(0).all()


def test_refusals():
    a, b = torch.zeros((8, 16), dtype=torch.bfloat16), torch.zeros((16, 8), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"\[M,K\] and \[K,N\]"):
        matmul(a, a)
    with pytest.raises(ValueError, match="bfloat16"):
        matmul(a.float(), b.float())
    with pytest.raises(ValueError, match="must be"):
        matmul(a, b, out=torch.zeros((8, 8), dtype=torch.float64))
    with pytest.raises(ValueError, match="16 bytes"):
        matmul(torch.zeros((8, 17), dtype=torch.bfloat16)[:, :16], b)
    with pytest.raises(ValueError, match="unit stride"):
        matmul(torch.zeros((8, 32), dtype=torch.bfloat16)[:, ::2], b)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_accumulation_adds_to_what_is_there(out_dtype, generator):
    a, b = operand(72, 136, True, generator), operand(72, 200, False, generator)[:, :136].t()
    start = torch.randn((72, 72), generator=generator).to(out_dtype).to(DEVICE)
    out = start.clone()
    matmul(a, b, out=out, accumulate=True, tile=SMALL)
    exact = start.double() + a.double() @ b.double()
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(out_dtype).eps, atol=1e-5)
    assert matmul(a[:, :0], b[:0], out=out, accumulate=True) is out and out.any()
    with pytest.raises(ValueError, match="accumulate=True needs out"):
        matmul(a, b, accumulate=True)


def test_products_wider_than_their_operands(generator):
    a, b = operand(24, 40, False, generator), operand(40, 32, True, generator)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b, torch.float32).double(), exact, rtol=1e-6, atol=1e-5)
    assert product(a, b, torch.bfloat16).equal(exact.to(torch.bfloat16))
    for dtype in (torch.float32, torch.float64):
        out = torch.randn((24, 32), generator=generator).to(dtype).to(DEVICE)
        wanted = out.double() + exact
        add_product(out, a, b)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-5)
