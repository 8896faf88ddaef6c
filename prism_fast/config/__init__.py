"""Configuration: dataclasses, YAML recipes and ``key.sub=value`` overrides.

A recipe is a YAML file that holds only what differs from the defaults of the dataclasses. Unknown keys, wrong types and
values out of range are errors that name the key. The resolved configuration is written to the run directory as
``config.yaml``.
"""

from __future__ import annotations

from prism_fast.config.data import DataConfig, JudgeConfig, RewardConfig
from prism_fast.config.errors import ConfigError
from prism_fast.config.load import dump_config, load_config, shipped_recipes
from prism_fast.config.models import LoraConfig, ModelConfig, TinyConfig, UpcycleConfig
from prism_fast.config.run import (
    CONTROLS,
    STAGES,
    Config,
    TrackConfig,
    TrackioConfig,
    WandbConfig,
    control_updates,
    sampling_of,
)
from prism_fast.config.stages import (
    AlignConfig,
    DiscriminatorUpdateConfig,
    DynamicSamplingConfig,
    EvalConfig,
    Loss,
    LossTermsConfig,
    RlvrConfig,
    RolloutConfig,
    SamplingConfig,
    SftConfig,
    WarmupConfig,
)
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.settings import EngineConfig

__all__ = [
    "CONTROLS",
    "STAGES",
    "AlignConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiscriminatorUpdateConfig",
    "DynamicSamplingConfig",
    "EngineConfig",
    "EvalConfig",
    "JudgeConfig",
    "LoraConfig",
    "Loss",
    "LossTermsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RlvrConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SftConfig",
    "TinyConfig",
    "TrackConfig",
    "TrackioConfig",
    "UpcycleConfig",
    "WandbConfig",
    "WarmupConfig",
    "control_updates",
    "dump_config",
    "load_config",
    "sampling_of",
    "shipped_recipes",
]
