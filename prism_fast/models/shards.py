"""Weights written file by file: transposed copies exist for one file at a time, not for the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from prism_fast.models.checkpoints import SHARD_INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit


def save_shards(named: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or numbered shards and their index; replaces the weights in ``folder``.

    Takes tensors one by one and copies views of any strides; holds at most one file's: ``shard_bytes``, or one larger
    tensor. No two tensors may share memory."""
    for left in folder.glob("part-*.safetensors"):  # left by a call that failed
        left.unlink()
    files: list[list[str]] = []  # names of the tensors in each
    held: dict[str, Tensor] = {}
    total = bytes_held = 0

    def flush() -> None:
        save_file(held, _part(folder, len(files)), metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in named:
        if held and bytes_held + tensor.nbytes > shard_bytes:
            flush()
            bytes_held = 0
        held[name] = tensor.contiguous()
        bytes_held += tensor.nbytes
        total += tensor.nbytes
    flush()
    for old in (folder / WEIGHTS, folder / SHARD_INDEX, *folder.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    if len(files) == 1:
        _part(folder, 0).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        _part(folder, index).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _part(folder: Path, index: int) -> Path:
    """Name of a shard until their number is known."""
    return folder / f"part-{index}.safetensors"
