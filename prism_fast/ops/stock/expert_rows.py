"""The steps of the experts between their products in plain PyTorch, as in ``prism_fast.kernels.moe.rows``."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import silu


def on_device(x: Tensor) -> nullcontext:
    """No device has to be chosen on the CPU."""
    return nullcontext()


def gather_rows(x: Tensor, tokens: Tensor) -> Tensor:
    """[M, N] by slot: the rows of ``x`` [T, N] at ``tokens`` [M]."""
    return x.index_select(0, tokens)


def swiglu(pre: Tensor) -> Tensor:
    """[M, I] = silu(gate) · up of ``pre`` [M, 2I], gate before up."""
    gate, up = pre.float().chunk(2, 1)
    return (silu(gate) * up).to(pre.dtype)


def swiglu_gradient(d: Tensor, pre: Tensor, weights: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of ``pre`` [M, 2I], gradient of ``weights``); the weighted activations [M, I] overwrite ``d``.

    d [M, I]: upstream rows times the down-projection, before the routing weight. weights [T, top_k] float32.
    """
    weight = weights.flatten()[permutation, None]
    gate, up = pre.float().chunk(2, 1)
    sigmoid = gate.sigmoid()
    act, share = gate * sigmoid * up, torch.empty_like(weights)
    share.view(-1)[permutation] = (d * act).sum(1)
    wide = weight * d
    d.copy_(weight * act)
    return torch.cat([wide * up * sigmoid * (1 + gate * (1 - sigmoid)), wide * gate * sigmoid], 1).to(pre.dtype), share


def combine_rows(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """[T, N] from ``rows`` [M, N] by slot at ``slots`` [T, top_k], weighted by ``weights`` [T, top_k] float32 if given;
    the sum runs in float32, in the order of the choices."""
    total = torch.zeros((len(slots), rows.shape[1]), dtype=torch.float32, device=rows.device)
    for j, slot in enumerate(slots.unbind(1)):
        part = rows.index_select(0, slot).float()
        total += part if weights is None else part * weights[:, j, None]
    return total.to(rows.dtype)


def clear_idle(out: Tensor, offsets: Tensor) -> None:
    """Zeros in ``out`` [E, R, N] for experts without slots: on the CPU, products of depth 0 write them already."""
