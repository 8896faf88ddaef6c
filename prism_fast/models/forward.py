"""Plain padded forward of policy and discriminator: rows = prompt + continuation, right-padded.

The image of a prompt is encoded once per batch however many rows share the prompt; its features are gathered by
index into every row, and gradients of all rows meet in the one encoding.
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

from prism_fast.models.positions import mrope_positions, text_positions
from prism_fast.models.processor import EncodedPrompt


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
        return TokenBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()})


class ResponseRows(NamedTuple):
    """Where continuation tokens are predicted: ``index`` ``[N]`` int64 into the flat ``[B·S]`` rows (the hidden
    state one position before each continuation token), ``target`` ``[N]`` int64, ``cu_seqlens`` ``[B+1]`` int32
    offsets per row."""

    index: Tensor
    target: Tensor
    cu_seqlens: Tensor


def collate(
    prompts: Sequence[EncodedPrompt],
    prompt_of_row: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    model_config: PreTrainedConfig,
    pad_id: int,
    positions: Literal["mrope", "text"] = "mrope",
) -> TokenBatch:
    """Lay out rows on the CPU. A prompt that no row uses costs nothing; one object listed twice counts as one prompt.

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

    image_token = model_config.image_token_id
    used = _laid_out_prompts(prompts, prompt_of_row, model_config, positions)
    lengths = np.array([used[p].ids.size + len(c) for p, c in zip(prompt_of_row, continuations, strict=True)])
    prompt_lengths = np.array([used[p].ids.size for p in prompt_of_row])
    width = int(lengths.max())
    input_ids = np.full((rows, width), pad_id, dtype=np.int64)
    position_ids = np.zeros((3, rows, width), dtype=np.int64)
    slots, features = [], []
    for b, (p, continuation) in enumerate(zip(prompt_of_row, continuations, strict=True)):
        prompt, n, end = used[p], int(prompt_lengths[b]), int(lengths[b])
        tail = np.asarray(continuation, dtype=np.int64)
        if (tail == image_token).any():
            raise ValueError(
                f"continuation {b} holds an image token ({image_token}): vision tokens must not be sampled"
            )
        input_ids[b, :n] = prompt.ids
        input_ids[b, n:end] = tail
        position_ids[:, b, :n] = prompt.positions
        position_ids[:, b, n:end] = np.arange(prompt.next_position, prompt.next_position + end - n)
        slots.append(prompt.image_slot + b * width)
        features.append(prompt.image_feature)

    with_images = [prompt for prompt in used.values() if prompt.pixel_values is not None]
    distinct = list({id(prompt): prompt for prompt in with_images}.values())
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        position_ids=torch.from_numpy(position_ids),
        prompt_of_row=torch.tensor(prompt_of_row, dtype=torch.int64),
        pixel_values=torch.cat([prompt.pixel_values for prompt in distinct]) if distinct else None,
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in distinct]) if distinct else None,
        image_slot=torch.from_numpy(np.concatenate(slots)) if distinct else None,
        image_feature=torch.from_numpy(np.concatenate(features)) if distinct else None,
    )


@dataclass(frozen=True, eq=False)
class _LaidOutPrompt:
    """A prompt with everything that its rows share; ``image_feature`` counts from the first feature of the batch."""

    ids: np.ndarray
    positions: np.ndarray
    next_position: int
    image_slot: np.ndarray
    image_feature: np.ndarray
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None


def _laid_out_prompts(
    prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int], config: PreTrainedConfig, positions: str
) -> dict[int, _LaidOutPrompt]:
    """Prompts that rows use, by index, in order of first use; equal objects share one entry and one image encoding."""
    vision = config.vision_config
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    by_index: dict[int, _LaidOutPrompt] = {}
    by_object: dict[int, _LaidOutPrompt] = {}
    features = 0
    for index in dict.fromkeys(prompt_of_row):
        prompt = prompts[index]
        if id(prompt) in by_object:
            by_index[index] = by_object[id(prompt)]
            continue
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
            mrope, following = mrope_positions(prompt.input_ids, prompt.image_grid_thw, config)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
        if positions == "text":
            mrope, following = text_positions(len(prompt.input_ids))
        ids = np.asarray(prompt.input_ids, dtype=np.int64)
        slot = np.flatnonzero(ids == config.image_token_id)
        laid_out = _LaidOutPrompt(
            ids=ids,
            positions=mrope.numpy(),
            next_position=following,
            image_slot=slot,
            image_feature=np.arange(features, features + slot.size),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        )
        features += slot.size
        by_index[index] = by_object[id(prompt)] = laid_out
    return by_index


def language_outputs(backbone: nn.Module, batch: TokenBatch, **kwargs: bool) -> NamedTuple:
    """Output of ``backbone.language_model`` (``last_hidden_state`` ``[B, S, H]`` after the final norm) for a batch.

    ``backbone`` is a ``Qwen3VLModel`` or ``Qwen3VLMoeModel``. It is not called as a whole: its own forward would encode
    the image of every row, and leaks text arguments into the vision tower.
    """
    embeds = backbone.language_model.embed_tokens(batch.input_ids)
    visual: dict[str, object] = {}
    if batch.pixel_values is not None:
        rows, width, hidden = embeds.shape
        encoded = backbone.get_image_features(batch.pixel_values, batch.image_grid_thw, return_dict=True)
        features = torch.cat(tuple(encoded.pooler_output)).to(embeds.dtype)
        embeds = embeds.reshape(rows * width, hidden).index_copy(0, batch.image_slot, features[batch.image_feature])
        embeds = embeds.view(rows, width, hidden)
        at_image = torch.zeros(rows * width, dtype=torch.bool, device=embeds.device)
        at_image[batch.image_slot] = True
        visual = {
            "visual_pos_masks": at_image.view(rows, width),
            "deepstack_visual_embeds": [level[batch.image_feature] for level in encoded.deepstack_features],
        }
    return backbone.language_model(
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
    """Final-norm hidden states ``[B, S, H]`` in the model's dtype; rows of padding hold no meaning. Gradients reach the
    vision tower, which runs once per distinct prompt."""
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
