"""Sparse upcycling: a dense Qwen3-VL becomes a Qwen3-VL-MoE whose experts are noisy copies of the dense MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from prism_fast.models.experts import use_prism_experts
from prism_fast.models.family import trunk
from prism_fast.models.patch_embedding import use_linear_patch_embedding
from prism_fast.models.vision_attention import use_batched_vision_attention

_COPIED_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "initializer_range",
)
_COPIED_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "initializer_range",
)
_COPIED_FIELDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "tie_word_embeddings",
)


def refuse_square_experts(hidden_size: int, moe_intermediate_size: int) -> None:
    """Raise ``ValueError`` where an expert tensor would be square: hub files and transformers 5 store it transposed to
    each other, and only the shape tells which, so a square one could be loaded wrongly without an error."""
    for name, rows in (("gate_up_proj", 2 * moe_intermediate_size), ("down_proj", moe_intermediate_size)):
        if rows == hidden_size:
            raise ValueError(
                f"moe_intermediate_size {moe_intermediate_size} with hidden_size {hidden_size} makes experts.{name} "
                f"square ({rows} x {hidden_size}): its two published layouts cannot be told apart. Use another "
                "intermediate_size"
            )


def check_options(dense: Qwen3VLConfig, num_experts: int, top_k: int, noise_std: float, router_std: float) -> None:
    """Raise ``ValueError`` for the options that :func:`upcycle` refuses."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in [1, num_experts={num_experts}], got {top_k}")
    if noise_std < 0 or router_std < 0:
        raise ValueError(f"noise_std and router_std must not be negative, got {noise_std} and {router_std}")
    refuse_square_experts(dense.text_config.hidden_size, dense.text_config.intermediate_size)


def upcycle(
    policy: Qwen3VLForConditionalGeneration,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
    seed: int,
) -> Qwen3VLMoeForConditionalGeneration:
    """Replace every MLP by ``num_experts`` copies of itself, each with its own noise ``N(0, noise_std²)``, and a router
    drawn from ``N(0, router_std²)``; copy everything else bit for bit (published recipe, there unseeded).

    The result has the policy's dtype and device. Noise is drawn in float32 on the CPU, layer by layer in the order
    expert gate-up, expert down, router, so that ``seed`` decides it whatever the device. Routing weights of the
    chosen experts are renormalised, so with ``noise_std=0`` the sparse model computes what the dense one does.

    Raises:
        ValueError: square expert tensors, ``top_k`` outside ``[1, num_experts]``, a negative deviation.
    """
    check_options(policy.config, num_experts, top_k, noise_std, router_std)
    text = policy.config.text_config
    parameter = next(policy.parameters())
    config = sparse_config(policy.config, num_experts, top_k)
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model = Qwen3VLMoeForConditionalGeneration._from_config(
            config, dtype=parameter.dtype, attn_implementation=text._attn_implementation
        )
    model.tie_weights()  # left out together with the initialisation
    use_linear_patch_embedding(model)
    use_batched_vision_attention(model)
    sparse, written = model.state_dict(), set()
    with torch.no_grad():
        for name, tensor in sparse_weights(
            policy, num_experts=num_experts, noise_std=noise_std, router_std=router_std, seed=seed
        ):
            sparse[name].copy_(tensor)
            written.add(name)
    check_complete(written, sparse)
    model = model.to(parameter.device)
    use_prism_experts(model)
    return model


def sparse_config(dense: Qwen3VLConfig, num_experts: int, top_k: int) -> Qwen3VLMoeConfig:
    """Configuration of the sparse model that a dense one is upcycled to."""
    text = {name: getattr(dense.text_config, name) for name in _COPIED_TEXT_FIELDS}
    vision = {name: getattr(dense.vision_config, name) for name in _COPIED_VISION_FIELDS}
    return Qwen3VLMoeConfig(
        text_config={
            **text,
            "rope_parameters": dict(text["rope_parameters"]),
            "tie_word_embeddings": dense.tie_word_embeddings,
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": dense.text_config.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.01,
        },
        vision_config=vision,
        **{name: getattr(dense, name) for name in _COPIED_FIELDS},
    )


@torch.no_grad()
def sparse_weights(
    policy: Qwen3VLForConditionalGeneration, *, num_experts: int, noise_std: float, router_std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the sparse model's weights, as in :func:`upcycle`, one by one on the policy's device, so that
    a writer of files never holds the whole model. Copied weights are the policy's own tensors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32) * std

    def perturbed(dense: Tensor) -> Tensor:  # [rows, columns] -> [E, rows, columns]
        # float64 models keep their digits; everything else is added in float32 and rounded once
        wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
        return noise((num_experts, *dense.shape), noise_std).to(wide).add_(dense.cpu().to(wide)).to(dense)

    for name, tensor in policy.state_dict().items():
        if ".mlp." not in name or ".visual." in name:
            yield name, tensor
    for index, layer in enumerate(trunk(policy).layers):
        mlp, prefix = layer.mlp, f"model.language_model.layers.{index}.mlp"
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])  # [2I, H]
        yield f"{prefix}.experts.gate_up_proj", perturbed(gate_up)  # [E, 2I, H]
        yield f"{prefix}.experts.down_proj", perturbed(mlp.down_proj.weight)  # [E, H, I]
        router = noise((num_experts, gate_up.shape[1]), router_std)  # [E, H]
        yield f"{prefix}.gate.weight", router.to(gate_up)


def check_complete(written: set[str], sparse: Iterable[str]) -> None:
    """Raise ``ValueError`` where the dense model had no value for a weight of the sparse one."""
    if unwritten := sorted(set(sparse) - written):
        raise ValueError(f"the dense model has no weights for {', '.join(unwritten)}: this Qwen3-VL variant is unknown")
