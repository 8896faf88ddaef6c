"""Mixture of experts on ``torch.nn.functional.grouped_mm``: for cards without Triton, and as a rival of what we wrote.

Its gradients are autograd's; offsets stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu
from torch.utils.checkpoint import checkpoint

from ..reference.moe_experts import combine
from ..results import Routing

ALIGNMENT = 16  # bytes


def run(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, *, recompute: bool) -> Tensor:
    """Arguments are already validated by the public op. Keeps the gathered inputs and three activations per
    assignment, with ``recompute`` only its inputs. Raises NotImplementedError for what grouped_mm does not take."""
    size, (width, inner) = hidden.element_size(), down.shape[1:]
    if hidden.dtype == torch.float64 or width * size % ALIGNMENT or inner * size % ALIGNMENT:
        raise NotImplementedError(
            f"moe_experts: backend='stock' takes float32 and half precision, and H and I that are multiples of "
            f"{ALIGNMENT} bytes; got {hidden.dtype}, H {width}, I {inner}: pass backend='reference'"
        )
    if recompute and torch.is_grad_enabled():
        # Nothing here is random, and reading the state of a card's generator would make the host wait.
        return checkpoint(_grouped, hidden, gate_up, down, routing, use_reentrant=False, preserve_rng_state=False)
    return _grouped(hidden, gate_up, down, routing)


def _grouped(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    ends = routing.offsets[1:]
    with torch.autocast(hidden.device.type, enabled=False):  # operands keep the dtype that the caller chose
        x = hidden[routing.permutation.div(routing.experts.shape[1], rounding_mode="floor")]  # [M, H]
        gate, up = grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)  # [M, H]
        return combine(rows, routing).to(hidden.dtype)
