"""Weights written file by file: what a layout turns round exists twice for one file at a time, not for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from prism_fast.models.checkpoints import SHARD_INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit


def save_shards(state: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or numbered shards and their index. Views of any strides are copied one file at a
    time; no two tensors share memory. Weights that stood in ``folder`` go."""
    for old in (folder / WEIGHTS, folder / SHARD_INDEX, *folder.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    plan = split_torch_state_dict_into_shards(dict(state), max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")
