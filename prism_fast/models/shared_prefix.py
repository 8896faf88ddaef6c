"""Attention over packed rows as an implementation that transformers can select by name.

The layout of a row is the argument ``prefix_layout`` of the language model: transformers passes unknown arguments down
to the attention function, through gradient checkpointing too, so no state is kept between calls.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prism_fast import ops

NAME = "prism_shared_prefix"


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_layout: ops.PrefixLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query ``[1, Hq, T, D]``, key, value ``[1, Hk, T, D]``, to ``[1, T, Hq, D]``.

    With ``prefix_layout`` the row is a packed one. Without it the rows are ordinary sequences (generation, padded
    batches) and the result is that of ``sdpa``, to the bit.

    Raises:
        NotImplementedError: a packed row with a mask, dropout or more than one row.
    """
    if prefix_layout is None:
        if query.shape[2] == 1 and query.device.type == "cpu" and not dropout and kwargs.get("position_bias") is None:
            # A step of generation. transformers copies every key and value for each of its queries where there is a
            # mask; the kernel of the CPU need not, and gives the same bits.
            heads = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
            return heads.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or attention_mask is not None or dropout > 0.0:
        raise NotImplementedError(
            f"{NAME}: a packed row is one row without mask and attention dropout, got {query.shape[0]} row(s), "
            f"{'a' if attention_mask is not None else 'no'} mask and dropout {dropout}: its layout says what each "
            "token sees"
        )
    # Not x[0]: its backward would allocate zeros for the whole tensor and copy into them.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    return ops.shared_prefix_attention(q, k, v, prefix_layout, scale=scaling)[None], None


def register() -> None:
    """Make ``"prism_shared_prefix"`` known to transformers (idempotent)."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_shared_prefix(model: nn.Module) -> None:
    """Select it for the language model of a Qwen3-VL(-MoE) model or backbone, in place (idempotent). Rows without a
    layout are computed as before."""
    register()
    model.set_attn_implementation({"text_config": NAME})


def require_shared_prefix(language_model: nn.Module) -> None:
    """Raise ValueError where another implementation is selected: it would silently ignore the layout."""
    chosen = language_model.config._attn_implementation
    if chosen != NAME:
        raise ValueError(
            f"a packed row needs attention {NAME!r}, this model computes {chosen!r}, which would let branches see each "
            "other: call prism_fast.models.shared_prefix.use_shared_prefix(model) once"
        )
