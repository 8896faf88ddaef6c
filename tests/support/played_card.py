"""cuBLAS's products as a card offers them, played on the CPU, so that the calls of CUDA code run without a card.

With ``out_dtype`` a sum stays float32. Without it, a product of half-precision matrices is what cuBLAS is allowed to
give: pieces of the sum, each rounded, added in half precision.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

PIECES = 8


class Call(NamedTuple):
    name: str
    out_dtype: torch.dtype | None
    shape: tuple[int, int, int]  # M, N, K


def play(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Let ``prism_fast.ops.products`` take CPU tensors for a card's; the list fills with its calls."""
    calls: list[Call] = []
    mm, addmm = torch.mm, torch.addmm

    def record(name: str, a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> None:
        assert a.dtype == b.dtype and a.dim() == b.dim() == 2
        assert not torch.is_autocast_enabled(a.device.type), "autocast would round float32 operands"
        assert out_dtype in (None, a.dtype, torch.float32)  # what aten::mm.dtype takes on CUDA
        calls.append(Call(name, out_dtype, (a.shape[0], b.shape[1], a.shape[1])))

    def played_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        record("mm", a, b, out_dtype)
        if out_dtype is not None or a.dtype.itemsize > 2 or a.shape[1] == 0:
            return mm(a.to(out_dtype or a.dtype), b.to(out_dtype or a.dtype))
        pieces = zip(a.chunk(PIECES, 1), b.chunk(PIECES, 0), strict=True)
        parts = [mm(x.float(), y.float()).to(a.dtype) for x, y in pieces]
        return sum(parts[1:], parts[0])

    def played_addmm(held: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        record("addmm", a, b, out_dtype)
        assert held.shape == out.shape == (a.shape[0], b.shape[1]) and held.dtype == out.dtype == out_dtype
        assert not torch.is_grad_enabled() or not (held.requires_grad or a.requires_grad or b.requires_grad)
        return addmm(held, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr("prism_fast.ops.products._on_card", lambda x: True)
    monkeypatch.setattr(torch, "mm", played_mm)
    monkeypatch.setattr(torch, "addmm", played_addmm)
    return calls
