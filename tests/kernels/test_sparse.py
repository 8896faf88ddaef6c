"""Products over chosen rows and chosen blocks of the vocabulary, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels.gemm.sparse import BLOCK, compact, lists, product_of_columns, product_of_rows
from tests.support.triton_device import DEVICE

N, V, H, WIDTH = 200, 300, 48, 64


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_compaction(share, generator):
    active = (torch.rand(N, generator=generator) < share).to(DEVICE)
    order, count = compact(active)
    assert order.shape == (N,) and count.tolist() == [int(active.sum())]
    assert order[: int(count)].tolist() == active.nonzero().flatten().tolist()


def operands(dtype, generator):
    dz, weight, hidden = (torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in ((N, V), (V, H), (N, H)))
    return dz, weight, hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_chosen_rows(share, dtype, generator):
    dz, weight, hidden = operands(dtype, generator)
    active = (torch.rand(N, generator=generator) < share).to(DEVICE)
    order, count = compact(active)
    dz[~active], hidden[~active] = float("nan"), float("nan")  # nobody may read them
    out = torch.full((N, H), 7.0, dtype=dtype, device=DEVICE)
    product_of_rows(out, dz, weight, order, count)
    assert out[~active].eq(7.0).all()
    exact = dz[active].double() @ weight.double()
    torch.testing.assert_close(out[active].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    for accumulate in (False, True):
        start = torch.randn((V, H), generator=generator).to(DEVICE)
        into = start.clone()
        product_of_columns(into, dz, hidden, order, count, accumulate=accumulate)
        exact = accumulate * start.double() + dz[active].t().double() @ hidden[active].double()
        torch.testing.assert_close(into.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_blocks(dtype, generator):
    dz, weight, hidden = operands(dtype, generator)
    active = (torch.rand(N, generator=generator) < 0.8).to(DEVICE)
    order, count = compact(active)
    rows = order[: int(count)].long()
    blocks, tiles = -(-N // BLOCK), -(-V // WIDTH)
    wanted = (torch.rand(blocks, tiles, generator=generator) < 0.5).to(DEVICE)
    wanted[0, 0], wanted[:, 2] = True, False
    mask = torch.zeros((N, V), dtype=torch.bool, device=DEVICE)
    for i, row in enumerate(rows.tolist()):
        mask[row] = wanted[i // BLOCK].repeat_interleave(WIDTH)[:V]
    kept = torch.where(mask, dz, 0.0).double()
    dz = torch.where(mask, dz, float("nan"))
    out, into = torch.zeros((N, H), dtype=dtype, device=DEVICE), torch.zeros((V, H), device=DEVICE)
    product_of_rows(out, dz, weight, order, count, lists(wanted, WIDTH))
    product_of_columns(into, dz, hidden, order, count, lists(wanted, WIDTH))
    torch.testing.assert_close(out.double(), kept @ weight.double(), rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(into.double(), kept.t() @ hidden.double(), rtol=1e-5, atol=1e-4)
