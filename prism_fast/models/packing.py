"""Packed rows ``[prompt with image | branch | branch | …]``: a prompt is computed once for all its continuations.

A branch sees its prompt and itself; its positions continue from the prompt's largest one; the prompt's last token
predicts its first token, so that hidden state is read once per branch. A prompt with a single branch is laid out as one
ordinary sequence (as all rows of SFT are). The result is that of ``models.forward``, where the prompt is repeated in
front of every continuation; tokens fall from n(P + R) to P + nR.
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
    """A prompt and its continuations. One that is not computed (an invalid rollout, or one whose gradient is zero) is
    ``None``, so that the indices of the others do not change."""

    prompt: Prompt
    branches: Sequence[Sequence[int] | None]


@dataclass(frozen=True, eq=False)
class PackedRow:
    """``T`` tokens of one or several (sub-)groups; ``B`` branches of ``N`` tokens together.

    ``input_ids`` ``[1, T]``, ``position_ids`` ``[3, 1, T]`` int64; ``layout``: which tokens see each other.
    ``branches``: the B branches in the order that the other fields use. ``predict``: the positions that predict the
    branches' tokens (the first token of a branch: the last position of its prompt). ``span_end`` ``[B]`` int64: the
    last position of each branch (of its prompt for an empty one). ``branch`` ``[T]`` int64: the branch of each token,
    -1 in a prompt. ``copies`` ``[T]`` int64: how often the padded layout would compute each token. ``prompts``: the
    distinct prompts with images; ``image_slot`` ``[M]``: positions of their image tokens, ascending; ``image_feature``
    ``[M]``: the index of each one's feature over all ``prompts``; both None without images.
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
        """The same row with every tensor on ``device`` (pixels are moved when they are encoded)."""
        fields = {f.name: _move(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        return PackedRow(**fields)


def _move(value: object, device: str | torch.device) -> object:
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, (PrefixLayout, ResponseRows)):
        return type(value)(*(_move(field, device) for field in value))
    return value


def pack(
    groups: Sequence[PromptGroup],
    budget: int,
    *,
    model_config: PreTrainedConfig,
    positions: Literal["mrope", "text"] = "mrope",
) -> list[PackedRow]:
    """Lay groups out in rows of at most ``budget`` tokens, on the CPU. A prompt is charged once per row.

    A group that does not fit is cut into sub-groups, which repeat its prompt in consecutive rows. A prompt with one
    branch that is longer than the budget gets a row of its own. Groups without branches are left out. The result of
    training does not depend on the cut.

    Raises:
        ValueError: a budget under 1, and what ``models.forward.collate`` refuses.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be 1 or more, got {budget}")
    if positions not in ("mrope", "text"):
        raise ValueError(f"positions must be 'mrope' or 'text', got {positions!r}")
    used = [g for g, group in enumerate(groups) if any(branch is not None for branch in group.branches)]
    prompts = {g: lay_out_prompt(g, groups[g].prompt, model_config, positions) for g in used}
    return [_row([(groups[s.group], prompts[s.group], s) for s in row], model_config) for row in _rows(groups, budget)]


class _SubGroup(NamedTuple):
    """Branches of one group that share one copy of their prompt."""

    group: int
    branches: tuple[int, ...]
    tokens: int


def _rows(groups: Sequence[PromptGroup], budget: int) -> list[list[_SubGroup]]:
    """Whole groups go into the first row with room, largest first; each sub-group of a cut group opens a row."""
    whole: list[_SubGroup] = []
    rows: list[list[_SubGroup]] = []
    for g, group in enumerate(groups):
        lengths = {b: len(branch) for b, branch in enumerate(group.branches) if branch is not None}
        prompt = len(group.prompt.input_ids)
        if not lengths:
            continue
        if prompt + sum(lengths.values()) <= budget:
            whole.append(_SubGroup(g, tuple(lengths), prompt + sum(lengths.values())))
            continue
        cuts: list[list[int]] = []
        for b in sorted(lengths, key=lambda b: (-lengths[b], b)):
            fitting = (cut for cut in cuts if prompt + lengths[b] + sum(lengths[i] for i in cut) <= budget)
            cut = next(fitting, None)
            if cut is None:
                cuts.append([b])
            else:
                cut.append(b)
        rows += [[_SubGroup(g, tuple(sorted(cut)), prompt + sum(lengths[b] for b in cut))] for cut in cuts]
    for group in sorted(whole, key=lambda s: (-s.tokens, s.group)):
        fitting = (row for row in rows if group.tokens + sum(s.tokens for s in row) <= budget)
        row = next(fitting, None)
        if row is None:
            rows.append([group])
        else:
            row.append(group)
    return rows


def _row(members: list[tuple[PromptGroup, PromptLayout, _SubGroup]], config: PreTrainedConfig) -> PackedRow:
    ids, positions, owner, copies, slots, features = [], [], [], [], [], []
    cu, branch_prefix, prefix_start, prefix_len, followers = [0], [], [], [], []
    branches: list[Branch] = []
    predict, target, counts, span_end = [], [], [], []
    first_feature: dict[int, int] = {}
    prompts: list[Prompt] = []
    encoded = 0
    for group, prompt, member in members:
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
        copies.append(np.full(length, len(member.branches)))
        shared = len(member.branches) > 1
        if shared:
            prefix_start.append(start)
            prefix_len.append(length)
            followers.append(member.tokens - length)
            branch_prefix.append(-1)
            cu.append(start + length)
        begin = start + length
        last = begin - 1  # the position that predicts the first token of every branch
        for b in member.branches:
            tail = continuation_ids(b, group.branches[b], config)
            n = tail.size
            ids.append(tail)
            positions.append(np.tile(np.arange(prompt.next_position, prompt.next_position + n), (3, 1)))
            owner.append(np.full(n, len(branches)))
            copies.append(np.ones(n, dtype=np.int64))
            branch_prefix.append(len(prefix_start) - 1 if shared else -1)
            cu.append(begin + n)
            branches.append((member.group, b))
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
    """Encodes the images of prompts that are in several rows once.

    Rows read detached copies of the features; after the last row ``finish`` backpropagates the gradients of all of them
    through the vision tower, once. Compute the rows in the order of ``pack``, so that features live no longer than
    needed. Images of a prompt in a single row are not kept here. One object serves one pass over the rows, and before
    it one pass without gradient over the announced rows.
    """

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        counts = Counter(id(prompt) for row in rows for prompt in row.prompts)
        self._rows_left = {key: n for key, n in counts.items() if n > 1}
        self._encoded: dict[int, tuple[ImageFeatures, ImageFeatures]] = {}  # with graph; the copies that rows read
        self._announced: set[int] = set()

    def announce(self, rows: Sequence[PackedRow]) -> None:
        """Say that these rows are computed without gradient before the pass that learns: the first pass then encodes
        their images with the graph that the second one needs."""
        for prompt in (prompt for row in rows for prompt in row.prompts):
            self._rows_left.setdefault(id(prompt), 1)
            self._announced.add(id(prompt))

    def encode(self, backbone: nn.Module, row: PackedRow) -> ImageFeatures:
        """The features of ``row.prompts``, in order."""
        missing = [prompt for prompt in row.prompts if id(prompt) not in self._encoded]
        features = dict(self._encoded)
        if missing:
            learned = torch.is_grad_enabled() or all(id(prompt) in self._announced for prompt in missing)
            with torch.set_grad_enabled(learned):
                encoded = _encode(backbone, missing, row.input_ids.device)
            for prompt, images in zip(missing, encoded, strict=True):
                features[id(prompt)] = (images, images)
                if id(prompt) in self._rows_left:
                    features[id(prompt)] = self._encoded[id(prompt)] = (images, _map(_leaf, images))
        return _join([features[id(prompt)][1] for prompt in row.prompts])

    def finish(self, row: PackedRow, backward: Callable[[Tensor], object]) -> None:
        """Call after the row's own backward; where it had none, ``backward`` is not called.

        ``backward``: the function that also takes the losses. It gets a 0-d tensor whose gradient is that of all rows
        with respect to the images of the prompts that no later row holds.
        """
        products = []
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
                        products.append((value * leaf.grad).sum(dtype=torch.float64))
        if products:
            backward(torch.stack(products).sum())


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
    """The layout with everything that is the same for all layers, computed once."""
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
