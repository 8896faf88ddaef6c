"""Our implementations under the names by which transformers selects them."""

from __future__ import annotations

from prism_fast.models import shared_prefix


def register() -> None:
    """Add attention ``"prism_shared_prefix"`` to transformers' registry (idempotent).

    Afterwards ``attn_implementation={"text_config": "prism_shared_prefix"}`` selects it for Qwen3-VL(-MoE). A row
    is packed where the language model is called with ``prefix_layout`` (a ``prism_fast.ops.PrefixLayout``); without, it
    computes what ``"sdpa"`` computes.
    """
    shared_prefix.register()
