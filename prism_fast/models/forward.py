"""Plain padded forward of policy and discriminator: rows = prompt + continuation, right-padded.

The images of a prompt are encoded once per batch, however many rows share the prompt. An index gathers their features
into every row, and the gradients of all rows add up in the one encoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prism_fast.models.family import trunk
from prism_fast.models.positions import mrope_positions, text_positions
from prism_fast.models.processor import Prompt
from prism_fast.models.transfer import moved
from prism_fast.models.vision import encode_images, place_images


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """``B`` rows of at most ``S`` tokens; row ``b`` is prompt ``prompt_of_row[b]`` followed by continuation ``b``.

    ``input_ids`` ``[B, S]``, ``lengths`` ``[B]`` (prompt + continuation), ``prompt_lengths`` ``[B]``,
    ``position_ids`` ``[3, B, S]``, ``prompt_of_row`` ``[B]``: int64. ``pixel_values`` ``[patches, C·T·p·p]``
    float32 and ``image_grid_thw`` ``[images, 3]`` int64 hold the images of each distinct prompt once (``None``
    without images). ``image_slot`` ``[M]`` are the flat ``[B·S]`` positions of image tokens in ascending order and
    ``image_feature`` ``[M]`` the rows of the encoded images that belong there.
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    position_ids: Tensor
    prompt_of_row: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_slot: Tensor | None
    image_feature: Tensor | None

    @property
    def attention_mask(self) -> Tensor:
        """``[B, S]`` bool, true on tokens, false on padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def to(self, device: str | torch.device) -> TokenBatch:
        """The same batch with every tensor on ``device``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TokenBatch(**{k: moved(v, device) if isinstance(v, Tensor) else v for k, v in fields.items()})


class ResponseRows(NamedTuple):
    """The rows that predict continuation tokens: ``index`` ``[N]`` int64 into the flat ``[B·S]`` hidden states (one
    position before each continuation token), ``target`` ``[N]`` int64, ``cu_seqlens`` ``[B+1]`` int32 offsets per
    continuation."""

    index: Tensor
    target: Tensor
    cu_seqlens: Tensor


def collate(
    prompts: Sequence[Prompt],
    prompt_of_row: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    model_config: PreTrainedConfig,
    pad_id: int,
    positions: Literal["mrope", "text"] = "mrope",
) -> TokenBatch:
    """Lay out rows on the CPU. A prompt that no row uses costs nothing; an object that is listed twice is one prompt.

    ``positions="text"`` gives the published 1-D positions on all three axes instead of M-RoPE. Padding has position 0.

    Raises:
        ValueError: nothing to lay out, lengths that differ, an index outside ``prompts``, an empty prompt, image
            tokens in a continuation, or image tokens that do not match the grids or the model's patch size.
    """
    if positions not in ("mrope", "text"):
        raise ValueError(f"positions must be 'mrope' or 'text', got {positions!r}")
    rows = len(continuations)
    if rows == 0 or rows != len(prompt_of_row):
        raise ValueError(f"need one prompt index per continuation, got {len(prompt_of_row)} for {rows} continuations")
    if min(prompt_of_row) < 0 or max(prompt_of_row) >= len(prompts):
        raise ValueError(
            f"prompt_of_row must lie in [0, {len(prompts)}), got {min(prompt_of_row)}..{max(prompt_of_row)}"
        )

    used = {
        index: lay_out_prompt(index, prompts[index], model_config, positions) for index in dict.fromkeys(prompt_of_row)
    }
    lengths = np.array([used[p].ids.size + len(c) for p, c in zip(prompt_of_row, continuations, strict=True)])
    prompt_lengths = np.array([used[p].ids.size for p in prompt_of_row])
    width = int(lengths.max())
    input_ids = np.full((rows, width), pad_id, dtype=np.int64)
    position_ids = np.zeros((3, rows, width), dtype=np.int64)
    slots, features = [], []
    first_feature: dict[int, int] = {}  # by id of the prompt: its first row among the features of the batch
    with_images: list[Prompt] = []
    encoded = 0
    for b, (p, continuation) in enumerate(zip(prompt_of_row, continuations, strict=True)):
        prompt, n, end = used[p], int(prompt_lengths[b]), int(lengths[b])
        tail = continuation_ids(b, continuation, model_config)
        input_ids[b, :n] = prompt.ids
        input_ids[b, n:end] = tail
        position_ids[:, b, :n] = prompt.positions
        position_ids[:, b, n:end] = np.arange(prompt.next_position, prompt.next_position + end - n)
        slots.append(prompt.image_slot + b * width)
        if prompt.image_slot.size and id(prompts[p]) not in first_feature:
            first_feature[id(prompts[p])] = encoded
            with_images.append(prompts[p])
            encoded += prompt.image_slot.size
        start = first_feature.get(id(prompts[p]), 0)
        features.append(np.arange(start, start + prompt.image_slot.size))

    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        position_ids=torch.from_numpy(position_ids),
        prompt_of_row=torch.tensor(prompt_of_row, dtype=torch.int64),
        pixel_values=torch.cat([prompt.pixel_values for prompt in with_images]) if with_images else None,
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in with_images]) if with_images else None,
        image_slot=torch.from_numpy(np.concatenate(slots)) if with_images else None,
        image_feature=torch.from_numpy(np.concatenate(features)) if with_images else None,
    )


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """A prompt with everything that its rows share: ``ids`` ``[P]``, ``positions`` ``[3, P]``, the position that
    follows it, and ``image_slot``: the places of its image tokens, in the order of its encoded patches."""

    ids: np.ndarray
    positions: np.ndarray
    next_position: int
    image_slot: np.ndarray


