"""What is exported loads in stock transformers and computes the same."""

from __future__ import annotations

from prism_fast.models.convert import from_released, to_released, upcycle_folder
from prism_fast.models.policy import save_policy
from tests.models.exports import assert_discriminator_export, assert_policy_export


def test_a_policy_and_every_discriminator_made_of_it(policy, processor, make_prompt, tmp_path):
    prompt = make_prompt((64, 32), (32, 96))
    save_policy(policy, processor, tmp_path / "policy")
    assert_policy_export(tmp_path / "policy", prompt)
    upcycle_folder(tmp_path / "policy", tmp_path / "discriminator", num_experts=3, top_k=2, seed=3, noise_std=0.1)
    from_released(tmp_path / "discriminator", tmp_path / "stock")
    to_released(tmp_path / "stock", tmp_path / "back")
    for name in ("discriminator", "stock", "back"):
        assert_discriminator_export(tmp_path / name, prompt)
