"""The policy as a stage trains it: which weights learn, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from prism_fast.config import Config, ConfigError
from prism_fast.models.freezing import freeze, trained_parameters
from prism_fast.models.lora import add_lora, save_adapter
from prism_fast.train.context import Run
from prism_fast.train.seeds import derive_seed


def frozen_patterns(config: Config, stage: str) -> Sequence[str]:
    """Patterns of the weights that ``stage`` does not train."""
    return [*config.model.freeze, *(config.sft.freeze if stage in ("sft", "sft_continued") else [])]


def adapt(config: Config, policy: nn.Module, stage: str) -> None:
    """Freeze weights of ``policy`` or give it adapters, in place, as ``config`` says for ``stage``.

    Raises:
        ConfigError: adapters are asked for where the weights are new.
        ValueError, NotImplementedError, ImportError: as ``models.freezing.freeze`` and ``models.lora.add_lora``.
    """
    lora = config.model.lora
    if lora.rank and stage == "sft" and config.model.policy == "tiny":
        raise ConfigError(
            "model.policy must be the folder of a trained policy with model.lora, got 'tiny': adapters on random "
            "weights learn little"
        )
    freeze(policy, frozen_patterns(config, stage))
    if lora.rank:
        seed = derive_seed(config.seed, stage, "lora")
        add_lora(policy, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)


def adapt_and_tell(run: Run, policy: nn.Module, stage: str) -> None:
    """As `adapt`; where not all weights learn, ``model/trained_parameters`` and ``model/parameters`` are recorded."""
    adapt(run.config, policy, stage)
    trained, total = trained_parameters(policy)
    if trained < total and run.resume.checkpoint_of(stage) is None:
        run.metrics.write(stage, 0, {"model/trained_parameters": trained, "model/parameters": total})
        run.console.print(f"{stage}: {trained:,} of the policy's {total:,} parameters learn", highlight=False)


def export_adapter(run: Run, policy: nn.Module, stage: str, base: Path) -> None:
    """Where ``model.lora.save_adapter`` asks for it: ``export/<stage>-adapter``, relative to the policy at ``base``."""
    if run.config.model.lora.save_adapter:
        name = str(base.resolve())
        needs = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
        run.write_export(f"{stage}-adapter", lambda folder: save_adapter(policy, folder, base=name), needs=needs)