def lay_out_prompt(
    index: int, prompt: Prompt, config: PreTrainedConfig, positions: Literal["mrope", "text"] = "mrope"
) -> PromptLayout:
    """Check one prompt against a model's configuration and number its tokens.

    Raises:
        ValueError: names prompt ``index``: it is empty, or its image tokens do not match its grids or the patch size.
    """
    vision = config.vision_config
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if not prompt.input_ids:
        raise ValueError(
            f"prompt {index} is empty: the first continuation token would have nothing to be predicted from"
        )
    if prompt.pixel_values is not None and prompt.pixel_values.shape[1] != patch_width:
        raise ValueError(
            f"prompt {index} has {prompt.pixel_values.shape[1]} values per patch but the model takes {patch_width} "
            "(channels x time x patch x patch): use the processor that was saved with the model"
        )
    try:
        placed, following = mrope_positions(prompt.input_ids, prompt.image_grid_thw, config)
    except ValueError as error:
        raise ValueError(f"prompt {index}: {error}") from error
    if positions == "text":
        placed, following = text_positions(len(prompt.input_ids))
    ids = np.asarray(prompt.input_ids, dtype=np.int64)
    return PromptLayout(ids, placed.numpy(), following, np.flatnonzero(ids == config.image_token_id))


def continuation_ids(index: int, continuation: Sequence[int], config: PreTrainedConfig) -> np.ndarray:
    """``[n]`` int64. Raises ValueError naming continuation ``index`` if it holds an image token."""
    ids = np.asarray(continuation, dtype=np.int64)
    if (ids == config.image_token_id).any():
        raise ValueError(
            f"continuation {index} holds an image token ({config.image_token_id}): vision tokens must not be sampled"
        )
    return ids


def language_outputs(backbone: nn.Module, batch: TokenBatch, **kwargs: bool | Tensor) -> NamedTuple:
    """Output of the backbone's language model (``last_hidden_state`` ``[B, S, H]`` after the final norm) for a batch.

    ``backbone`` is a ``Qwen3VLModel`` or ``Qwen3VLMoeModel``. Its own forward is not used: it would encode the image of
    every row, and passes text arguments to the vision tower.
    """
    embeds = trunk(backbone).embed_tokens(batch.input_ids)
    visual: dict[str, object] = {}
    if batch.pixel_values is not None:
        encoded = encode_images(backbone, batch.pixel_values, batch.image_grid_thw)
        embeds, visual = place_images(embeds, encoded.take(batch.image_feature), batch.image_slot)
    return trunk(backbone)(
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        # No mask: rows are right-padded and attention is causal, so no token sees padding, and the kernel that needs no
        # mask is 1.1x faster over the whole step on the CPU. (Positions have three axes, so transformers does not
        # look for packed sequences in them either.)
        attention_mask=None,
        use_cache=False,
        **visual,
        **kwargs,
    )


def hidden_states(backbone: nn.Module, batch: TokenBatch) -> Tensor:
    """Final-norm hidden states ``[B, S, H]`` in the model's dtype; those of padding are meaningless. Gradients reach
    the vision tower, which encodes each distinct prompt once."""
    return language_outputs(backbone, batch).last_hidden_state


def response_rows(batch: TokenBatch) -> ResponseRows:
    """Rows of the flat ``[B·S]`` hidden states that predict the continuation tokens, row by row and left to right."""
    width = batch.input_ids.shape[1]
    column = torch.arange(width, device=batch.lengths.device)
    wanted = (column >= batch.prompt_lengths[:, None]) & (column < batch.lengths[:, None])
    token = wanted.view(-1).nonzero().squeeze(1)
    counts = batch.lengths - batch.prompt_lengths
    cu_seqlens = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    cu_seqlens[1:] = counts.cumsum(0)
    return ResponseRows(token - 1, batch.input_ids.view(-1)[token], cu_seqlens)
