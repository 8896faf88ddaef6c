"""How prompts and their continuations are laid out for a forward, and how a step is cut into forwards.

``shared_prefix``: packed rows, a prompt and its image computed once for all its continuations (``models.packing``).
``padded``: a right-padded batch with the prompt repeated in front of each continuation (``models.forward``). Both give
the same hidden states and gradients; tests hold them together, and ``train.self_check`` on a run's own data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prism_fast.models.forward import ResponseRows, TokenBatch, collate, language_outputs, response_rows
from prism_fast.models.packing import Branch, PackedRow, PromptGroup, SharedImages, pack, packed_outputs
from prism_fast.models.score_rows import states_at
from prism_fast.models.shared_prefix import use_shared_prefix
from prism_fast.models.transfer import moved
from prism_fast.train.microbatch import by_tokens

Layout = Literal["shared_prefix", "padded"]


class Forward(NamedTuple):
    """One micro-batch computed: ``X`` rows of hidden states.

    ``hidden`` [X, H] final-norm; ``predict``: the rows that predict the continuations' tokens.
    """

    hidden: Tensor
    predict: ResponseRows


class Ends(NamedTuple):
    """One micro-batch of ``M`` continuations computed for what its last tokens say; ``X`` rows, ``hidden`` of ``M``.

    ``hidden`` [M, H] final-norm, at the last row of each continuation; ``weight`` [X] how often a row's token stands in
    the unshared computation (0: padding); ``branch`` [X] int64: which of the M continuations the token belongs to, -1:
    a prompt; ``router_logits`` per sparse layer [X, E], None unless asked for.
    """

    hidden: Tensor
    weight: Tensor
    branch: Tensor
    router_logits: tuple[Tensor, ...] | None


class PackedStep:
    """A step in packed rows. ``parts``: the rows, those of a group that was cut behind each other."""

    def __init__(self, backbone: nn.Module, groups: Sequence[PromptGroup], budget: int, *, positions: str = "mrope"):
        self.backbone = backbone
        self.parts: list[PackedRow] = pack(groups, budget, model_config=backbone.config, positions=positions)
        self.images = SharedImages(self.parts)

    def units(self) -> list[list[PackedRow]]:
        """The parts, those that hold branches of a common group together."""
        units: list[list[PackedRow]] = []
        seen: set[int] = set()
        for row in self.parts:
            here = {g for g, _ in row.branches}
            if units and here & seen:
                units[-1].append(row)
                seen |= here
            else:
                units.append([row])
                seen = here
        return units

    def announce(self, unit: Sequence[PackedRow]) -> None:
        """These rows pass without gradient before the pass that is learned from: both read the same encoded images."""
        self.images.announce(unit)

    def apart(self) -> PackedStep:
        """The same rows as a pass of its own, which keeps nothing."""
        step = object.__new__(PackedStep)
        step.backbone, step.parts, step.images = self.backbone, self.parts, SharedImages(self.parts)
        return step

    def forward(self, row: PackedRow) -> Forward:
        row = row.to(self.backbone.device)
        return Forward(packed_outputs(self.backbone, row, self.images).last_hidden_state[0], row.predict)

    def ends(self, row: PackedRow, **kwargs: bool) -> Ends:
        row = row.to(self.backbone.device)
        run = partial(packed_outputs, self.backbone, row, self.images)
        hidden, out = states_at(self.backbone, row.span_end, partial(run, **kwargs))
        return Ends(hidden, row.copies, row.branch, out.router_logits if kwargs else None)

    def finish(self, row: PackedRow, backward: Callable[[Tensor], object] | None) -> None:
        """After a part's own backward (None: there was none): the gradient of images that several rows share."""
        self.images.finish(row, backward if backward is not None else _no_gradient)


def _no_gradient(loss: Tensor) -> None:
    raise AssertionError("a pass without a backward left gradients at its images")


@dataclass(frozen=True, eq=False)
class PaddedPart:
    branches: tuple[Branch, ...]
    tokens: int  # without padding


