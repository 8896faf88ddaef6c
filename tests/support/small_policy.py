"""The smallest policy on which everything shows; tests replace what they need otherwise."""

from __future__ import annotations

from prism_fast.models.policy import TinyPolicy

SMALL = TinyPolicy(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mrope_section=(2, 1, 1),
    vision_depth=2,
    vision_width=16,
    vision_heads=2,
    vision_intermediate_size=24,
    vision_positions=16,
    initializer_range=0.2,  # large enough for positions, images and experts to show in the outputs
)
