"""Packed rows ``[prompt with image | branch | branch | …]``: what continuations of one prompt share is computed once.

A prompt with a single branch shares nothing: both are one segment, an ordinary sequence (all rows of SFT are such). A
branch sees its prompt and itself; its positions continue from the prompt's largest one; its first token is predicted
by the prompt's last row, whose hidden state is therefore read once per branch. The result is that of
``models.forward``, where the prompt is repeated in front of every continuation; tokens fall from n(P + R) to P + nR.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prism_fast.models.family import trunk
from prism_fast.models.forward import PromptLayout, ResponseRows, continuation_ids, lay_out_prompt
from prism_fast.models.processor import Prompt
from prism_fast.models.shared_prefix import require_shared_prefix
from prism_fast.models.transfer import moved
from prism_fast.models.vision import ImageFeatures, encode_images, place_images
from prism_fast.ops import PrefixLayout, prepare_prefix_layout

Branch = tuple[int, int]  # (group, number of the branch in its group)


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """A prompt and its continuations; ``None`` stands for one that is not computed (an invalid rollout, one whose
    gradient is zero), so that the numbers of the others stay."""

    prompt: Prompt
    branches: Sequence[Sequence[int] | None]


@dataclass(frozen=True, eq=False)
class PackedRow:
    """``T`` tokens of one or several (sub-)groups; ``B`` branches of ``N`` tokens together.

    ``input_ids`` ``[1, T]``, ``position_ids`` ``[3, 1, T]`` int64; ``layout``: who sees whom. ``branches``: which
    branch stands at which place, in the order of everything below. ``predict``: the rows that predict the branches'
    tokens (the first one of a branch by the last row of its prompt). ``span_end`` ``[B]`` int64: the last row of each
    branch (of its prompt for an empty one). ``branch`` ``[T]`` int64: which of the B branches a token belongs to, -1: a
    prompt. ``copies`` ``[T]`` int64: how often a token would be computed without sharing. ``prompts``: the distinct
    prompts with images, ``image_slot`` ``[M]`` the rows of their image tokens in ascending order and ``image_feature``
    ``[M]`` the features that belong there, counted over ``prompts``; None without images.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PrefixLayout
    branches: tuple[Branch, ...]
    predict: ResponseRows
    span_end: Tensor
    branch: Tensor
    copies: Tensor
    prompts: tuple[Prompt, ...]
    image_slot: Tensor | None
    image_feature: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes."""
        return self.input_ids.shape[1]

    def to(self, device: str | torch.device) -> PackedRow:
        """The same row with every tensor on ``device`` (pixels follow when they are encoded)."""
        fields = {f.name: _move(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        return PackedRow(**fields)


def _move(value: object, device: str | torch.device) -> object:
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, (PrefixLayout, ResponseRows)):
        return type(value)(*(_move(part, device) for part in value))
    return value


def pack(
    groups: Sequence[PromptGroup],
    budget: int,
    *,
    model_config: PreTrainedConfig,
    positions: Literal["mrope", "text"] = "mrope",
) -> list[PackedRow]:
    """Lay groups out in rows of at most ``budget`` tokens, on the CPU. A prompt is charged once per row.

    A group that does not fit is cut into sub-groups that repeat its prompt, in rows that follow each other; the
    branches of a group may therefore stand in several rows. A prompt with one branch that is longer than the budget
    stands alone. Groups without branches are left out. The result of training does not depend on the cut.

    Raises:
        ValueError: a budget under 1, and what ``models.forward.collate`` refuses.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be 1 or more, got {budget}")
    if positions not in ("mrope", "text"):
        raise ValueError(f"positions must be 'mrope' or 'text', got {positions!r}")
    used = [g for g, group in enumerate(groups) if any(branch is not None for branch in group.branches)]
    prompts = {g: lay_out_prompt(g, groups[g].prompt, model_config, positions) for g in used}
    return [_row([(groups[u.group], prompts[u.group], u) for u in row], model_config) for row in _rows(groups, budget)]


class _Unit(NamedTuple):
    """Branches of one group that stand behind one copy of their prompt."""

    group: int
    branches: tuple[int, ...]
    tokens: int


def _rows(groups: Sequence[PromptGroup], budget: int) -> list[list[_Unit]]:
    """Whole groups into the first row with room, largest first; sub-groups of a cut group each open a row."""
    whole: list[_Unit] = []
    rows: list[list[_Unit]] = []
    for g, group in enumerate(groups):
        lengths = {b: len(branch) for b, branch in enumerate(group.branches) if branch is not None}
        prompt = len(group.prompt.input_ids)
        if not lengths:
            continue
        if prompt + sum(lengths.values()) <= budget:
            whole.append(_Unit(g, tuple(lengths), prompt + sum(lengths.values())))
            continue
        parts: list[list[int]] = []
        for b in sorted(lengths, key=lambda b: (-lengths[b], b)):
            fitting = (part for part in parts if prompt + lengths[b] + sum(lengths[i] for i in part) <= budget)
            part = next(fitting, None)
            if part is None:
                parts.append([b])
            else:
                part.append(b)
        rows += [[_Unit(g, tuple(sorted(part)), prompt + sum(lengths[b] for b in part))] for part in parts]
    for unit in sorted(whole, key=lambda u: (-u.tokens, u.group)):
        fitting = (row for row in rows if unit.tokens + sum(u.tokens for u in row) <= budget)
        row = next(fitting, None)
        if row is None:
            rows.append([unit])
        else:
            row.append(unit)
    return rows


