"""Layouts of prompts and continuations for a forward, and the cut of a step into micro-batches.

``shared_prefix``: packed rows, a prompt and its image computed once for all its continuations (``models.packing``).
``padded``: a right-padded batch with the prompt repeated in front of each continuation (``models.forward``). Both give
the same hidden states and gradients; tests compare them, and ``train.self_check`` does so on a run's own data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prism_fast.models.forward import ResponseRows, TokenBatch, collate, language_outputs, response_rows
from prism_fast.models.packing import Branch, PackedRow, PromptGroup, SharedImages, pack, packed_outputs
from prism_fast.models.processor import Prompt
from prism_fast.models.score_rows import states_at
from prism_fast.models.shared_prefix import use_shared_prefix
from prism_fast.models.token_budget import by_tokens
from prism_fast.models.transfer import moved

Layout = Literal["shared_prefix", "padded"]


class Forward(NamedTuple):
    """Output for one micro-batch of ``X`` tokens: ``hidden`` [X, H] final-norm; ``predict``: the rows that predict the
    continuations' tokens."""

    hidden: Tensor
    predict: ResponseRows


class Ends(NamedTuple):
    """Output at the last tokens of the ``M`` continuations of a micro-batch of ``X`` tokens.

    ``hidden`` [M, H] final-norm; ``weight`` [X]: how often the padded layout would compute a token (0: padding);
    ``branch`` [X] int64: the continuation of a token, -1 in a prompt; ``router_logits`` per sparse layer [X, E], None
    unless asked for.
    """

    hidden: Tensor
    weight: Tensor
    branch: Tensor
    router_logits: tuple[Tensor, ...] | None


class PackedPlan:
    """A step in packed rows. ``micro_batches``: the rows; those of a group that was cut are consecutive. ``lockstep``:
    every row encodes its own images, a blank one if it has none, so that all rows pass the same modules."""

    def __init__(
        self,
        backbone: nn.Module,
        groups: Sequence[PromptGroup],
        budget: int,
        *,
        positions: str = "mrope",
        lockstep: bool = False,
    ):
        self.backbone, self.lockstep = backbone, lockstep
        self.micro_batches: list[PackedRow] = pack(groups, budget, model_config=backbone.config, positions=positions)
        if lockstep:
            self.micro_batches = [_with_image(row, backbone.config) for row in self.micro_batches]
        self.images = self._shared()

    def _shared(self) -> SharedImages:
        return SharedImages([] if self.lockstep else self.micro_batches)

    def bound(self) -> list[list[PackedRow]]:
        """The rows in order, in one list per set of rows that share groups."""
        bound: list[list[PackedRow]] = []
        seen: set[int] = set()
        for row in self.micro_batches:
            here = {g for g, _ in row.branches}
            if bound and here & seen:
                bound[-1].append(row)
                seen |= here
            else:
                bound.append([row])
                seen = here
        return bound

    def announce(self, rows: Sequence[PackedRow]) -> None:
        """Say that these rows get a pass without gradient before the one that learns: both read the same encoded
        images."""
        if not self.lockstep:
            self.images.announce(rows)

    def copy(self) -> PackedPlan:
        """The same rows for a further pass, which encodes its images itself."""
        plan = object.__new__(PackedPlan)
        plan.backbone, plan.micro_batches, plan.lockstep = self.backbone, self.micro_batches, self.lockstep
        plan.images = plan._shared()
        return plan

    def forward(self, row: PackedRow) -> Forward:
        row = row.to(self.backbone.device)
        return Forward(packed_outputs(self.backbone, row, self.images).last_hidden_state[0], row.predict)

    def ends(self, row: PackedRow, **kwargs: bool) -> Ends:
        row = row.to(self.backbone.device)
        run = partial(packed_outputs, self.backbone, row, self.images)
        hidden, out = states_at(self.backbone, row.span_end, partial(run, **kwargs))
        return Ends(hidden, row.copies, row.branch, out.router_logits if kwargs else None)

    def finish(self, row: PackedRow, backward: Callable[[Tensor], object] | None) -> None:
        """Call after a row's backward (None: there was none): backpropagates into images that several rows share."""
        self.images.finish(row, backward if backward is not None else _no_gradient)


