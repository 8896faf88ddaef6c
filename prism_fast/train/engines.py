"""The engine that ``engine.*`` asks for: made in one place, and what it needs of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from prism_fast.config import Config, ConfigError
from prism_fast.engine.launch import check_launch
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Engine
from prism_fast.engine.world import World

# What a stage takes at a time, which the ranks share.
DIVIDED = {
    "sft": "sft.batch",
    "sft_continued": "sft.batch",
    "warmup": "warmup.prompts",
    "align": "align.prompts",
    "rlvr": "rlvr.prompts",
    "rlvr_direct": "rlvr.prompts",
}


def check_learning(config: Config, ranks: int) -> None:
    """Raise ConfigError where ``engine.*`` cannot be used on this machine, or not with so many ranks."""
    try:
        check_launch(config.engine.kind, config.device)
        if config.engine.kind == "deepspeed":
            from prism_fast.engine.deepspeed_config import deepspeed_config, import_deepspeed

            deepspeed_config(config.engine.stage, torch.float32, config.engine.deepspeed)
            import_deepspeed()
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if config.engine.shards_weights and config.model.lora.rank and config.rollout.engine == "hf":
        raise ConfigError(
            "engine.stage=3 with model.lora needs rollout.engine=vllm: the copy that rollout.engine=hf samples from "
            "has no adapters. With them the moments are small: use engine.stage=1"
        )
    if config.engine.shards_weights and config.model.lora.save_adapter:
        raise ConfigError("model.lora.save_adapter needs whole weights on a rank: use engine.stage=1, or leave it out")
    for key in dict.fromkeys(DIVIDED[stage] for stage in config.stages):
        count = attrgetter(key)(config)
        if count % ranks:
            near = [multiple for multiple in (count // ranks * ranks, -(-count // ranks) * ranks) if multiple]
            raise ConfigError(
                f"{key}={count} cannot be divided over {ranks} ranks: give {' or '.join(map(str, near))}, or start "
                "another number of ranks"
            )
        if key == "rlvr.prompts" and config.rlvr.updates_per_step > count // ranks:
            raise ConfigError(
                f"rlvr.updates_per_step={config.rlvr.updates_per_step} is more than the {count // ranks} prompts of "
                f"each of {ranks} ranks: lower it or raise rlvr.prompts"
            )


def make_engine(
    config: Config,
    world: World,
    module: nn.Module,
    optimizer: OptimizerConfig,
    schedule: Callable[[int], float] | None = None,
) -> Engine:
    """The engine of a model that is to learn; all ranks make theirs in the same order. ``schedule``: factor of the
    learning rate by update (from 0)."""
    if config.engine.kind == "local":
        return LocalEngine(module, optimizer, schedule=schedule)
    from prism_fast.engine.deepspeed import DeepSpeedEngine

    options = config.engine.deepspeed
    return DeepSpeedEngine(
        module, optimizer, stage=config.engine.stage, schedule=schedule, options=options, world=world
    )


def keeps_weights(config: Config) -> bool:
    """Whether a module has its weights when its engine is closed."""
    return config.engine.kind == "local"


def whole_weights(engine: Engine, world: World) -> dict[str, Tensor]:
    """Joint. All weights of the engine's model by name, on rank 0; nothing on the others."""
    kept = {}
    for name, weight in engine.named_weights():
        if world.first:
            kept[name] = weight.cpu().clone() if engine.lockstep else weight  # gathered ones last until the next
    return kept
