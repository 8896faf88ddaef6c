"""Memory for scores: a function of shapes and the card's total memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prism_fast.ops import budgets, linear_logprob

V = 151_936
GB = 10**9


@pytest.fixture
def card(monkeypatch):
    """``card(bytes)``: what a GPU says about itself."""

    def set_total(total: int) -> SimpleNamespace:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
        return SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)

    return set_total


@pytest.mark.parametrize(
    "total,save,step", [(24 * GB, 1 << 30, 1024), (79 * GB, 4 << 30, 8192), (150 * GB, 4 << 30, 8192)]
)
def test_by_total_memory(total, save, step, card):
    x = card(total)
    assert budgets.save_bytes(x.device) == save and budgets.wave_rows(8192, V, x) == step
    most = 8832 if save > 1 << 30 else 1024
    for rows in (0, 1, 127, 5000, 8193, 16384, 100_000):
        step = budgets.wave_rows(rows, V, x)
        assert step % budgets.WAVE_UNIT == 0 and 0 < step <= most
        assert -(-rows // step) == -(-rows // most)  # fewer waves would not fit
    if most > 8192:
        assert [budgets.wave_rows(rows, V, x) for rows in (9000, 16384)] == [4608, 8192]  # all waves alike


def test_on_a_cpu_nothing_is_asked(monkeypatch, generator):
    def never(device):
        raise AssertionError("there is no card")

    monkeypatch.setattr(torch.cuda, "get_device_properties", never)
    x = torch.randn(3, 8, generator=generator)
    assert budgets.save_bytes(x.device) == 1 << 30 and budgets.wave_rows(10**6, V, x) == 512
    linear_logprob(x, torch.randn(5, 8, generator=generator), torch.tensor([0, 1, 2]))


def test_a_tiny_vocabulary_is_one_wave():
    assert budgets.wave_rows(10_000, 600, torch.empty(0)) == 10_112
    assert budgets.wave_rows(300, 10**9, torch.empty(0)) == 128