def _blank_image(config: PreTrainedConfig) -> Prompt:
    """The smallest image, black, as a prompt without text."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    pixels = torch.zeros(side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return Prompt((), pixels, torch.tensor([[1, side, side]]))


def _with_image(row: PackedRow, config: PreTrainedConfig) -> PackedRow:
    """The row; where it has no images, it encodes a blank one and places none of its features."""
    none = torch.empty(0, dtype=torch.int64)
    if row.prompts:
        return row
    return replace(row, prompts=(_blank_image(config),), image_slot=none, image_feature=none)


def _no_gradient(loss: Tensor) -> None:
    raise AssertionError("a pass without a backward left gradients at its images")


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    branches: tuple[Branch, ...]
    tokens: int  # without padding


class PaddedPlan:
    """A step in padded batches. ``whole_groups``: the continuations of a group stay together. ``lockstep``: as in
    ``PackedPlan``."""

    def __init__(
        self,
        backbone: nn.Module,
        groups: Sequence[PromptGroup],
        budget: int,
        *,
        pad_id: int,
        positions: str = "mrope",
        whole_groups: bool = False,
        lockstep: bool = False,
    ):
        self.backbone, self.groups, self.pad_id, self.positions = backbone, groups, pad_id, positions
        self.lockstep = lockstep
        items: list[list[Branch]] = []
        for g, group in enumerate(groups):
            branches = [(g, b) for b, branch in enumerate(group.branches) if branch is not None]
            items += [branches] if whole_groups else [[branch] for branch in branches]
        lengths = [sum(self._length(branch) for branch in item) for item in items]
        self.micro_batches = [
            PaddedBatch(tuple(branch for i in chosen for branch in items[i]), sum(lengths[i] for i in chosen))
            for chosen in by_tokens(lengths, budget)
        ]

    def _length(self, branch: Branch) -> int:
        group = self.groups[branch[0]]
        return len(group.prompt.input_ids) + len(group.branches[branch[1]])

    def bound(self) -> list[list[PaddedBatch]]:
        """One list per batch: with ``whole_groups`` no two batches share a group."""
        return [[batch] for batch in self.micro_batches]

    def announce(self, batches: Sequence[PaddedBatch]) -> None:
        """Nothing to do: forwards of padded batches share nothing."""

    def copy(self) -> PaddedPlan:
        return self

    def _collated(self, batch: PaddedBatch) -> TokenBatch:
        used = sorted({g for g, _ in batch.branches})
        tokens = collate(
            [self.groups[g].prompt for g in used],
            [used.index(g) for g, _ in batch.branches],
            [self.groups[g].branches[b] for g, b in batch.branches],
            model_config=self.backbone.config,
            pad_id=self.pad_id,
            positions=self.positions,
        )
        if not self.lockstep or tokens.pixel_values is not None:
            return tokens
        blank, none = _blank_image(self.backbone.config), torch.empty(0, dtype=torch.int64)
        images = {"pixel_values": blank.pixel_values, "image_grid_thw": blank.image_grid_thw}
        return replace(tokens, **images, image_slot=none, image_feature=none)

    def forward(self, batch: PaddedBatch) -> Forward:
        device, tokens = self.backbone.device, self._collated(batch)
        # Made on the CPU and moved, so that the host does not wait for the device.
        predict = ResponseRows(*(moved(x, device) for x in response_rows(tokens)))
        hidden = language_outputs(self.backbone, tokens.to(device)).last_hidden_state
        return Forward(hidden.flatten(0, 1), predict)  # [B·S, H]

    def ends(self, batch: PaddedBatch, **kwargs: bool) -> Ends:
        """As `PackedPlan.ends`."""
        tokens = self._collated(batch).to(self.backbone.device)
        rows, width = tokens.input_ids.shape
        number = torch.arange(rows, device=tokens.lengths.device)
        prompt = torch.arange(width, device=number.device) < tokens.prompt_lengths[:, None]  # [B, S]
        branch = torch.where(prompt, -1, number[:, None]).flatten()
        run = partial(language_outputs, self.backbone, tokens)
        hidden, out = states_at(self.backbone, number * width + tokens.lengths - 1, partial(run, **kwargs))
        return Ends(hidden, tokens.attention_mask.flatten(), branch, out.router_logits if kwargs else None)

    def finish(self, batch: PaddedBatch, backward: Callable[[Tensor], object] | None) -> None:
        """Nothing to do: padded batches share nothing."""


BatchPlan = PackedPlan | PaddedPlan
MicroBatch = PackedRow | PaddedBatch


def plan_batches(
    layout: Layout,
    backbone: nn.Module,
    groups: Sequence[PromptGroup],
    budget: int,
    *,
    pad_id: int,
    positions: str = "mrope",
    whole_groups: bool = False,
    lockstep: bool = False,
) -> BatchPlan:
    """Cut a step into micro-batches of at most ``budget`` tokens.

    ``whole_groups`` keeps a padded group in one micro-batch whatever its size. A packed group that does not fit is cut;
    ``bound`` then says which rows belong together. ``lockstep``: of the engine.
    """
    options = {"positions": positions, "lockstep": lockstep}
    if layout == "padded":
        return PaddedPlan(backbone, groups, budget, pad_id=pad_id, whole_groups=whole_groups, **options)
    if layout != "shared_prefix":
        raise ValueError(f"layout must be 'shared_prefix' or 'padded', got {layout!r}")
    return PackedPlan(backbone, groups, budget, **options)


def longest_item(layout: Layout, groups: Sequence[PromptGroup], *, whole_groups: bool = False) -> int:
    """Tokens of the largest indivisible item of a step."""
    whole = whole_groups and layout == "padded"
    sizes = [0]
    for group in groups:
        lengths = [len(group.prompt.input_ids) + len(branch) for branch in group.branches if branch is not None]
        sizes.append(sum(lengths) if whole else max(lengths, default=0))
    return max(1, *sizes)


def use_layout(layout: Layout, model: nn.Module) -> None:
    """Select the attention that a layout needs (idempotent)."""
    if layout == "shared_prefix":
        use_shared_prefix(model)
