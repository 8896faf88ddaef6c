"""The last layer of a discriminator, computed for scored rows only.

A score reads one row per span. Before the last layer's attention every row matters, because later tokens attend to it;
after it only the scored rows do, so the layer's experts and the final norm compute only these. The rows are passed as
the argument ``score_rows`` of the language model, like the layout of packed rows, through gradient checkpointing too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

from prism_fast.models.experts import SparseBlock
from prism_fast.models.family import trunk


class LastLayer(Qwen3VLMoeTextDecoderLayer):
    """The stock layer, which with ``score_rows`` returns these rows alone."""

    def forward(self, hidden_states: Tensor, *args: object, score_rows: Tensor | None = None, **kwargs: object):
        """hidden_states [B, S, H] to [B, S, H]; with ``score_rows`` [M] (int64, distinct, into B·S) to [1, M, H]."""
        if score_rows is None:
            return super().forward(hidden_states, *args, **kwargs)
        self.mlp.rows = score_rows
        try:
            out = super().forward(hidden_states, *args, **kwargs)
        finally:
            self.mlp.rows = None
        return out.flatten(0, 1)[score_rows][None]


def use_score_rows(backbone: nn.Module) -> None:
    """Let the last layer of a Qwen3-VL-MoE ``backbone`` compute only scored rows, in place. No change where that layer
    is dense, or where DeepStack adds image features to all its rows: :func:`states_at` then computes every row."""
    layer = trunk(backbone).layers[-1]
    levels = len(backbone.config.vision_config.deepstack_visual_indexes)
    if isinstance(layer.mlp, SparseBlock) and levels < len(trunk(backbone).layers):
        layer.__class__ = LastLayer


def states_at(backbone: nn.Module, rows: Tensor, forward: Callable[..., NamedTuple]) -> tuple[Tensor, NamedTuple]:
    """Final-norm hidden states ``[M, H]`` at ``rows`` ``[M]`` (int64, distinct), and the output they come from.

    ``forward(**kwargs)`` calls ``backbone.language_model`` with these arguments added; router logits that it records
    are those of all rows. After :func:`use_score_rows` the last layer computes no more than it must.
    """
    if isinstance(trunk(backbone).layers[-1], LastLayer):
        out = forward(score_rows=rows)
        return out.last_hidden_state[0], out
    out = forward()
    return out.last_hidden_state.flatten(0, 1)[rows], out
