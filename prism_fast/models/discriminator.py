"""The discriminator: a stock Qwen3-VL-MoE backbone with a scalar head read at the last token of a span.

On disk it has the layout of the released checkpoints: base keys and ``v_head.1.weight`` in the same safetensors,
experts as in hub files (``[E, H, 2I]`` and ``[E, I, H]``; transformers 5 has them transposed in memory), and a
``value_head.pt`` for TRL-style readers that is written but never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeModel,
)

from prism_fast.models.checkpoints import (
    check_loading,
    read_model_type,
    without_load_report,
)
from prism_fast.models.experts import use_prism_experts
from prism_fast.models.family import family_of
from prism_fast.models.forward import TokenBatch, language_outputs
from prism_fast.models.patch_embedding import use_linear_patch_embedding
from prism_fast.models.score_head import HEAD_KEY, ScoreHead, read_head, write_side_head
from prism_fast.models.score_rows import states_at, use_score_rows
from prism_fast.models.shards import save_shards
from prism_fast.models.upcycle import refuse_square_experts, upcycle
from prism_fast.models.vision_attention import use_batched_vision_attention

if TYPE_CHECKING:
    from prism_fast.models.processor import Processor

HEAD_STD = 0.02
# Of no use to a reader, and the first of them may be the path of a machine.
_GENERIC_FIELDS = frozenset(PreTrainedConfig().to_dict()) - {"model_type", "dtype", "transformers_version"}
EXPERT_KEYS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


class SpanScores(NamedTuple):
    """``score`` ``[B]`` float32 (float64 for a float64 model); ``hidden`` ``[B, H]``: the scored final-norm states;
    ``router_logits``: raw logits per sparse layer, each ``[B·S, E]`` with padding included, ``None`` if no layer is
    sparse."""

    score: Tensor
    hidden: Tensor
    router_logits: tuple[Tensor, ...] | None


class Discriminator(nn.Module):
    """``backbone`` and ``v_head = Sequential(Dropout, ScoreHead)``.

    The head computes in float32 whatever the backbone's dtype or an ambient autocast (float64 for a float64
    backbone). ``head_in_float32=False`` leaves the backbone's dtype and autocast in force, as published (bfloat16).
    ``head_dropout``: 0 here, 0.1 published; it acts in train mode only. The head starts as 0.
    """

    def __init__(self, backbone: Qwen3VLMoeModel, *, head_dropout: float = 0.0, head_in_float32: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        hidden_size = backbone.config.text_config.hidden_size
        head = ScoreHead(hidden_size, device=backbone.device)
        self.v_head = nn.Sequential(nn.Dropout(head_dropout), head)
        self.head_in_float32 = head_in_float32
        use_prism_experts(self.backbone)
        use_score_rows(self.backbone)

    @torch.no_grad()
    def set_head(self, head: Tensor) -> None:
        """Copy the values of ``head`` [1, H]."""
        self.v_head[1].weight.copy_(head)

    def forward(self, batch: TokenBatch, *, last: Tensor | None = None) -> SpanScores:
        """Score every row of ``batch`` at ``last`` ``[B]`` (index into the right-padded row; default: its last
        token)."""
        last = batch.lengths - 1 if last is None else last
        rows = torch.arange(len(last), device=last.device) * batch.input_ids.shape[1] + last  # [B], into B·S
        run = partial(language_outputs, self.backbone, batch, output_router_logits=True)
        hidden, out = states_at(self.backbone, rows, run)  # [B, H]
        return SpanScores(self.score_hidden(hidden), hidden, out.router_logits)

    def score_hidden(self, hidden: Tensor) -> Tensor:
        """Head alone, ``[..., H]`` to ``[...]``: dropout (in train mode) and one dot product per row."""
        dropout, head = self.v_head
        if not self.head_in_float32:
            return head(dropout(hidden), as_published=True)
        with torch.autocast(hidden.device.type, enabled=False):
            return head(dropout(hidden.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)))


def build_discriminator(
    policy: Qwen3VLForConditionalGeneration,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
    head_std: float = HEAD_STD,
    head_dropout: float = 0.0,
    seed: int,
) -> Discriminator:
    """Upcycle ``policy`` (see :func:`prism_fast.models.upcycle.upcycle`) and put a head ``N(0, head_std²)`` on it. The
    language-model head is dropped; ``seed`` decides every random number."""
    moe = upcycle(policy, num_experts=num_experts, top_k=top_k, noise_std=noise_std, router_std=router_std, seed=seed)
    discriminator = Discriminator(moe.model, head_dropout=head_dropout)
    discriminator.set_head(new_head(moe.config, head_std, seed))
    return discriminator


def new_head(config: Qwen3VLMoeConfig, head_std: float, seed: int) -> Tensor:
    """[1, H], ``N(0, head_std²)``."""
    generator = torch.Generator().manual_seed(seed + 1)  # the experts are drawn from seed itself
    return torch.randn((1, config.text_config.hidden_size), generator=generator) * head_std


def load_discriminator(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    head_dropout: float = 0.0,
    head_in_float32: bool = True,
) -> Discriminator:
    """Read a released or own discriminator folder: safetensors only, one file or shards, either expert layout. The
    head stays float32 (float64 if ``dtype`` is); a language-model head in the file is not needed and not loaded.

    Raises:
        FileNotFoundError: the folder, its ``config.json`` or its weights are missing.
        ValueError: another architecture, no score head (the file and the key are named; a random head would poison
            every reward), square expert tensors, tensors that are missing, unexpected or of another shape.
    """
    folder = Path(path)
    family = family_of("discriminator", read_model_type(folder), folder)
    config = family.discriminator_config.from_pretrained(folder, local_files_only=True)
    refuse_square_experts(config.text_config.hidden_size, config.text_config.moe_intermediate_size)
    head = read_head(folder, config.text_config.hidden_size)
    with without_load_report():
        backbone, info = family.discriminator.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that check_loading reports every offender at once instead of the first
            output_loading_info=True,
        )
    check_loading(folder, info, ignore_unexpected=frozenset({HEAD_KEY, "lm_head.weight"}))
    use_linear_patch_embedding(backbone)
    use_batched_vision_attention(backbone)
    discriminator = Discriminator(backbone, head_dropout=head_dropout, head_in_float32=head_in_float32)
    discriminator.v_head.to(dtype if dtype == torch.float64 or not head_in_float32 else torch.float32)
    discriminator.set_head(head)
    return discriminator.to(device)


def save_discriminator(
    model: Discriminator,
    processor: Processor | None,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the released layout: sharded safetensors with base keys, hub-layout experts and ``v_head.1.weight``, a
    configuration that transformers 4.57 and 5 both read, ``value_head.pt``, and the processor's files if one is
    given. ``weights``: by the names of the model's parameters, where they are not in the model."""
    if weights is None:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    named = (
        (f"model.{name.removeprefix('backbone.')}", tensor)
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    )
    head = weights["v_head.1.weight"]
    write_discriminator(named, head, model.backbone.config, model.backbone.dtype, processor, path)


