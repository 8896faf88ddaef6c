"""Our implementations under the names by which transformers selects them."""

from __future__ import annotations

from prism_fast.models import experts, shared_prefix


def register() -> None:
    """Add attention ``"prism_shared_prefix"`` and experts ``"prism"`` to transformers' registries (idempotent).

    Afterwards ``experts_implementation="prism"`` (or ``model.set_experts_implementation("prism")``) gives the experts
    of any model with SwiGLU experts to ``moe_experts``; its own router keeps the choice. ``use_prism_experts`` of
    ``prism_fast.models.experts`` replaces the routers of a Qwen3-VL-MoE as well.

    And ``attn_implementation={"text_config": "prism_shared_prefix"}`` selects it for Qwen3-VL(-MoE). A row
    is packed where the language model is called with ``prefix_layout`` (a ``prism_fast.ops.PrefixLayout``); without, it
    computes what ``"sdpa"`` computes.
    """
    shared_prefix.register()
    experts.register()
