"""Inputs of the columns of a step: sizes, weights, one prompt with an image, its rollouts, the teacher's response."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeModel

from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import Discriminator, build_discriminator
from prism_fast.models.fused_trunk import use_fused_trunk
from prism_fast.models.logprob_head import LogProbHead
from prism_fast.models.patch_embedding import use_linear_patch_embedding
from prism_fast.models.policy import TinyPolicy, tiny_config
from prism_fast.models.processor import Prompt
from prism_fast.models.upcycle import sparse_config
from prism_fast.models.vision_attention import use_batched_vision_attention

EXPERTS, TOP_K = 4, 2
SEED = 20260428

# Token ids of the published tokenizer, and of the tiny one's size.
_REAL = {"vocab_size": 151_936, "text_ids": 151_643, "first_special": 151_643}
_TINY = {"vocab_size": 2_048, "text_ids": 2_000, "first_special": 2_000}

_VISION = {"vision_width": 1024, "vision_heads": 16, "vision_intermediate_size": 4096, "vision_positions": 2304}
_TRUNK = {
    "num_kv_heads": 8,
    "head_dim": 128,
    "mrope_section": (24, 20, 20),
    "rope_theta": 5_000_000.0,
    "max_positions": 262_144,
}


@dataclass(frozen=True)
class Shape:
    """Tokens of the prompt (image included), of a response and of the teacher's response; rollouts of the prompt.

    A quarter of a response is its caption, the rest its reasoning. Half of the prompt, rounded down to a square, is
    its image.
    """

    prompt: int
    response: int
    teacher: int
    rollouts: int

    def __post_init__(self) -> None:
        for name, least in (("prompt", 8), ("response", 4), ("teacher", 4), ("rollouts", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be {least} or more, got {getattr(self, name)}")

    @property
    def image_side(self) -> int:
        """The image is this many tokens wide and high."""
        return isqrt(self.prompt // 2)

    def caption(self, tokens: int) -> int:
        return tokens // 4


@dataclass(frozen=True)
class Widths:
    """Configurations of the policy and of the dense model that the discriminator is upcycled from."""

    policy: Qwen3VLConfig
    dense: Qwen3VLConfig
    text_ids: int  # ids below are text
    pad_id: int


def widths(depth: int | None) -> Widths:
    """The tiny models of the built-in task (``depth`` None), or ``depth`` layers of the 4B policy and of the 2B model
    with four experts, and two vision layers for three of these (the whole models have 36, 28 and 24)."""
    ids = _TINY if depth is None else _REAL
    special = ids["first_special"]
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = {name: special + i for i, name in enumerate(names, start=9)}
    if depth is None:
        sizes = (TinyPolicy(), TinyPolicy())
    else:
        if depth < 1:
            raise ValueError(f"--depth must be 1 or more, got {depth}")
        tower = max(1, round(depth * 24 / 36))
        shared = {
            **_TRUNK,
            **_VISION,
            "num_layers": depth,
            "vision_depth": tower,
            "deepstack_layers": tuple(range(min(3, tower))),
        }
        sizes = (
            TinyPolicy(hidden_size=2560, intermediate_size=9728, num_heads=32, **shared),
            TinyPolicy(hidden_size=2048, intermediate_size=6144, num_heads=16, **shared),
        )
    policy, dense = (tiny_config(size, vocab_size=ids["vocab_size"], **tokens) for size in sizes)
    return Widths(policy, dense, ids["text_ids"], special)


@dataclass(frozen=True, eq=False)
class Work:
    """``advantage`` [n] float32 is given with the rollouts: computed from each column's own scores, it would enlarge
    their rounding errors, because it divides by the group's deviation. ``logprobs`` [n][R]: of the sampled tokens."""

    shape: Shape
    widths: Widths
    prompt: Prompt
    responses: list[tuple[int, ...]]
    teacher: tuple[int, ...]
    advantage: Tensor
    logprobs: list[tuple[float, ...]] | None = None

    def spans(self, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Caption and reasoning."""
        cut = self.shape.caption(len(tokens))
        return tokens[:cut], tokens[cut:]


def draw(shape: Shape, sizes: Widths) -> Work:
    """Random text and pixels, equal for equal arguments."""
    generator = torch.Generator().manual_seed(SEED)

    def text(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, sizes.text_ids, (n,), generator=generator).tolist())

    config, side = sizes.policy, shape.image_side
    vision = config.vision_config
    image = (config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id)
    grid = torch.tensor([[1, side * vision.spatial_merge_size, side * vision.spatial_merge_size]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.rand((int(grid.prod()), patch), generator=generator) * 2 - 1
    # The image is inside of the text: the rest of the prompt comes before and after it.
    left = shape.prompt - len(image)
    ids = (*text(left // 2), *image, *text(left - left // 2))
    advantage = torch.randn(shape.rollouts, generator=generator)
    return Work(
        shape,
        sizes,
        Prompt(ids, pixels, grid),
        [text(shape.response) for _ in range(shape.rollouts)],
        text(shape.teacher),
        advantage,
    )


class Models(NamedTuple):
    policy: nn.Module
    discriminator: nn.Module


class StockDiscriminator(nn.Module):
    """transformers' unchanged backbone with the published head."""

    def __init__(self, backbone: Qwen3VLMoeModel, head: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.v_head = nn.Sequential(nn.Dropout(0.0), nn.Linear(head.shape[1], 1, bias=False))
        self.v_head.to(device=head.device, dtype=backbone.dtype)
        with torch.no_grad():
            self.v_head[1].weight.copy_(head)

    def score_hidden(self, hidden: Tensor) -> Tensor:
        """[..., H] to [...] float32."""
        return self.v_head(hidden).squeeze(-1).float()


class Weights(NamedTuple):
    """Float32, drawn once; every column has its own copies."""

    policy: dict[str, Tensor]
    backbone: dict[str, Tensor]
    head: Tensor


def draw_weights(sizes: Widths, device: str) -> Weights:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(SEED)
        policy, dense = (
            Qwen3VLForConditionalGeneration._from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
            )
            for config in (sizes.policy, sizes.dense)
        )
    discriminator = build_discriminator(dense, num_experts=EXPERTS, top_k=TOP_K, seed=SEED)
    return Weights(
        policy.state_dict(), discriminator.backbone.state_dict(), discriminator.v_head[1].weight.detach().to(device)
    )


def build(sizes: Widths, weights: Weights, *, stock: bool, dtype: torch.dtype, checkpointing: bool) -> Models:
    """Models of one column: transformers' own with ``stock``, else with our parts."""
    with torch.device(weights.head.device):
        policy = Qwen3VLForConditionalGeneration._from_config(
            copy.deepcopy(sizes.policy), dtype=dtype, attn_implementation="sdpa"
        )
        backbone = Qwen3VLMoeModel._from_config(
            sparse_config(sizes.dense, EXPERTS, TOP_K), dtype=dtype, attn_implementation="sdpa"
        )
    policy.load_state_dict(weights.policy)
    policy.tie_weights()
    backbone.load_state_dict(weights.backbone)
    if stock:
        discriminator: nn.Module = StockDiscriminator(backbone, weights.head)
    else:
        for model in (policy, backbone):
            use_linear_patch_embedding(model)
            use_batched_vision_attention(model)
        LogProbHead.install(policy)
        discriminator = Discriminator(backbone).to(weights.head.device)
        with torch.no_grad():
            discriminator.v_head[1].weight.copy_(weights.head)
        for model in (policy, discriminator):
            use_fused_trunk(model)
    if checkpointing:
        for model in (policy, backbone):
            use_gradient_checkpointing(model)
    return Models(policy, discriminator)


def with_logprobs(work: Work, logprobs: Tensor) -> Work:
    """The rollouts with the log-probs [n, R] of their tokens."""
    return replace(work, logprobs=[tuple(row) for row in logprobs.tolist()])