class PaddedStep:
    """A step in padded batches; ``whole_groups``: the continuations of a group stay together."""

    def __init__(
        self,
        backbone: nn.Module,
        groups: Sequence[PromptGroup],
        budget: int,
        *,
        pad_id: int,
        positions: str = "mrope",
        whole_groups: bool = False,
    ):
        self.backbone, self.groups, self.pad_id, self.positions = backbone, groups, pad_id, positions
        items: list[list[Branch]] = []
        for g, group in enumerate(groups):
            branches = [(g, b) for b, branch in enumerate(group.branches) if branch is not None]
            items += [branches] if whole_groups else [[branch] for branch in branches]
        lengths = [sum(self._length(branch) for branch in item) for item in items]
        self.parts = [
            PaddedPart(tuple(branch for i in part for branch in items[i]), sum(lengths[i] for i in part))
            for part in by_tokens(lengths, budget)
        ]

    def _length(self, branch: Branch) -> int:
        group = self.groups[branch[0]]
        return len(group.prompt.input_ids) + len(group.branches[branch[1]])

    def units(self) -> list[list[PaddedPart]]:
        return [[part] for part in self.parts]

    def announce(self, unit: Sequence[PaddedPart]) -> None:
        """Forwards of padded batches share nothing: any number of passes may run."""

    def apart(self) -> PaddedStep:
        return self

    def _batch(self, part: PaddedPart) -> TokenBatch:
        used = sorted({g for g, _ in part.branches})
        return collate(
            [self.groups[g].prompt for g in used],
            [used.index(g) for g, _ in part.branches],
            [self.groups[g].branches[b] for g, b in part.branches],
            model_config=self.backbone.config,
            pad_id=self.pad_id,
            positions=self.positions,
        )

    def forward(self, part: PaddedPart) -> Forward:
        device, batch = self.backbone.device, self._batch(part)
        predict = ResponseRows(*(moved(x, device) for x in response_rows(batch)))  # counted where it costs no waiting
        hidden = language_outputs(self.backbone, batch.to(device)).last_hidden_state
        return Forward(hidden.flatten(0, 1), predict)  # [B·S, H]

    def ends(self, part: PaddedPart, **kwargs: bool) -> Ends:
        """As of a packed step."""
        batch = self._batch(part).to(self.backbone.device)
        rows, width = batch.input_ids.shape
        number = torch.arange(rows, device=batch.lengths.device)
        prompt = torch.arange(width, device=number.device) < batch.prompt_lengths[:, None]  # [B, S]
        branch = torch.where(prompt, -1, number[:, None]).flatten()
        run = partial(language_outputs, self.backbone, batch)
        hidden, out = states_at(self.backbone, number * width + batch.lengths - 1, partial(run, **kwargs))
        return Ends(hidden, batch.attention_mask.flatten(), branch, out.router_logits if kwargs else None)

    def finish(self, part: PaddedPart, backward: Callable[[Tensor], object] | None) -> None:
        """Nothing is shared between padded batches."""


Step = PackedStep | PaddedStep
Part = PackedRow | PaddedPart


def lay_out(
    layout: Layout,
    backbone: nn.Module,
    groups: Sequence[PromptGroup],
    budget: int,
    *,
    pad_id: int,
    positions: str = "mrope",
    whole_groups: bool = False,
) -> Step:
    """Cut a step into forwards of at most ``budget`` tokens.

    ``whole_groups`` keeps a padded group in one forward whatever its size. A packed group that does not fit is cut;
    ``units`` then says which rows belong together.
    """
    if layout == "padded":
        return PaddedStep(backbone, groups, budget, pad_id=pad_id, positions=positions, whole_groups=whole_groups)
    if layout != "shared_prefix":
        raise ValueError(f"layout must be 'shared_prefix' or 'padded', got {layout!r}")
    return PackedStep(backbone, groups, budget, positions=positions)


def longest_item(layout: Layout, groups: Sequence[PromptGroup], *, whole_groups: bool = False) -> int:
    """Tokens of the largest piece of a step that cannot be cut further."""
    whole = whole_groups and layout == "padded"
    sizes = [0]
    for group in groups:
        lengths = [len(group.prompt.input_ids) + len(branch) for branch in group.branches if branch is not None]
        sizes.append(sum(lengths) if whole else max(lengths, default=0))
    return max(1, *sizes)


def prepare(layout: Layout, model: nn.Module) -> None:
    """Select the attention that a layout needs (idempotent)."""
    if layout == "shared_prefix":
        use_shared_prefix(model)
