"""Checks of checkpoint folders: a fault is named before a partly loaded model can be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

WEIGHTS = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
_SHOWN = 8


def read_model_type(folder: Path) -> str:
    """``model_type`` of a checkpoint folder that has a configuration and safetensors weights.

    Raises:
        FileNotFoundError: the folder, ``config.json`` or the weights are missing (a pickled ``pytorch_model.bin``
            does not count: it is never read).
        ValueError: ``config.json`` is no JSON object or names no model type.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing: {folder} is not a Hugging Face checkpoint folder")
    if not any((folder / name).is_file() for name in (WEIGHTS, SHARD_INDEX)):
        pickled = ", a pickled checkpoint is there but is never read: convert it" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder / 'model.safetensors'} (or its shard index) is missing{pickled}")
    try:
        model_type = json.loads(config_file.read_text())["model_type"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} does not name a model_type: {error!r}") from error
    return str(model_type)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order of name: the single one, or the shards of the index.

    Raises:
        FileNotFoundError: neither is there, or a shard of the index is missing.
        ValueError: the index is no index, or names a file outside the folder.
    """
    if (folder / WEIGHTS).is_file():  # transformers reads this one where both exist
        return [folder / WEIGHTS]
    return sorted(set(_shards(folder).values()))


def find_tensor(folder: Path, key: str) -> Path | None:
    """The safetensors file that holds tensor ``key`` (raises like :func:`weight_files`), or None."""
    file = folder / WEIGHTS
    if not file.is_file():
        return _shards(folder).get(key)
    with open_weights(file) as tensors:
        return file if key in set(tensors.keys()) else None


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name to shard, as the index has it."""
    index = folder / SHARD_INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS} (or its shard index) is missing")
    try:
        names = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a shard index: {error!r}") from error
    for name in set(map(str, names.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}: shards must be in the folder itself")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {index} names it")
    return {key: folder / str(name) for key, name in names.items()}


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """``safe_open`` of one file. Raises ValueError naming a file that is damaged or not in the safetensors format."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}): copy it again") from error


@contextmanager
def without_load_report() -> Iterator[None]:
    """Suppress transformers' warning table while loading: it calls the score head unexpected, and
    :func:`check_loading` refuses real faults."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_loading(folder: Path, info: Mapping[str, Any], *, ignore_unexpected: frozenset[str] = frozenset()) -> None:
    """Refuse a checkpoint whose tensors do not match the model exactly; ``info`` is transformers' loading report.

    Raises:
        ValueError: names missing, unexpected and wrongly shaped tensors, and the remedy.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(set(info["unexpected_keys"]) - ignore_unexpected):
        problems.append(f"unexpected {_some(unexpected)}")
    if mismatched := sorted(info["mismatched_keys"]):
        problems.append("wrong shape " + _some([f"{n} (file {tuple(a)}, model {tuple(b)})" for n, a, b in mismatched]))
    if errors := info.get("conversion_errors") or info.get("error_msgs"):
        problems.append(f"not convertible {_some([str(error) for error in errors])}")
    if problems:
        raise ValueError(
            f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}. "
            "Use the weights and the config.json of one and the same checkpoint"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
