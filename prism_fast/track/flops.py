"""Floating-point operations that Qwen3-VL needs, from its configuration and the lengths of texts and images.

Matrix products count, two operations per multiply-add, and attention where a query sees a key. Norms, activations and
the optimizer do not, as usual for a model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B). A backward
counts twice its forward. Repeated work (gradient checkpointing, a group cut in two) does not count: the step does not
need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedConfig

from prism_fast.models.packing import PromptGroup

# Dense matrix products per second in 1e12, bfloat16 with float32 sums and plain float32, as NVIDIA's data sheets give
# them. The first line whose words are all in the card's name counts; a MIG slice of a card has no line.
PEAKS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("B200",), 2250.0, 75.0),
    (("H200", "NVL"), 835.5, 60.0),
    (("H200",), 989.4, 66.9),
    (("H100", "PCIe"), 756.0, 51.2),
    (("H100", "NVL"), 835.5, 60.0),
    (("H100",), 989.4, 66.9),
    (("A100",), 312.0, 19.5),
    (("L40S",), 362.1, 91.6),
    (("L4",), 121.0, 30.3),
    (("RTX", "4090"), 165.2, 82.6),
)


def peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """Peak operations per second of ``card`` (as ``torch.cuda.get_device_name`` calls it) in ``dtype``; None if not
    known."""
    words = set(re.split(r"[\s-]+", card))
    columns = {torch.bfloat16: 1, torch.float32: 2}
    if "MIG" in words or dtype not in columns:
        return None
    line = next((line for line in PEAKS if words.issuperset(line[0])), None)
    return None if line is None else line[columns[dtype]] * 1e12


def mixing_weights(text: PreTrainedConfig) -> int:
    """Entries of the attention's matrices in one layer."""
    return text.hidden_size * text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)


def mlp_weights(text: PreTrainedConfig) -> int:
    """Entries of one layer's MLP matrices that a token is multiplied with: router and chosen experts, or the dense
    layer's three."""
    experts = getattr(text, "num_experts", None)
    if experts is None:
        return 3 * text.hidden_size * text.intermediate_size
    return text.hidden_size * (experts + 3 * text.num_experts_per_tok * text.moe_intermediate_size)


def trunk_flops(text: PreTrainedConfig, tokens: int, pairs: int) -> int:
    """Of ``tokens`` tokens through the language model's layers, with ``pairs`` of a query and a key it sees."""
    attention = 4 * text.num_attention_heads * text.head_dim * pairs
    return text.num_hidden_layers * (2 * (mixing_weights(text) + mlp_weights(text)) * tokens + attention)


def tower_flops(vision: PreTrainedConfig, grids: Iterable[Sequence[int]]) -> int:
    """Of images of ``grids`` (frames, patches high, patches wide) through the vision tower; the patches of a frame all
    see each other."""
    width, merged = vision.hidden_size, vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    mergers = (1 + len(vision.deepstack_visual_indexes)) * merged * width * (merged * width + vision.out_hidden_size)
    total = 0
    for frames, high, wide in grids:
        patches = high * wide
        matrices = patches * (patch * width + vision.depth * block) + patches // merged * mergers
        total += frames * (2 * matrices + 4 * width * vision.depth * patches**2)
    return total


def head_flops(text: PreTrainedConfig, rows: int) -> int:
    """Of the product of ``rows`` hidden states with the output matrix."""
    return 2 * rows * text.hidden_size * text.vocab_size


def visible_pairs(prompt: int, continuations: Iterable[int]) -> int:
    """Queries and keys that see each other in a prompt and its continuations, the prompt computed once."""
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in continuations)


def forward_flops(config: PreTrainedConfig, groups: Sequence[PromptGroup], *, vocabulary: bool) -> int:
    """Of one forward over ``groups``, each prompt and image once. Continuations that are None do not count, nor does a
    prompt whose continuations are all None.

    Args:
        config: of the whole model (``text_config`` and ``vision_config``).
        vocabulary: every continuation token is predicted by the output matrix (a policy), or none (a discriminator).
    """
    total = 0
    for group in groups:
        lengths = [len(branch) for branch in group.branches if branch is not None]
        if not lengths:
            continue
        prompt, grid = len(group.prompt.input_ids), group.prompt.image_grid_thw
        total += trunk_flops(config.text_config, prompt + sum(lengths), visible_pairs(prompt, lengths))
        total += tower_flops(config.vision_config, [] if grid is None else grid.tolist())
        total += head_flops(config.text_config, sum(lengths)) if vocabulary else 0
    return total
