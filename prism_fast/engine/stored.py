"""An engine's checkpoint: whole tensors by name in one or several safetensors files, whoever wrote them.

``model.<name>``: a weight (its master where there is one); ``step.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>``:
AdamW's state of it, absent where it never had a gradient; ``updates``: optimizer steps. So any number of ranks, and any
engine, reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_fast.models.writing import disk_full, look_for_room

FILE = "engine.safetensors"


def part_name(rank: int, ranks: int) -> str:
    """The file of one of several ranks."""
    return FILE if ranks == 1 else f"engine-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises DiskFullError."""
    needs = sum(tensor.nbytes for tensor in tensors.values())
    with disk_full(file, needs):
        look_for_room(file.parent, needs)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)


class Stored:
    """Reads one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("engine*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no checkpoint of an engine (engine*.safetensors)")
        opened = [safe_open(file, framework="pt") for file in files]
        self._files = {name: file for file in opened for name in file.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    @property
    def updates(self) -> int:
        return int(self["updates"])

    def belong_to(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless these are the weights of a model with parameters of these ``shapes``."""
        for name, shape in shapes.items():
            file = self._files.get(f"model.{name}")
            saved = None if file is None else tuple(file.get_slice(f"model.{name}").get_shape())
            if saved != shape:
                fault = "is missing" if saved is None else f"has shape {saved}, not {shape}"
                raise ValueError(f"the checkpoint does not belong to this model: {name} {fault}")
        further = sorted(name for name in self._files if name.startswith("model.") and name[6:] not in shapes)
        if further:
            raise ValueError(f"the checkpoint does not belong to this model, which has no {further[0][6:]}")
