"""One record per model family: what has which role, and where its parts are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from prism_fast.models.family import FAMILIES, family_of, tower, trunk

FOLDER = Path("checkpoints/x")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_each_role_is_found_by_its_model_type(family):
    assert family_of("policy", family.policy_type, FOLDER) is family
    assert family_of("discriminator", family.discriminator_type, FOLDER) is family
    for role in ("policy", "discriminator"):
        assert getattr(family, f"{role}_config").model_type == getattr(family, f"{role}_type")
        assert getattr(family, role).config_class is getattr(family, f"{role}_config")


@pytest.mark.parametrize(
    ("role", "model_type", "said"),
    [
        ("policy", "qwen3_vl_moe", "x holds a 'qwen3_vl_moe' model, but a policy must be 'qwen3_vl': load it with"),
        ("policy", "llama", "x holds a 'llama' model, but a policy must be 'qwen3_vl': pass the folder of a dense"),
        ("discriminator", "qwen3_vl", "a discriminator must be 'qwen3_vl_moe': build one from a policy"),
    ],
)
def test_another_architecture_is_refused_by_name_with_the_cure(role, model_type, said):
    with pytest.raises(ValueError, match=said):
        family_of(role, model_type, FOLDER)


def test_trunk_and_tower_of_a_model_with_a_head_and_without(policy):
    for model in (policy, policy.model):
        assert trunk(model) is policy.model.language_model and tower(model) is policy.model.visual
        assert isinstance(trunk(model).embed_tokens, torch.nn.Embedding)


def test_nobody_else_compares_model_types():
    """A refusal by architecture that does not ask the table would not know of a second family."""
    root = Path(__file__).parents[2] / "prism_fast"
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "family.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"[\"']qwen3_vl(_moe)?[\"']", line)
    ]
    assert found == []
