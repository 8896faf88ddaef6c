"""Launches happen on the card of their tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the area holds Triton code")
from prism_fast.kernels import launch


def test_on_device_takes_the_card_of_the_tensor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("on", device))
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert launch.on_device(there) == ("on", there.device)
    with launch.on_device(torch.zeros(1)) as nothing:
        assert nothing is None


@pytest.mark.gpu
def test_another_current_device_than_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    far = torch.zeros(3, device="cuda:1")
    with torch.cuda.device(0), launch.on_device(far):
        assert torch.cuda.current_device() == 1 and launch.scratch(64, 128, None).device == far.device
