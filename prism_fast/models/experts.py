"""Mixture-of-experts layers of transformers on our ops.

transformers selects implementations of experts by name and gives them the choices of its router. `register` adds ours
to that registry, for any model. `use_prism_experts` also replaces the routers of a Qwen3-VL-MoE: they call
``route_experts`` and pass its plan on to the experts, so that no softmax, top-k or sort of PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextSparseMoeBlock,
    Qwen3VLMoeTextTopKRouter,
)

from prism_fast.ops import Routing, moe_experts, plan_experts, route_experts

IMPLEMENTATION = "prism"


def register() -> None:
    """Add experts implementation ``"prism"`` to transformers' registry (idempotent)."""
    ExpertsInterface.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    routing: Routing | None = None,
) -> Tensor:
    """The registered function: hidden_states [T, H], top_k_index and top_k_weights [T, top_k], result [T, H].

    ``module`` holds ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] (with the last two axes swapped if its
    ``is_transposed`` is set). ``routing``: the plan, where the router has made one.

    Raises:
        NotImplementedError: experts with a bias, without a gate, with interleaved gate and up columns, with another
            activation than SiLU or a gate function of their own.
    """
    refuse_other_experts(module)
    gate_up, down = module.gate_up_proj, module.down_proj
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if routing is None:
        routing = plan_experts(top_k_index, top_k_weights, gate_up.shape[0])
    kind = gate_up.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        kind = torch.get_autocast_dtype(hidden_states.device.type)
    return moe_experts(hidden_states.to(kind), gate_up.to(kind), down.to(kind), routing)


def refuse_other_experts(module: nn.Module) -> None:
    """Raise NotImplementedError naming what ``moe_experts`` does not compute."""
    activation = type(getattr(module, "act_fn", None)).__name__
    unsupported = {
        "a bias": module.has_bias,
        "no gate": not module.has_gate,
        "interleaved gate and up columns": not module.is_concatenated,
        f"activation {activation}": activation not in ("SiLU", "SiLUActivation"),
        "a gate function of their own": type(module)._apply_gate is not _default_apply_gate,
    }
    wrong = [name for name, present in unsupported.items() if present]
    if wrong:
        raise NotImplementedError(
            f"experts implementation {IMPLEMENTATION!r} computes down(silu(gate x) * up x) without bias; "
            f"{type(module).__name__} has {' and '.join(wrong)}: choose another experts_implementation"
        )


class Router(Qwen3VLMoeTextTopKRouter):
    """The stock router with its choice made by ``route_experts``. Raw logits are the first output, because transformers
    records that one."""

    def forward(self, hidden_states: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Routing]:
        """hidden_states [..., H]; logits [T, E] of all tokens, and the plan for all of them or for ``rows`` [M]."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)  # [T, E]
        return logits, route_experts(logits if rows is None else logits[rows], self.top_k)


class SparseBlock(Qwen3VLMoeTextSparseMoeBlock):
    """Router and experts of one layer.

    ``rows`` [M] int64, distinct, is set by ``models.score_rows`` for one call of the last layer: the experts then
    compute these tokens alone and the others get 0.
    """

    rows: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, H]."""
        flat, rows = hidden_states.reshape(-1, hidden_states.shape[-1]), self.rows
        _, routing = self.gate(flat) if rows is None else self.gate(flat, rows)
        tokens = flat if rows is None else flat[rows]  # [T or M, H]
        if self.experts.config._experts_implementation == IMPLEMENTATION:
            out = self.experts(tokens, routing.experts, routing.weights, routing=routing)
        else:  # another implementation was selected: it gets the arguments of the stock router
            out = self.experts(tokens, routing.experts, routing.weights.to(flat.dtype))
        if rows is not None:
            out = torch.zeros(flat.shape, dtype=out.dtype, device=out.device).index_copy(0, rows, out)
        return out.view_as(hidden_states)


@contextmanager
def chosen_experts(model: nn.Module) -> Iterator[list[Tensor]]:
    """The choices of the routers of ``model`` in the forwards within the block: one ``[T, top_k]`` int64 tensor per
    call that routes all its tokens, layer by layer. They are the forward's own tensors, not copies."""
    choices: list[Tensor] = []

    def keep(router: Router, args: tuple, output: tuple[Tensor, Routing]) -> None:
        if len(args) == 1:
            choices.append(output[1].experts)

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, Router)]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def use_prism_experts(model: nn.Module) -> None:
    """Select our routers and experts in ``model`` (a Qwen3-VL-MoE model or backbone). Parameters and their names do not
    change. ``model.set_experts_implementation`` may select another implementation later."""
    register()
    model.set_experts_implementation(IMPLEMENTATION)
    for module in model.modules():
        if type(module) is Qwen3VLMoeTextSparseMoeBlock:
            module.__class__ = SparseBlock
        elif type(module) is Qwen3VLMoeTextTopKRouter:
            module.__class__ = Router
