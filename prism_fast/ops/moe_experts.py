"""The experts of a mixture-of-experts layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .reference.moe_experts import moe_experts as reference
from .results import Routing

OP = "moe_experts"
BACKENDS = ("reference", "native", "triton", "stock")
# Default on CUDA by (major compute capability, dtype). Triton serves a card that is not listed, or refuses it by name;
# it also serves operands that grouped_mm cannot address (`stock.moe_experts.refusal`). Until both are measured on a
# card, a library's products are preferred where they exist.
ON_CUDA = {
    (8, torch.bfloat16): "triton",
    (8, torch.float16): "triton",
    (8, torch.float32): "triton",
    (9, torch.bfloat16): "stock",
    (9, torch.float16): "triton",
    (9, torch.float32): "triton",
    (10, torch.bfloat16): "stock",
    (10, torch.float16): "triton",
    (10, torch.float32): "triton",
}


def on_cuda(major: int, dtype: torch.dtype) -> str:
    """The backend that serves ``dtype`` by default on cards of compute capability ``major``.x."""
    return ON_CUDA.get((major, dtype), "triton")


def moe_experts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``sum_j weights[t, j] * down_e(silu(gate_e x_t) * up_e x_t)`` with e = experts[t, j].

    Args:
        hidden: [T, H] floating.
        gate_up: [E, 2I, H], dtype of ``hidden``; rows 0..I-1 are the gate, I..2I-1 the up projection. Strides are free:
            a checkpoint that stores [E, H, 2I] passes ``.transpose(1, 2)``; shapes are never guessed.
        down: [E, H, I], dtype of ``hidden``.
        routing: of ``route_experts`` or ``plan_experts`` over the same T tokens and E experts.
        recompute: keep only the inputs for backward and compute the products again.
        backend: None, "reference" (a loop over experts; on a GPU and in a graph every expert computes every token),
            "native" (PyTorch's products and compiled passes between them; the default on the CPU, if the compiled
            module is built, else "reference" is), "triton" (CUDA) or "stock"
            (``torch.nn.functional.grouped_mm``; on CUDA bfloat16 on compute capability 9.x and 10.x alone, with our
            kernels between the products; on the CPU all but float64; H and I multiples of 16 bytes). On CUDA the
            default is the entry of ``ON_CUDA`` for the card and dtype: "stock" for bfloat16 on 9.x and 10.x where it
            takes the shapes and strides, "triton" otherwise.

    Returns:
        [T, H] in the dtype of ``hidden``; differentiable in hidden, gate_up, down and routing.weights. Products run in
        the dtype of ``hidden``, also under autocast, the weighted sum in float32 or wider, in a fixed order. On the
        CPU the bits of ``native`` do not depend on the number of threads in float32 and float64 (if PyTorch's library
        is MKL); those of the other backends do, because PyTorch divides products and activations among threads.

    Raises:
        ValueError: wrong shape, dtype or device.
        NotImplementedError: float64 on ``triton`` or ``stock``, a card older than the tiles of ``triton``, dtypes,
            cards, widths and strides that ``stock`` does not take.
        RuntimeError: the backend is missing on this machine.

    Cost: 6 T top_k H I FLOP forward and twice that backward. All but "reference" keep the up-projection [T top_k, 2I]
    for backward, or with ``recompute`` nothing but the inputs.

    Source: Qwen3-VL-MoE experts in transformers.
    """
    checks.tensor(OP, "hidden", hidden, shape=(None, None))
    tokens, width = hidden.shape
    checks.tensor(OP, "gate_up", gate_up, shape=(None, None, width), dtypes=(hidden.dtype,), like=hidden)
    experts, inner = gate_up.shape[0], gate_up.shape[1]
    if experts == 0 or inner % 2:
        raise ValueError(f"{OP}: gate_up must have shape [E, 2I, H] with E >= 1, got {list(gate_up.shape)}")
    checks.tensor(OP, "down", down, shape=(experts, width, inner // 2), dtypes=(hidden.dtype,), like=hidden)
    if not isinstance(routing, Routing):
        raise ValueError(
            f"{OP}: routing must be a Routing of route_experts or plan_experts, got {type(routing).__name__}"
        )
    checks.tensor(OP, "routing.experts", routing.experts, shape=(tokens, None), dtypes=checks.INTEGERS, like=hidden)
    checks.tensor(OP, "routing.weights", routing.weights, shape=tuple(routing.experts.shape), like=hidden)
    assignments, int32, int64 = (routing.experts.numel(),), (torch.int32,), (torch.int64,)
    checks.tensor(OP, "routing.permutation", routing.permutation, shape=assignments, dtypes=int64, like=hidden)
    checks.tensor(OP, "routing.tokens", routing.tokens, shape=assignments, dtypes=int32, like=hidden)
    checks.tensor(OP, "routing.slots", routing.slots, shape=routing.experts.shape, dtypes=int32, like=hidden)
    checks.tensor(OP, "routing.offsets", routing.offsets, shape=(experts + 1,), dtypes=int32, like=hidden)
    checks.flag(OP, "recompute", recompute)
    checks.memory(OP, hidden)
    match choose(OP, BACKENDS, backend, hidden, _default(hidden, gate_up, down)):
        case "native":
            from .native.moe_experts import run
        case "stock":
            from .stock.moe_experts import run
        case "triton":
            from .triton.moe_experts import run
        case _:
            run = reference
    return run(hidden, gate_up, down, routing, recompute=recompute)


def _default(hidden: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    if not hidden.is_cuda:
        return None
    found = on_cuda(torch.cuda.get_device_properties(hidden.device).major, hidden.dtype)
    if found == "stock":
        from .stock.moe_experts import refusal

        return "triton" if refusal(hidden, gate_up, down) else found
    return found
