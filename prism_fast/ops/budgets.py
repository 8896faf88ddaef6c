"""Memory limits for a head's scores. The card's total memory decides, never its free memory, so that runs repeat."""

from __future__ import annotations

import torch

LARGE = 72 << 30  # bytes of memory from which a card counts as large; a card of 80 GB reports a little less than that
# Scores that one call keeps for its backward pass.
SAVE_BYTES, SAVE_BYTES_LARGE = 1 << 30, 4 << 30
# Scores of one wave where they are not kept. Each wave reads the weight and reads and writes its float32 gradient, so
# that on a large card 8192 rows of 151,936 tokens are one wave.
WAVE_BYTES, WAVE_BYTES_LARGE = 320 << 20, 5 << 29
WAVE_UNIT = 128


def save_bytes(device: torch.device) -> int:
    """Bytes of scores that ``save="auto"`` keeps."""
    return SAVE_BYTES_LARGE if _large(device) else SAVE_BYTES


def wave_bytes(device: torch.device) -> int:
    """Bytes of one wave of scores."""
    return WAVE_BYTES_LARGE if _large(device) else WAVE_BYTES


def wave_bytes_of(total: int) -> int:
    """The same for a card with ``total`` bytes of memory."""
    return WAVE_BYTES_LARGE if total >= LARGE else WAVE_BYTES


def wave_rows(rows: int, vocabulary: int, like: torch.Tensor) -> int:
    """Rows of a wave: the fewest waves that fit, equally long except the last. Scores have the dtype of ``like``."""
    most = max(1, wave_bytes(like.device) // (vocabulary * like.element_size()) // WAVE_UNIT) * WAVE_UNIT
    waves = max(1, -(-rows // most))
    return max(1, -(-rows // (waves * WAVE_UNIT))) * WAVE_UNIT


def _large(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= LARGE
