"""bfloat16: float32 masters, moments and gradients behind weights that are computed with in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.stored import FILE
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def policy():
    processor = Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))
    return build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4).to(BF16)


def loss_of(policy: nn.Module, step: int) -> Tensor:
    """Nats [0-d] of random tokens, summed: gradients far above AdamW's epsilon."""
    ids = torch.randint(0, 250, (4, 33), generator=torch.Generator().manual_seed(step))
    logits = policy(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def share_moved(before: dict[str, Tensor], after: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
    """Of the elements whose gradient is not 0."""
    learning = {name: gradient != 0 for name, gradient in gradients.items()}
    moved = sum(int((before[name] != after[name])[mask].sum()) for name, mask in learning.items())
    return moved / sum(int(mask.sum()) for mask in learning.values())


def test_at_a_learning_rate_of_1e_6_every_master_with_a_gradient_moves(policy):
    """Without masters one weight in fifty does: 1e-6 is less than half a unit in the last place of the others."""
    engine = LocalEngine(copy.deepcopy(policy), OptimizerConfig(lr=1e-6, clip_norm=1e9))
    before = {name: master.detach().clone() for name, master in engine.masters.items()}
    engine.backward(engine.run(lambda: loss_of(engine.module, 0)))
    gradients = {name: m.grad.clone() for name, m in engine.masters.items() if m.grad is not None}
    engine.step()
    assert sum(gradient.numel() for gradient in gradients.values()) > 100_000
    assert share_moved(before, {n: m.detach() for n, m in engine.masters.items()}, gradients) == 1.0

    plain = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    loss_of(plain, 0).backward()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    optimizer.step()
    assert share_moved(before, {n: p.detach() for n, p in plain.named_parameters()}, gradients) < 0.1


def test_weights_are_the_masters_rounded_once(policy, tmp_path):
    engine = LocalEngine(copy.deepcopy(policy), OptimizerConfig(lr=1e-3))
    for step in range(3):
        engine.backward(engine.run(lambda step=step: loss_of(engine.module, step)))
        engine.step()
    named = dict(engine.named_weights())
    between = 0
    for name, master in engine.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(named[name], master.to(BF16)), name
        between += int((master != named[name]).sum())
    assert between > 100_000, "masters hold what the weights cannot"
    engine.save(tmp_path)
    saved = load_file(tmp_path / FILE)
    for name, master in engine.masters.items():
        assert saved[f"model.{name}"].dtype == torch.float32 and torch.equal(saved[f"model.{name}"], master), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_parameter_is_its_own_master(policy, dtype):
    module = copy.deepcopy(policy).to(dtype)
    engine = LocalEngine(module, OptimizerConfig())
    assert all(engine.masters[name] is p for name, p in module.named_parameters())


def test_the_discriminators_wide_head_is_its_own_master_beside_narrow_weights(policy):
    module = build_discriminator(policy, seed=1)
    engine = LocalEngine(module, OptimizerConfig())
    own = {name for name, p in module.named_parameters() if engine.masters[name] is p}
    assert own == {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert 0 < len(own) < len(engine.masters)
    assert all(master.dtype == torch.float32 for master in engine.masters.values())


def test_gradients_add_up_in_float32():
    """Of 256 micro-batches, against float64. Added up in bfloat16, small ones vanish beside the sum."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Linear(16, 8, bias=False).to(BF16)
    inputs = torch.rand(256, 16, generator=generator).to(BF16)
    upstream = torch.rand(256, 8, generator=generator).to(BF16)
    engine, plain = LocalEngine(copy.deepcopy(module), OptimizerConfig()), copy.deepcopy(module)
    exact = torch.zeros(8, 16, dtype=torch.float64)
    for x, up in zip(inputs, upstream, strict=True):
        engine.backward((engine.module(x) * up).sum())
        assert engine.module.weight.grad is None
        (plain(x) * up).sum().backward()
        exact += torch.outer(up, x).double()  # of one micro-batch as autograd rounds it

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    assert error(engine.masters["weight"].grad) < 1e-6
    assert error(plain.weight.grad) > 1e-3


def test_a_gradient_that_others_ask_for_is_theirs(policy):
    """As the check of packed rows does, between two micro-batches."""
    engine = LocalEngine(copy.deepcopy(policy), OptimizerConfig())
    name, weight = next((n, p) for n, p in engine.module.named_parameters() if n.endswith("q_proj.weight"))
    engine.backward(engine.run(lambda: loss_of(engine.module, 0)))
    before = engine.masters[name].grad.clone()
    loss_of(engine.module, 1).backward()
    assert weight.grad.dtype == BF16 and torch.equal(engine.masters[name].grad, before)


def test_at_no_time_is_there_a_second_set_of_gradients():
    """A layer's half-precision gradient is gone before an earlier layer's is formed."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).to(BF16)
    engine, most = LocalEngine(module, OptimizerConfig()), []
    for layer in module:
        layer.register_full_backward_hook(lambda *_: most.append(sum(p.grad is not None for p in module.parameters())))
    engine.backward(module(torch.ones(2, 4, dtype=BF16, requires_grad=True)).sum())
    assert len(most) == 5 and max(most) <= 2
