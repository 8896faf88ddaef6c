"""The convert commands hand over what was asked and report refusals as one message."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from prism_fast.models.discriminator import load_discriminator


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_upcycle_and_both_layouts(invoke, policy_folder, tmp_path):
    made, stock, back = (tmp_path / name for name in ("made", "stock", "back"))
    options = ["--experts", 3, "--top-k", 1, "--noise-std", 0, "--router-std", 0.5, "--seed", 9]
    assert invoke("convert", "upcycle", policy_folder, made, *options) == (0, f"written: {made}\n")
    found = load_discriminator(made)
    text, experts = found.backbone.config.text_config, found.backbone.language_model.layers[0].mlp
    assert (text.num_experts, text.num_experts_per_tok) == (3, 1)
    assert torch.equal(experts.experts.down_proj[0], experts.experts.down_proj[2])
    assert 0.3 < experts.gate.weight.std() < 0.7
    assert invoke("convert", "upcycle", policy_folder, tmp_path / "other", *options[:-1], 10)[0] == 0
    assert not torch.equal(tensors(tmp_path / "other")["v_head.1.weight"], tensors(made)["v_head.1.weight"])
    assert invoke("convert", "from-released", made, stock)[0] == 0
    assert invoke("convert", "to-released", stock, back)[0] == 0
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert torch.equal(tensors(stock)[name], tensors(made)[name].transpose(1, 2))
    assert tensors(back).keys() == tensors(made).keys()
    assert all(torch.equal(tensor, tensors(made)[key]) for key, tensor in tensors(back).items())


def test_refusals_are_one_message(command, policy_folder, discriminator_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    cases = [
        (["upcycle", policy_folder, tmp_path / "taken"], "taken exists already"),
        (["upcycle", tmp_path / "gone", tmp_path / "out"], "gone does not exist"),
        (["to-released", discriminator_folder, tmp_path / "out"], "already in the released layout"),
        (["from-released", policy_folder, tmp_path / "out"], "convert upcycle"),
    ]
    for arguments, words in cases:
        code, message = command("convert", *arguments)
        assert code == 1 and words in message and "Traceback" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
