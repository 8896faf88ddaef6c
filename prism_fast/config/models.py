"""Settings of the policy and the discriminator: ``model`` and ``warmup.upcycle``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prism_fast.config.errors import require


@dataclass
class TinyConfig:
    """Sizes of the policy that is built when ``model.policy`` is ``tiny`` (the real Qwen3-VL class, small)."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    vision_depth: int = 2
    vision_width: int = 96
    vision_heads: int = 4
    vision_intermediate_size: int = 256
    initializer_range: float = 0.06  # at this width, far better than the 0.02 of large models


@dataclass
class LoraConfig:
    """Adapters (LoRA, by peft) in the policy of every stage that trains it; all other weights of it are frozen. A stage
    begins with new adapters on the weights that it is given and exports them merged."""

    rank: int = 0  # 0: no adapters
    alpha: float = 32.0  # the adapters' product counts alpha / rank times
    # Linear layers with adapters: globs over module names. The output matrix cannot be one of them.
    targets: list[str] = field(default_factory=lambda: ["model.language_model.*_proj"])
    # Also export/<stage>-adapter, for peft; its base is the policy that the stage began with.
    save_adapter: bool = False


@dataclass
class ModelConfig:
    policy: str = "tiny"  # `tiny`, or the folder of any Qwen3-VL checkpoint
    # Weights of the policy that no stage trains: globs over parameter names, e.g. model.visual.* for the image tower
    # and its projector. They have no gradients and moments and are exported bit by bit. See sft.freeze.
    freeze: list[str] = field(default_factory=list)
    lora: LoraConfig = field(default_factory=LoraConfig)
    discriminator: str = "upcycle"  # `upcycle` (from the policy), or the folder of a discriminator checkpoint
    dtype: Literal["float32", "bfloat16"] = "float32"
    # For policy and discriminator in training: a layer keeps only its input and computes the rest again for the
    # backward. The same bits for less memory and a third more work; passes/*_recomputed counts it.
    gradient_checkpointing: bool = False
    # Norms, rotary embedding and SwiGLU of the language models by Liger's kernels. auto: on CUDA where liger-kernel is
    # installed; liger: an error where they cannot run. environment.json and the report name the kernels used.
    fused_trunk: Literal["auto", "off", "liger"] = "auto"
    # Kernels of attention over packed rows and images on CUDA. torch: those compiled into PyTorch; flash_attn: the
    # package flash-attn 2; fa3, fa4: FlashAttention 3 on cards of 9.x, 4 on cards of 10.x, instead of PyTorch's. auto:
    # by a table of cards (ops/flash.py), fa3 or fa4 where installed. A kernel asked for by name that cannot run is an
    # error. Results differ in their bits. environment.json and the report name the kernels used.
    attention: Literal["auto", "torch", "flash_attn", "fa3", "fa4"] = "auto"
    tiny: TinyConfig = field(default_factory=TinyConfig)

    def __post_init__(self) -> None:
        lora = self.lora
        require(not (lora.rank and self.freeze), "model.freeze", "left out with model.lora, which freezes", self.freeze)
        require(lora.rank == 0 or bool(lora.targets), "model.lora.targets", "at least one pattern", lora.targets)
        without = "left out without model.lora.rank"
        require(lora.rank > 0 or not lora.save_adapter, "model.lora.save_adapter", without, lora.save_adapter)


@dataclass
class UpcycleConfig:
    num_experts: int = 4
    top_k: int = 2
    noise_std: float = 0.01
    router_std: float = 0.02

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= self.num_experts, "warmup.upcycle.top_k", "between 1 and num_experts", self.top_k)
