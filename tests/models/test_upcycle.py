from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from prism_fast.models.forward import collate, hidden_states
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.upcycle import refuse_square_experts, upcycle
from tests.models.conftest import SMALL


def experts(model) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in model.model.language_model.layers]


def dense_experts(policy) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer gate-up [2I, H] and down [H, I] of the dense MLP."""
    layers = policy.model.language_model.layers
    return [(torch.cat([x.mlp.gate_proj.weight, x.mlp.up_proj.weight]), x.mlp.down_proj.weight) for x in layers]


def test_everything_but_the_mlps_is_copied_bit_for_bit(policy):
    sparse = upcycle(policy, seed=1)
    assert type(sparse) is Qwen3VLMoeForConditionalGeneration
    theirs = sparse.state_dict()
    shared = {
        name: value
        for name, value in policy.state_dict().items()
        if ".language_model." not in name or ".mlp." not in name
    }
    assert len(shared) > 40
    for name, value in shared.items():
        assert torch.equal(theirs[name], value), name
        assert theirs[name].data_ptr() != value.data_ptr(), name
    assert sparse.lm_head.weight is sparse.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("noise_std", [0.0, 0.01, 0.3])
def test_experts_are_the_dense_mlp_plus_independent_noise(policy, noise_std):
    sparse = upcycle(policy, num_experts=5, noise_std=noise_std, seed=2)
    residuals = []
    for moe, (gate_up, down) in zip(experts(sparse), dense_experts(policy), strict=True):
        residuals += [(moe.gate_up_proj - gate_up).detach().flatten(1), (moe.down_proj - down).detach().flatten(1)]
    noise = torch.cat([r for r in residuals], dim=1)  # [E, everything]
    if noise_std == 0:
        assert noise.abs().max() == 0
        return
    n = noise.shape[1]
    assert noise.std(dim=1).sub(noise_std).abs().max() < 5 * noise_std / (2 * n) ** 0.5
    assert noise.mean(dim=1).abs().max() < 5 * noise_std / n**0.5
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 5 / n**0.5


def test_routers_are_drawn_with_their_own_deviation(processor):
    policy = build_tiny_policy(processor, SMALL, seed=0)
    weights = torch.cat(
        [x.mlp.gate.weight for x in upcycle(policy, num_experts=16, router_std=0.5, seed=3).model.language_model.layers]
    )
    assert abs(weights.std().item() - 0.5) < 5 * 0.5 / (2 * weights.numel()) ** 0.5
    assert weights.mean().abs() < 5 * 0.5 / weights.numel() ** 0.5


def test_the_seed_alone_decides(policy):
    before = torch.get_rng_state()
    one = upcycle(policy, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    two, other = upcycle(policy, seed=4).state_dict(), upcycle(policy, seed=5).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if ".experts." in name or ".gate.weight" in name}


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_noise_the_sparse_model_computes_what_the_dense_one_does(
    policy, processor, make_prompt, make_rows, top_k
):
    sparse = upcycle(policy, top_k=top_k, noise_std=0.0, seed=6)
    prompts = [make_prompt((64, 64)), make_prompt()]
    batch = collate(prompts, [0, 1], make_rows([5, 8]), model_config=policy.config, pad_id=processor.pad_id)
    with torch.no_grad():
        dense, moe = hidden_states(policy.model, batch), hidden_states(sparse.model, batch)
    torch.testing.assert_close(moe[batch.attention_mask], dense[batch.attention_mask], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_policy_is_kept(policy, dtype):
    sparse = upcycle(copy.deepcopy(policy).to(dtype), seed=7)
    assert {p.dtype for p in sparse.parameters()} == {dtype}
    single = upcycle(policy, seed=7)
    for a, b in zip(experts(sparse), experts(single), strict=True):  # the same noise, rounded to the dtype
        ulp = 2**-7 if dtype == torch.bfloat16 else 2**-22
        torch.testing.assert_close(a.gate_up_proj.double(), b.gate_up_proj.double(), rtol=0, atol=ulp)


def test_configuration(policy):
    config = upcycle(policy, num_experts=6, top_k=3, seed=0).config
    text = config.text_config
    assert (text.num_experts, text.num_experts_per_tok) == (6, 3)
    assert text.moe_intermediate_size == policy.config.text_config.intermediate_size
    assert (text.decoder_sparse_step, text.mlp_only_layers, text.norm_topk_prob) == (1, [], True)
    assert text.router_aux_loss_coef == 0.01
    assert text.rope_parameters == policy.config.text_config.rope_parameters
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(config, name) == getattr(policy.config, name)


def test_impossible_requests_are_refused(policy):
    for hidden, intermediate in ((64, 32), (64, 64)):
        with pytest.raises(ValueError, match="square"):
            refuse_square_experts(hidden, intermediate)
    refuse_square_experts(64, 48)
    with pytest.raises(ValueError, match="top_k must lie"):
        upcycle(policy, num_experts=2, top_k=3, seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        upcycle(policy, noise_std=-0.1, seed=0)