def _row(units: list[tuple[PromptGroup, PromptLayout, _Unit]], config: PreTrainedConfig) -> PackedRow:
    ids, positions, owner, copies, slots, features = [], [], [], [], [], []
    cu, branch_prefix, prefix_start, prefix_len, followers = [0], [], [], [], []
    branches: list[Branch] = []
    predict, target, counts, span_end = [], [], [], []
    first_feature: dict[int, int] = {}
    prompts: list[Prompt] = []
    encoded = 0
    for group, prompt, unit in units:
        start, length = cu[-1], prompt.ids.size
        if prompt.image_slot.size and id(group.prompt) not in first_feature:
            first_feature[id(group.prompt)] = encoded
            prompts.append(group.prompt)
            encoded += prompt.image_slot.size
        at = first_feature.get(id(group.prompt), 0)
        slots.append(prompt.image_slot + start)
        features.append(np.arange(at, at + prompt.image_slot.size))
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        owner.append(np.full(length, -1))
        copies.append(np.full(length, len(unit.branches)))
        shared = len(unit.branches) > 1
        if shared:
            prefix_start.append(start)
            prefix_len.append(length)
            followers.append(unit.tokens - length)
            branch_prefix.append(-1)
            cu.append(start + length)
        begin = start + length
        last = begin - 1  # the row that predicts every branch's first token
        for b in unit.branches:
            tail = continuation_ids(b, group.branches[b], config)
            n = tail.size
            ids.append(tail)
            positions.append(np.tile(np.arange(prompt.next_position, prompt.next_position + n), (3, 1)))
            owner.append(np.full(n, len(branches)))
            copies.append(np.ones(n, dtype=np.int64))
            branch_prefix.append(len(prefix_start) - 1 if shared else -1)
            cu.append(begin + n)
            branches.append((unit.group, b))
            predict.append(np.concatenate(([last], np.arange(begin, begin + n - 1)))[:n])
            target.append(tail)
            counts.append(n)
            span_end.append(begin + n - 1 if n else last)
            begin += n
    lengths = np.diff(cu)
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1))[:, None],
        layout=PrefixLayout(
            *(torch.tensor(x, dtype=torch.int32) for x in (cu, prefix_start, prefix_len, branch_prefix)),
            max_prefix=max(prefix_len, default=0),
            max_branch=int(lengths.max()),
            max_queries=max(followers, default=0),
        ),
        branches=tuple(branches),
        predict=ResponseRows(
            torch.from_numpy(np.concatenate(predict)),
            torch.from_numpy(np.concatenate(target)),
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        ),
        span_end=torch.tensor(span_end),
        branch=torch.from_numpy(np.concatenate(owner)),
        copies=torch.from_numpy(np.concatenate(copies)),
        prompts=tuple(prompts),
        image_slot=torch.from_numpy(np.concatenate(slots)) if prompts else None,
        image_feature=torch.from_numpy(np.concatenate(features)) if prompts else None,
    )


