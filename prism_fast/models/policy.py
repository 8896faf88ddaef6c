"""The policy: stock ``Qwen3VLForConditionalGeneration``, built tiny from a seed or read from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_fast.models.checkpoints import check_loading, read_model_type, without_load_report
from prism_fast.models.family import family_of
from prism_fast.models.logprob_head import LogProbHead
from prism_fast.models.lora import has_lora, plain_weights
from prism_fast.models.patch_embedding import use_linear_patch_embedding
from prism_fast.models.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from prism_fast.models.vision_attention import use_batched_vision_attention

if TYPE_CHECKING:
    from prism_fast.models.processor import Processor


@dataclass(frozen=True)
class TinyPolicy:
    """Sizes of the embedded policy (about 1.7 M parameters with a vocabulary of 2 k).

    ``intermediate_size`` must not be ``hidden_size`` or half of it: upcycling would give square expert tensors,
    whose two published layouts cannot be told apart.
    """

    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mrope_section: tuple[int, int, int] = (6, 5, 5)
    rope_theta: float = 10_000.0
    max_positions: int = 4096
    vision_depth: int = 2
    vision_width: int = 96
    vision_heads: int = 4
    vision_intermediate_size: int = 256
    vision_positions: int = 64
    deepstack_layers: tuple[int, ...] = (0,)
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim/2 = {self.head_dim // 2}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.vision_width % (4 * self.vision_heads):
            raise ValueError(
                f"vision_width {self.vision_width} must be a multiple of 4 x vision_heads = {4 * self.vision_heads} "
                "(the rotary embedding splits a head into two axes of cosine/sine pairs)"
            )
        if int(self.vision_positions**0.5) ** 2 != self.vision_positions:
            raise ValueError(f"vision_positions {self.vision_positions} must be a square number")
        if self.hidden_size in (self.intermediate_size, 2 * self.intermediate_size):
            raise ValueError(
                f"intermediate_size {self.intermediate_size} with hidden_size {self.hidden_size} gives square expert "
                "tensors after upcycling: choose another intermediate_size"
            )


def tiny_config(
    size: TinyPolicy,
    *,
    vocab_size: int,
    image_token_id: int,
    video_token_id: int,
    vision_start_token_id: int,
    vision_end_token_id: int,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> Qwen3VLConfig:
    """Configuration of a policy of the given sizes, input and output embeddings tied."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": size.hidden_size,
            "intermediate_size": size.intermediate_size,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_kv_heads,
            "head_dim": size.head_dim,
            "max_position_embeddings": size.max_positions,
            "initializer_range": size.initializer_range,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": size.rope_theta,
                "mrope_section": list(size.mrope_section),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_intermediate_size,
            "num_heads": size.vision_heads,
            "patch_size": patch_size,
            "spatial_merge_size": merge_size,
            "temporal_patch_size": temporal_patch_size,
            "out_hidden_size": size.hidden_size,
            "num_position_embeddings": size.vision_positions,
            "deepstack_visual_indexes": list(size.deepstack_layers),
            "initializer_range": size.initializer_range,
        },
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        vision_start_token_id=vision_start_token_id,
        vision_end_token_id=vision_end_token_id,
        tie_word_embeddings=True,
    )


def build_tiny_policy(processor: Processor, size: TinyPolicy, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised float32 policy on the CPU. ``seed`` alone decides its weights (transformers' own
    initialisation); the global random state does not change. Input and output embeddings are tied."""
    tokenizer = processor.tokenizer
    image = processor.image_processor
    token_id = tokenizer.convert_tokens_to_ids
    config = tiny_config(
        size,
        vocab_size=len(tokenizer),
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        patch_size=image.patch_size,
        merge_size=image.merge_size,
        temporal_patch_size=image.temporal_patch_size,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    use_linear_patch_embedding(model)
    use_batched_vision_attention(model)
    LogProbHead.install(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[processor.eos_id, processor.pad_id], pad_token_id=processor.pad_id, do_sample=True
    )
    return model


def load_policy(
    path: str | Path, *, dtype: torch.dtype | Literal["auto"] = torch.float32, device: str | torch.device = "cpu"
) -> Qwen3VLForConditionalGeneration:
    """Read any dense Qwen3-VL checkpoint folder: safetensors only, no network, no remote code. ``dtype="auto"``: that
    of the folder.

    Raises:
        FileNotFoundError: the folder, its ``config.json`` or its weights are missing.
        ValueError: another architecture, or tensors that are missing, unexpected or of another shape (named).
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds adapters, not a policy: merge them into the model that adapter_config.json names (peft: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()) and give the folder of the result"
        )
    family = family_of("policy", read_model_type(folder), folder)
    with without_load_report():
        model, info = family.policy.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that check_loading reports every offender at once instead of the first
            output_loading_info=True,
        )
    check_loading(folder, info)
    use_linear_patch_embedding(model)
    use_batched_vision_attention(model)
    LogProbHead.install(model)
    return model.to(device)


def save_policy(
    model: Qwen3VLForConditionalGeneration,
    processor: Processor,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), configuration, generation settings and processor files: the folder loads in stock
    transformers and with :func:`load_policy` and ``Processor.from_pretrained``. Adapters are merged.

    ``weights``: by the names of the model's parameters, adapters merged, where the model does not hold them whole."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if weights is None and has_lora(model):
        weights = dict(plain_weights(model, ((name, p.detach()) for name, p in model.named_parameters())))
    if weights is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in weights.items()})
    processor.save_pretrained(folder)
