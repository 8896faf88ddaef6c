"""Three-axis (time, height, width) rotary positions of Qwen3-VL prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def mrope_positions(
    input_ids: Sequence[int] | torch.Tensor, image_grid_thw: torch.Tensor | None, config: PreTrainedConfig
) -> tuple[torch.Tensor, int]:
    """Positions of one unpadded prompt, and the position of the token that follows it.

    Text counts up by one on all axes. An image that starts at position ``s`` has time ``s + t``, height ``s +
    row``, width ``s + column`` of its merged patches; the text after it starts at ``s + max(rows, columns)``.
    (Qwen3-VL; equal to ``get_rope_index`` of transformers for still images.)

    Args:
        input_ids: ``[S]`` token ids with expanded image placeholders.
        image_grid_thw: ``[images, 3]`` int64 patch grids in order of appearance, or ``None``.
        config: the model's configuration (``image_token_id``, ``vision_config.spatial_merge_size``).

    Returns:
        ``[3, S]`` int64 on the CPU and the next position.

    Raises:
        ValueError: the runs of image tokens do not match the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    merge = config.vision_config.spatial_merge_size
    positions = np.empty((3, ids.size), dtype=np.int64)
    is_image = ids == config.image_token_id
    expected = sum(t * (h // merge) * (w // merge) for t, h, w in grids)
    if int(is_image.sum()) != expected:
        raise ValueError(f"{int(is_image.sum())} image tokens but the image grids {grids} ask for {expected}")

    done, position = 0, 0  # tokens laid out so far; position of the next one
    for t, h, w in grids:
        rows, columns = h // merge, w // merge
        start = done + int(np.argmax(is_image[done:]))
        end = start + t * rows * columns
        if not is_image[start:end].all():
            raise ValueError(
                f"the image tokens from index {start} on are cut short: grid {[t, h, w]} needs {end - start}"
            )
        positions[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        positions[:, start:end] = np.indices((t, rows, columns)).reshape(3, -1) + position
        position += max(rows, columns)
        done = end
    positions[:, done:] = np.arange(position, position + ids.size - done)
    position += ids.size - done
    return torch.from_numpy(positions), position


def text_positions(length: int) -> tuple[torch.Tensor, int]:
    """Plain 1-D positions on all three axes, image tokens counted like text: ``[3, length]`` int64 and the next
    position. The published alignment code gives them to its discriminator; M-RoPE is the correct form."""
    return torch.arange(length).expand(3, length), length