def write_discriminator(
    named: Iterable[tuple[str, Tensor]],
    head: Tensor,
    config: Qwen3VLMoeConfig,
    dtype: torch.dtype,
    processor: Processor | None,
    path: str | Path,
) -> None:
    """:func:`save_discriminator` from an iterator of names and weights as in transformers 5, so that they need not all
    be in memory."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            yield name, tensor.transpose(1, 2) if name.endswith(EXPERT_KEYS) else tensor
        yield HEAD_KEY, head

    save_shards(stored(), folder)
    write_side_head(head, folder)
    released = released_config(config, dtype)
    (folder / "config.json").write_text(json.dumps(released, indent=2, sort_keys=True) + "\n")
    if processor is not None:
        processor.save_pretrained(folder)


def released_config(config: Qwen3VLMoeConfig, dtype: torch.dtype) -> dict:
    """``config.json`` under the names that transformers 4.57 reads (transformers 5 reads them too). Embeddings count as
    tied because the file holds no language-model head."""
    plain = json.loads(config.to_json_string(use_diff=False))
    released = {key: value for key, value in plain.items() if key not in _GENERIC_FIELDS}
    for part in ("text_config", "vision_config"):
        released[part] = {key: value for key, value in plain[part].items() if key not in _GENERIC_FIELDS}
    text = released["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    text["num_experts"] = text.pop("num_local_experts")
    text["tie_word_embeddings"] = released["tie_word_embeddings"] = True
    released["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    released["dtype"] = str(dtype).removeprefix("torch.")
    return released


def load_balance_loss(
    router_logits: tuple[Tensor, ...],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
    *,
    double_softmax: bool = False,
    choices: Tensor | None = None,
) -> Tensor:
    """Switch Transformer load balancing, jointly over layers: ``E · Σ_e f_e · P_e``, 0-d float32 (float64 for float64).

    ``f_e``: how often expert ``e`` is chosen, per token and layer (they sum to ``top_k``); ``P_e``: mean routing
    probability. Perfect balance gives ``top_k``. Padding is excluded.

    Args:
        router_logits: raw logits per layer, ``[B·S, E]`` each.
        attention_mask: ``[B, S]`` (or flat), nonzero on tokens.
        double_softmax: apply a second softmax, as happens where a router reports probabilities as logits.
        choices: ``[E]``, :func:`expert_choices` of a whole step of which these logits are one micro-batch. The losses
            of its micro-batches, and their gradients, then sum to those of the whole step: the loss is a product of two
            means over the step, and no gradient flows through the first.
    """
    probs, weight = _routing(router_logits, num_experts, attention_mask, double_softmax)
    if choices is None:
        choices = _choices(probs, weight, top_k)
    rows = choices.sum() / top_k  # tokens x layers
    mean_prob = torch.einsum("lte,t->e", probs, weight) / rows
    return num_experts * (choices / rows * mean_prob).sum()


def expert_choices(
    router_logits: tuple[Tensor, ...], num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """``[E]``: how often each expert is chosen, over tokens and layers; counts of micro-batches add up. Arguments as in
    :func:`load_balance_loss`."""
    probs, weight = _routing(router_logits, num_experts, attention_mask, False)
    return _choices(probs, weight, top_k)


def _routing(
    router_logits: tuple[Tensor, ...], num_experts: int, attention_mask: Tensor | None, double_softmax: bool
) -> tuple[Tensor, Tensor]:
    """Probabilities ``[layers, B·S, E]`` and the weight of each token ``[B·S]``: 1, or 0 on padding."""
    logits = torch.stack(router_logits)  # [layers, B·S, E]
    if logits.shape[-1] != num_experts:
        raise ValueError(f"router logits have {logits.shape[-1]} experts, expected {num_experts}")
    probs = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).softmax(-1)
    if double_softmax:
        probs = probs.softmax(-1)
    if attention_mask is None:
        return probs, probs.new_ones(probs.shape[1])
    return probs, attention_mask.reshape(-1).to(probs.dtype)


def _choices(probs: Tensor, weight: Tensor, top_k: int) -> Tensor:
    chosen = torch.zeros_like(probs).scatter_(-1, probs.topk(top_k, dim=-1).indices, 1.0)
    return torch.einsum("lte,t->e", chosen, weight)
