"""What a rollout engine gets of a card while the local engine waits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "freed"), [(torch.bfloat16, 16), (torch.float32, 12)])
def test_all_but_the_weights_leaves_the_card_and_comes_back(dtype, freed):
    """Bytes per weight: master 4 (of half precision), moments 8, gradient 4."""
    module = nn.Linear(1024, 1024, bias=False).to("cuda", dtype)
    engine = LocalEngine(module, OptimizerConfig())
    inputs = torch.ones(2, 1024, device="cuda", dtype=dtype)
    for _ in range(2):
        engine.backward(engine.run(lambda: module(inputs).sum()))
        engine.step()
    engine.backward(engine.run(lambda: module(inputs).sum()))
    engine.verify()
    before = torch.cuda.memory_allocated()
    engine.offload()
    assert before - torch.cuda.memory_allocated() == pytest.approx(freed << 20, rel=0.01)
    engine.reload()
    assert torch.cuda.memory_allocated() == pytest.approx(before, rel=0.01)
    engine.step()
