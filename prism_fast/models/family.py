"""Model families: their classes, their ``model_type`` strings, and where their language model and image tower are.

Code that reads or builds a model asks here. Modules that replace the arithmetic of one family's layers (``experts``,
``fused_trunk``, ``score_rows``, ``vision_attention``, ``positions``) name its classes directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeModel,
)

Role = Literal["policy", "discriminator"]


@dataclass(frozen=True)
class Family:
    """A dense architecture for policies and its sparse sibling for discriminators.

    ``policy_type``, ``discriminator_type``: ``model_type`` of their ``config.json``. ``policy``: with the output head.
    ``discriminator``: without one.
    """

    policy_type: str
    policy_config: type[PreTrainedConfig]
    policy: type[PreTrainedModel]
    discriminator_type: str
    discriminator_config: type[PreTrainedConfig]
    discriminator: type[PreTrainedModel]


QWEN3_VL = Family(
    policy_type="qwen3_vl",
    policy_config=Qwen3VLConfig,
    policy=Qwen3VLForConditionalGeneration,
    discriminator_type="qwen3_vl_moe",
    discriminator_config=Qwen3VLMoeConfig,
    discriminator=Qwen3VLMoeModel,
)
FAMILIES = {"qwen3_vl": QWEN3_VL}


def family_of(role: Role, model_type: str, folder: Path) -> Family:
    """The family in which models of ``model_type`` have this role; ``folder``: for the error.

    Raises:
        ValueError: there is none.
    """
    types = {getattr(family, f"{role}_type"): family for family in FAMILIES.values()}
    if model_type in types:
        return types[model_type]
    cure = "build one from a policy (`prism-fast convert upcycle`)"
    if role == "policy":
        sparse = any(model_type == family.discriminator_type for family in FAMILIES.values())
        cure = "load it with load_discriminator" if sparse else "pass the folder of a dense Qwen3-VL model"
    allowed = " or ".join(map(repr, types))
    raise ValueError(f"{folder} holds a {model_type!r} model, but a {role} must be {allowed}: {cure}")


def trunk(model: nn.Module) -> nn.Module:
    """The language model without its head, of a model with a head or without."""
    return _backbone(model).language_model


def tower(model: nn.Module) -> nn.Module:
    """The image tower, likewise."""
    return _backbone(model).visual


def _backbone(model: nn.Module) -> nn.Module:
    return model.model if hasattr(model, "lm_head") else model
