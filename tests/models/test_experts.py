"""Experts and routers in transformers' models: parity with its eager code, and what no longer runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextExperts,
    Qwen3VLMoeTextSparseMoeBlock,
    load_balancing_loss_func,
)

from prism_fast.integrations.transformers import register
from prism_fast.models.discriminator import build_discriminator, load_balance_loss
from prism_fast.models.experts import SparseBlock, experts_forward, use_prism_experts
from prism_fast.models.forward import collate
from prism_fast.ops import plan_experts, route_experts

TEXT = dict(
    hidden_size=24, moe_intermediate_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=12, vocab_size=60,
)  # fmt: skip


def sparse_block(generator, dtype, experts=4, top_k=2) -> Qwen3VLMoeTextSparseMoeBlock:
    config = Qwen3VLMoeTextConfig(**TEXT, num_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    block = Qwen3VLMoeTextSparseMoeBlock(config).to(dtype)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return block


def ours(block: Qwen3VLMoeTextSparseMoeBlock) -> SparseBlock:
    twin = copy.deepcopy(block)
    twin.set_experts_implementation = lambda name: setattr(twin.experts.config, "_experts_implementation", name)
    use_prism_experts(twin)
    assert type(twin) is SparseBlock
    return twin


def outputs_and_gradients(block, x, g):
    x = x.clone().requires_grad_()
    out = block(x)
    parameters = dict(block.named_parameters())
    found = torch.autograd.grad((out * g).sum(), [x, *parameters.values()])
    return {"out": out, "x": found[0], **dict(zip(parameters, found[1:], strict=True))}


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (1, 1), (7, 3)])
def test_block_equals_eager(experts, top_k, generator):
    block = sparse_block(generator, torch.float64, experts, top_k)
    x, g = (torch.randn(2, 9, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    # transformers' router takes its softmax in float32 whatever the model's dtype.
    wanted, found = outputs_and_gradients(block, x, g), outputs_and_gradients(ours(block), x, g)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_accurate_as_eager(autocast, generator):
    exact = sparse_block(generator, torch.float64)
    x, g = (torch.randn(2, 60, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    half = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    x, g = (v.to(half.gate.weight.dtype) for v in (x, g))
    exact.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    exact, mine = ours(exact), ours(half)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = mine.gate(x)[0]
        eager, found = outputs_and_gradients(half, x, g), outputs_and_gradients(mine, x, g)
    # The comparison is of arithmetic: all three take the choices of the half-precision router.
    exact.gate.forward = lambda flat: (None, exact.gate.replay(flat))
    chosen = route_experts(logits, 2).experts

    def replay(flat):
        probability = (flat @ exact.gate.weight.t()).softmax(-1).gather(1, chosen)
        return plan_experts(chosen, probability / probability.sum(-1, keepdim=True), 4)

    exact.gate.replay = replay
    true = outputs_and_gradients(exact, x.double(), g.double())
    for name, value in true.items():
        errors = [(result[name].double() - value).norm() / value.norm() for result in (found, eager)]
        assert errors[0] <= 2 * errors[1] + 1e-3, (name, errors)


def test_any_model_selects_them_by_name(generator):
    register()
    register()
    config = Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")
    ids = torch.randint(0, 60, (2, 11), generator=generator)
    results = {}
    for name in ("eager", "prism"):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        results[name] = {"logits": out.logits, "aux": out.aux_loss, "loss": out.loss, **gradients}
    for name, value in results["eager"].items():
        torch.testing.assert_close(results["prism"][name], value, rtol=2e-5, atol=2e-6, msg=name)


def test_other_experts_are_refused(generator):
    experts = sparse_block(generator, torch.float32).experts
    x, index, weights = torch.zeros(3, 24), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    assert experts_forward(experts, x, index, weights).shape == (3, 24)
    for name, value, complaint in (
        ("has_bias", True, "a bias"),
        ("has_gate", False, "no gate"),
        ("is_concatenated", False, "interleaved"),
        ("act_fn", torch.nn.GELU(), "activation GELU"),
    ):
        other = copy.deepcopy(experts)
        setattr(other, name, value)
        with pytest.raises(NotImplementedError, match=f"Qwen3VLMoeTextExperts has .*{complaint}.*: choose another"):
            experts_forward(other, x, index, weights)

    class OwnGate(Qwen3VLMoeTextExperts):
        def _apply_gate(self, gate_up):
            return gate_up

    other = copy.deepcopy(experts)
    other.__class__ = OwnGate
    with pytest.raises(NotImplementedError, match="OwnGate has a gate function of their own"):
        experts_forward(other, x, index, weights)


def test_transposed_weights_are_views(generator):
    experts = sparse_block(generator, torch.float32).experts
    x = torch.randn(5, 24, generator=generator)
    routing = route_experts(torch.randn(5, 4, generator=generator), 2)
    wanted = experts_forward(experts, x, routing.experts, routing.weights)
    for name in ("gate_up_proj", "down_proj"):
        stored = getattr(experts, name).detach().transpose(1, 2).contiguous()
        setattr(experts, name, torch.nn.Parameter(stored))
    experts.is_transposed = True
    torch.testing.assert_close(experts_forward(experts, x, routing.experts, routing.weights), wanted)


class Names(TorchDispatchMode):
    """Every PyTorch operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ROUTING = {
    "_softmax",
    "softmax",
    "topk",
    "sort",
    "argsort",
    "histc",
    "bincount",
    "one_hot",
    "index_put_",
    "searchsorted",
}


@pytest.fixture
def batch_of_two(policy, processor, make_prompt, make_rows):
    return collate([make_prompt()], [0, 0], make_rows([9, 5]), model_config=policy.config, pad_id=processor.pad_id)


def test_a_discriminator_forward_runs_no_eager_routing(policy, batch_of_two):
    model = build_discriminator(policy, seed=1)
    layers = model.backbone.config.text_config.num_hidden_layers

    def count() -> int:
        with Names() as names, torch.no_grad():
            model(batch_of_two)
        return sum(name in ROUTING for name in names.seen)

    ours = count()
    for module in model.modules():  # back to stock: the count is able to see what it looks for
        if type(module) is SparseBlock:
            module.__class__ = Qwen3VLMoeTextSparseMoeBlock
            module.gate.__class__ = type(module.gate).__mro__[1]
    model.backbone.set_experts_implementation("grouped_mm")
    stock = count()
    assert stock >= ours + 3 * layers and ours == 0


def test_logits_and_balance_loss_are_transformers_own(policy, batch_of_two):
    model = build_discriminator(policy, seed=1)
    raw = model(batch_of_two).router_logits
    mask = batch_of_two.attention_mask
    assert len(raw) == model.backbone.config.text_config.num_hidden_layers
    wanted = load_balancing_loss_func(raw, 4, 2, mask)
    found = load_balance_loss(raw, 4, 2, mask)
    torch.testing.assert_close(found, wanted)
    assert not torch.isclose(load_balance_loss(raw, 4, 2, mask, double_softmax=True), wanted)
    found.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.backbone.language_model.layers)
