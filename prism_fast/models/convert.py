"""Conversion of checkpoint folders: dense policy to discriminator, and between the two layouts of stored experts.

Released discriminators (and hub files) hold experts as ``[E, H, 2I]`` and ``[E, I, H]``; stock transformers 5 saves
them as in memory, ``[E, 2I, H]`` and ``[E, H, I]``. Everything else is the same in both, the score head
``v_head.1.weight`` included. Results appear whole or not at all, and an existing destination is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeModel

from prism_fast.models.checkpoints import (
    SHARD_INDEX,
    WEIGHTS,
    open_weights,
    read_model_type,
    weight_files,
)
from prism_fast.models.discriminator import (
    EXPERT_KEYS,
    HEAD_STD,
    new_head,
    released_config,
    write_discriminator,
)
from prism_fast.models.family import family_of
from prism_fast.models.policy import load_policy
from prism_fast.models.processor import Processor
from prism_fast.models.score_head import read_head, write_side_head
from prism_fast.models.upcycle import (
    check_complete,
    check_options,
    refuse_square_experts,
    sparse_config,
    sparse_weights,
)
from prism_fast.models.writing import refuse_existing, whole_folder

RELEASED, STOCK = "released", "stock"
# Tokenizer, templates and image settings travel; weights and pickles do not.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
_WRITTEN_HERE = ("config.json", SHARD_INDEX)


def upcycle_folder(
    source: str | Path,
    destination: str | Path,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
    seed: int,
) -> None:
    """Dense policy folder to discriminator folder in the released layout and the policy's own dtype; ``seed`` decides
    noise, routers and score head (see :func:`prism_fast.models.discriminator.build_discriminator`, which gives the same
    weights). The whole dense model is in memory, the sparse one only a file at a time.

    Raises:
        FileExistsError: ``destination`` exists.
        FileNotFoundError, ValueError: ``source`` is not a complete dense Qwen3-VL folder.
    """
    source, destination = Path(source), Path(destination)
    refuse_existing(destination)
    policy = load_policy(source, dtype="auto")
    check_options(policy.config, num_experts, top_k, noise_std, router_std)
    config = sparse_config(policy.config, num_experts, top_k)
    with torch.device("meta"):
        sparse = Qwen3VLMoeModel(config).to(policy.dtype).state_dict()

    def weights() -> Iterator[tuple[str, Tensor]]:
        written = set()
        for name, tensor in sparse_weights(
            policy, num_experts=num_experts, noise_std=noise_std, router_std=router_std, seed=seed
        ):
            if name.startswith("model."):  # without the language-model head
                written.add(name)
                yield name, tensor
        check_complete(written, (f"model.{name}" for name in sparse))

    processor = Processor.from_pretrained(source)
    with whole_folder(destination, needs=sum(tensor.nbytes for tensor in sparse.values())) as folder:
        write_discriminator(weights(), new_head(config, HEAD_STD, seed), config, policy.dtype, processor, folder)


def to_released(source: str | Path, destination: str | Path) -> None:
    """Discriminator folder in the stock transformers-5 layout to the released one, shard by shard, bit for bit.

    Raises:
        FileExistsError: ``destination`` exists.
        FileNotFoundError: files of ``source`` are missing.
        ValueError: ``source`` is not Qwen3-VL-MoE, has no score head, is in the released layout already or in neither.
    """
    source, destination = Path(source), Path(destination)
    config, head = _inspect(source, destination, wanted=STOCK)
    with whole_folder(destination, needs=_weight_bytes(source)) as folder:
        dtype, keys = _turn_experts(source, folder)
        released = released_config(config, dtype)
        if "lm_head.weight" in keys:
            released["tie_word_embeddings"] = config.tie_word_embeddings
            released["text_config"]["tie_word_embeddings"] = config.tie_word_embeddings
        (folder / "config.json").write_text(json.dumps(released, indent=2, sort_keys=True) + "\n")
        write_side_head(head, folder)


def from_released(source: str | Path, destination: str | Path) -> None:
    """Discriminator folder in the released layout to the stock transformers-5 one, shard by shard, bit for bit.

    Raises: as :func:`to_released`, with the layouts exchanged.
    """
    source, destination = Path(source), Path(destination)
    config, _ = _inspect(source, destination, wanted=RELEASED)
    with whole_folder(destination, needs=_weight_bytes(source)) as folder:
        config.dtype, _ = _turn_experts(source, folder)
        config.save_pretrained(folder)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def _inspect(source: Path, destination: Path, *, wanted: str) -> tuple[Qwen3VLMoeConfig, Tensor]:
    """Configuration and score head of ``source``, after all checks of it."""
    refuse_existing(destination)
    family = family_of("discriminator", read_model_type(source), source)
    config = family.discriminator_config.from_pretrained(source, local_files_only=True)
    text = config.text_config
    refuse_square_experts(text.hidden_size, text.moe_intermediate_size)
    layouts = _layouts(source, text.num_experts, text.hidden_size, text.moe_intermediate_size)
    if wanted not in layouts:
        raise ValueError(f"{source} is already in the {layouts.pop()} layout: nothing to convert")
    if len(layouts) > 1:
        raise ValueError(f"{source} is partly in the {STOCK} layout, partly in the {RELEASED} one: copy it again")
    return config, read_head(source, text.hidden_size)


def _layouts(folder: Path, experts: int, hidden: int, inner: int) -> set[str]:
    """Layouts in which the folder's expert tensors are stored; only headers are read."""
    shapes = {
        EXPERT_KEYS[0]: {(experts, hidden, 2 * inner): RELEASED, (experts, 2 * inner, hidden): STOCK},
        EXPERT_KEYS[1]: {(experts, inner, hidden): RELEASED, (experts, hidden, inner): STOCK},
    }
    layouts = set()
    for file in weight_files(folder):
        with open_weights(file) as tensors:
            for name in tensors.keys():
                for ending, layout in shapes.items():
                    if name.endswith(ending):
                        shape = tuple(tensors.get_slice(name).get_shape())
                        if shape not in layout:
                            wanted = " or ".join(map(str, layout))
                            raise ValueError(f"{name} in {file} has shape {shape}; its config.json asks for {wanted}")
                        layouts.add(layout[shape])
    if not layouts:
        raise ValueError(f"{folder} holds no expert tensors ({EXPERT_KEYS[0]} …): its weights are not a sparse model's")
    return layouts


def _turn_experts(source: Path, folder: Path) -> tuple[torch.dtype, set[str]]:
    """Write every shard with its expert tensors transposed, one shard in memory at a time, and copy the other files.

    Returns:
        The experts' dtype and the names of all tensors.
    """
    keys: set[str] = set()
    dtype = torch.float32
    for file in weight_files(source):
        state = {}
        with open_weights(file) as tensors:
            metadata = tensors.metadata() or {}
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if name.endswith(EXPERT_KEYS):
                    tensor, dtype = tensor.transpose(1, 2).contiguous(), tensor.dtype
                state[name] = tensor
        save_file(state, folder / file.name, metadata={**metadata, "format": "pt"})
        keys |= set(state)
    if not (folder / WEIGHTS).is_file():
        shutil.copyfile(source / SHARD_INDEX, folder / SHARD_INDEX)  # names and sizes have not changed
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COPIED_SUFFIXES and file.name not in _WRITTEN_HERE:
            shutil.copyfile(file, folder / file.name)
    return dtype, keys
