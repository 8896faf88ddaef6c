"""The packed path against the unshared one on a run's own data, before anything is learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.packing import PromptGroup, SharedImages, pack, packed_hidden_states

#: Largest accepted relative difference in the root-mean-square sense. Rounding alone stays far below it in the wide
#: dtypes; in bfloat16 the two paths sum in different orders, and a sparse model may choose another expert at near-ties.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class PackingError(RuntimeError):
    """Packed and unshared computation of the same rows differ by more than rounding."""


class PackingErrors(NamedTuple):
    """Relative differences: of the hidden states at the rows that predict the branches' tokens, and of the gradient of
    the first layer's input norm (NaN where that parameter is frozen or nothing was to be compared)."""

    hidden: float
    gradient: float


def check_packing(
    backbone: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    budget: int,
    pad_id: int,
    positions: Literal["mrope", "text"] = "mrope",
    tolerance: float | None = None,
) -> PackingErrors:
    """Compute ``groups`` packed, and branch by branch with the prompt in front of each, and compare.

    Leaves parameters and their ``.grad`` as they are. The unshared side runs one sequence at a time, so it needs no
    more memory than a row. Not for parameters sharded over ranks: their gradient is not at hand.

    Args:
        backbone: ``Qwen3VLModel`` or ``Qwen3VLMoeModel`` with shared-prefix attention.
        groups: a real micro-batch; groups without branches are left out.
        budget: tokens per packed row.
        tolerance: relative; None = ``TOLERANCE`` of the backbone's dtype.

    Raises:
        PackingError: a difference above the tolerance, or one that is not finite.
    """
    config, device = backbone.config, backbone.device
    tolerance = TOLERANCE[backbone.dtype] if tolerance is None else tolerance
    weight = backbone.language_model.layers[0].input_layernorm.weight
    noise = torch.Generator().manual_seed(0)
    difference = reference = torch.zeros((), dtype=torch.float64)
    gradients = torch.zeros((2, *weight.shape), dtype=torch.float64)
    rows = pack(groups, budget, model_config=config, positions=positions)
    images = SharedImages(rows)
    with torch.set_grad_enabled(weight.requires_grad):
        for row in rows:
            packed = packed_hidden_states(backbone, row.to(device), images)[row.predict.index.to(device)]  # [N, H]
            upstream = torch.randn(packed.shape, generator=noise).to(packed)
            if weight.requires_grad and len(packed):
                gradients[0] += torch.autograd.grad((packed * upstream).sum(), weight)[0].double().cpu()
            packed, cu = packed.detach().double().cpu(), row.predict.cu_seqlens.tolist()
            for (g, b), start, stop in zip(row.branches, cu, cu[1:], strict=False):
                if start == stop:
                    continue
                group = groups[g]
                batch = collate(
                    [group.prompt],
                    [0],
                    [group.branches[b]],
                    model_config=config,
                    pad_id=pad_id,
                    positions=positions,
                ).to(device)
                alone = hidden_states(backbone, batch)[0][response_rows(batch).index]
                if weight.requires_grad:
                    gradients[1] += torch.autograd.grad((alone * upstream[start:stop]).sum(), weight)[0].double().cpu()
                alone = alone.detach().double().cpu()
                difference = difference + (packed[start:stop] - alone).square().sum()
                reference = reference + alone.square().sum()
    hidden = float((difference / reference).sqrt())
    gradient = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    found = PackingErrors(hidden, gradient)
    for name, error in zip(found._fields, found, strict=True):
        compared = bool(reference > 0) and (name == "hidden" or weight.requires_grad)
        if compared and not error <= tolerance:
            raise PackingError(
                f"packed and unshared computation of the same {len(groups)} group(s) differ: relative difference of "
                f"the {name} {error:.2e}, allowed {tolerance:.0e} for {backbone.dtype}. Training on packed rows would "
                "follow another gradient; use the unshared path and report versions of torch, transformers and the "
                "attention backend"
            )
    return found
