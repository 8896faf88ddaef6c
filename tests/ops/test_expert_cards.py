"""Which backend serves the experts on which card, by default and on demand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prism_fast.ops.moe_experts import ON_CUDA, _default, on_cuda
from prism_fast.ops.stock import moe_experts as stock

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def card(monkeypatch):
    """Stand-ins of (hidden, gate_up, down) on a card of compute capability ``major``.x."""

    def on(major: int, dtype: torch.dtype, width: int = 64, inner: int = 32, **strides: tuple[int, ...]):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

        def stand_in(name: str, *shape: int):
            x = torch.empty(shape, dtype=dtype, device="meta")
            stride = strides.get(name, x.stride())
            return SimpleNamespace(
                is_cuda=True, device=torch.device("cuda", 0), dtype=dtype, shape=x.shape, stride=lambda: stride,
                storage_offset=lambda: 0, element_size=lambda: dtype.itemsize,
            )  # fmt: skip

        return stand_in("hidden", 9, width), stand_in("gate_up", 2, 2 * inner, width), stand_in("down", 2, width, inner)

    return on


@pytest.mark.parametrize(("major", "dtype"), ON_CUDA)
def test_every_entry_serves_what_its_backend_takes(major, dtype, card):
    found = _default(*card(major, dtype))
    assert found == on_cuda(major, dtype) == ON_CUDA[major, dtype]
    assert found == ("stock" if dtype == BF16 and major in (9, 10) else "triton")
    assert (stock.refusal(*card(major, dtype)) is None) == (found == "stock")


def test_cards_that_are_not_listed_get_triton(card):
    assert {m for m, _ in ON_CUDA} == {8, 9, 10} and {d for _, d in ON_CUDA} == {BF16, F16, F32}
    for major in (7, 11, 12):
        for dtype in (BF16, F16, F32):
            assert _default(*card(major, dtype)) == "triton"
            with_name = f"compute capability 9.x and 10.x.* on {major}.x"
            with pytest.raises(NotImplementedError, match=with_name + "; pass backend='triton'"):
                stock._refuse(*card(major, dtype))


def test_what_grouped_products_cannot_address_goes_to_triton(card):
    assert _default(*card(9, BF16, width=60)) == _default(*card(9, BF16, inner=33)) == "triton"
    assert _default(*card(9, BF16, gate_up=(64 * 64, 1, 64))) == "stock"  # the hub's orientation
    for strides in ((64 * 128, 128, 2), (64 * 65, 65, 1), (4, 64, 1)):
        assert _default(*card(9, BF16, gate_up=strides)) == "triton"
        with pytest.raises(NotImplementedError, match="backend='stock' takes weights whose rows or columns are dense"):
            stock._refuse(*card(9, BF16, gate_up=strides))


def test_the_cpu_has_a_default_of_its_own():
    assert _default(*(torch.zeros(shape) for shape in ((3, 8), (2, 8, 8), (2, 8, 4)))) is None