class SharedImages:
    """Images of prompts that stand in several rows, encoded once.

    A row reads copies of the features that are cut off from the vision tower; ``finish`` sends the gradients that all
    rows left there through it, once, behind the last of them. Rows must come in the order of ``pack`` for the features
    to live no longer than needed. Images of a prompt in one row alone are not kept here. One object serves one pass
    over the rows, and a pass without gradient before it over those that were announced.
    """

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        counts = Counter(id(prompt) for row in rows for prompt in row.prompts)
        self._rows_left = {key: n for key, n in counts.items() if n > 1}
        self._encoded: dict[int, tuple[ImageFeatures, ImageFeatures]] = {}  # with graph; the leaves rows read
        self._announced: set[int] = set()

    def announce(self, rows: Sequence[PackedRow]) -> None:
        """These rows are computed without gradient first and learned from afterwards: the first pass encodes their
        images with the graph that the second one needs."""
        for prompt in (prompt for row in rows for prompt in row.prompts):
            self._rows_left.setdefault(id(prompt), 1)
            self._announced.add(id(prompt))

    def encode(self, backbone: nn.Module, row: PackedRow) -> ImageFeatures:
        """The features of ``row.prompts``, in order."""
        missing = [prompt for prompt in row.prompts if id(prompt) not in self._encoded]
        found = dict(self._encoded)
        if missing:
            learned = torch.is_grad_enabled() or all(id(prompt) in self._announced for prompt in missing)
            with torch.set_grad_enabled(learned):
                encoded = _encode(backbone, missing, row.input_ids.device)
            for prompt, fresh in zip(missing, encoded, strict=True):
                found[id(prompt)] = (fresh, fresh)
                if id(prompt) in self._rows_left:
                    found[id(prompt)] = self._encoded[id(prompt)] = (fresh, _map(_leaf, fresh))
        return _join([found[id(prompt)][1] for prompt in row.prompts])

    def finish(self, row: PackedRow, backward: Callable[[Tensor], object]) -> None:
        """To be called after the row's own backward (or without one: ``backward`` is then not called).

        ``backward`` gets a 0-d tensor whose gradient is that of all rows with respect to the images of the prompts
        that no later row holds: the same function that the losses go to.
        """
        parts = []
        for prompt in row.prompts:
            if id(prompt) not in self._rows_left:
                continue
            self._rows_left[id(prompt)] -= 1
            if self._rows_left[id(prompt)] == 0:
                encoded, leaves = self._encoded.pop(id(prompt))
                for value, leaf in zip(
                    (encoded.features, *encoded.levels), (leaves.features, *leaves.levels), strict=True
                ):
                    if leaf.grad is not None:
                        parts.append((value * leaf.grad).sum(dtype=torch.float64))
        if parts:
            backward(torch.stack(parts).sum())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _map(function: Callable[[Tensor], Tensor], images: ImageFeatures) -> ImageFeatures:
    return ImageFeatures(function(images.features), tuple(function(level) for level in images.levels))


def _join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    if len(parts) == 1:
        return parts[0]
    levels = zip(*(part.levels for part in parts), strict=True)
    return ImageFeatures(torch.cat([part.features for part in parts]), tuple(torch.cat(level) for level in levels))


def _encode(backbone: nn.Module, prompts: Sequence[Prompt], device: torch.device) -> list[ImageFeatures]:
    """The features of each prompt, by one pass of the vision tower."""
    grids = torch.cat([prompt.image_grid_thw for prompt in prompts])
    pixels = torch.cat([prompt.pixel_values for prompt in prompts])
    encoded = encode_images(backbone, moved(pixels, device), moved(grids, device))
    merged = backbone.config.vision_config.spatial_merge_size**2
    counts = [int(prompt.image_grid_thw.prod(-1).sum()) // merged for prompt in prompts]
    levels = (
        zip(*(level.split(counts) for level in encoded.levels), strict=True) if encoded.levels else [()] * len(counts)
    )
    return [ImageFeatures(*parts) for parts in zip(encoded.features.split(counts), levels, strict=True)]


def packed_outputs(
    backbone: nn.Module, row: PackedRow, images: SharedImages | None = None, **kwargs: bool | Tensor
) -> NamedTuple:
    """Output of the backbone's language model for a packed row; ``last_hidden_state`` ``[1, T, H]`` is final-norm.

    ``backbone`` is a ``Qwen3VLModel`` or ``Qwen3VLMoeModel`` with attention ``"prism_shared_prefix"``. Without
    ``images`` the row's images are encoded here.

    Raises:
        ValueError: another attention implementation is selected.
    """
    language_model = trunk(backbone)
    require_shared_prefix(language_model)
    embeds = language_model.embed_tokens(row.input_ids)  # [1, T, H]
    visual: dict[str, object] = {}
    if row.prompts:
        encoded = (SharedImages([]) if images is None else images).encode(backbone, row)
        embeds, visual = place_images(embeds, encoded.take(row.image_feature), row.image_slot)
    return language_model(
        inputs_embeds=embeds,
        # Three axes, no mask, no cache: transformers infers nothing about packing from them.
        position_ids=row.position_ids,
        attention_mask=None,
        use_cache=False,
        prefix_layout=_prepared(row.layout, embeds, language_model.config),
        **visual,
        **kwargs,
    )


def _prepared(layout: PrefixLayout, embeds: Tensor, config: PreTrainedConfig) -> PrefixLayout:
    """What is the same for all layers, made once."""
    device = embeds.device.type
    cast = torch.is_autocast_enabled(device)
    return prepare_prefix_layout(
        layout,
        tokens=embeds.shape[1],
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        width=config.head_dim,
        dtype=torch.get_autocast_dtype(device) if cast else embeds.dtype,
    )


def packed_hidden_states(backbone: nn.Module, row: PackedRow, images: SharedImages | None = None) -> Tensor:
    """Final-norm hidden states ``[T, H]`` of a packed row in the model's dtype; see :func:`packed_outputs`."""
    return packed_outputs(backbone, row, images).last_hidden_state[0]
