"""A model of any checkpoint as a folder in Hugging Face format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prism_fast.config import Config, load_config
from prism_fast.engine.stored import Stored
from prism_fast.models.discriminator import load_discriminator, save_discriminator
from prism_fast.models.policy import load_policy, save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.writing import refuse_existing, whole_folder
from prism_fast.train.adapt import adapt
from prism_fast.train.checkpoint import CheckpointError, read_checkpoint
from prism_fast.train.context import DTYPES
from prism_fast.train.record import RECORD

MODELS = ("policy", "discriminator")


def export_checkpoint(path: Path, out: Path, which: str | None = None) -> str:
    """Write the model of the checkpoint at ``path`` (``RUN/checkpoints/<stage>-<step>``) to the folder ``out``, as the
    stage's own export would be: rounded to ``model.dtype``, adapters merged. Configuration and processor come from the
    model that the stage began with, or from its export.

    Args:
        which: "policy" or "discriminator"; None: the policy if the stage trains it.

    Returns:
        The name of the model.

    Raises:
        CheckpointError: the checkpoint is damaged or lies in no run directory, or no such model is in it.
        FileExistsError: ``out`` exists.
    """
    refuse_existing(out)
    run = path.absolute().parent.parent
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{path} is no RUN/checkpoints/<stage>-<step>: {run} has no config.yaml")
    checkpoint, config = read_checkpoint(path), load_config(str(run / "config.yaml"))
    stage, held = checkpoint.state["stage"], [name for name in MODELS if (path / name).is_dir()]
    name = which or held[0]
    if name not in held:
        raise CheckpointError(f"{path.name} holds no {name}, but {' and '.join(held)}")
    source = _description(run, config, stage, name)
    processor, dtype = Processor.from_pretrained(source), DTYPES[config.model.dtype]
    save: Callable[..., None]
    model: nn.Module
    if name == "policy":
        model, save = load_policy(source, dtype=dtype), save_policy
        adapt(config, model, stage)
    else:
        model, save = load_discriminator(source, dtype=dtype), save_discriminator
    stored = Stored(checkpoint.folder(name))
    stored.belong_to({key: tuple(p.shape) for key, p in model.named_parameters()})
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(stored[f"model.{key}"])
    with whole_folder(out, needs=sum(p.nbytes for p in model.parameters())) as partial:
        save(model, processor, partial)
    return name


def _description(run: Path, config: Config, stage: str, name: str) -> Path:
    """A folder with the model's configuration and processor."""
    file = run / RECORD
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    began = dict(zip(MODELS, record.get("began", {}).get(stage, ()), strict=False)).get(name)
    exported = stage if name == "policy" else {"warmup": "discriminator-warmup"}.get(stage, "discriminator")
    given = getattr(config.model, name)
    folders = [*([run / began] if began else []), run / "export" / exported, Path(given)]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"no folder tells how the {name} of {stage} is built: it is made in the run, and {folders[-2]} is written when "
        "the stage is complete (prism-fast resume)"
    )
