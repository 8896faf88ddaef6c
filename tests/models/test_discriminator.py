from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from prism_fast.models.discriminator import (
    HEAD_KEY,
    build_discriminator,
    expert_choices,
    load_balance_loss,
    load_discriminator,
    save_discriminator,
)
from prism_fast.models.forward import collate, hidden_states
from prism_fast.models.policy import load_policy


@pytest.fixture(scope="module")
def discriminator(policy):
    return build_discriminator(policy, seed=21, head_std=0.5).eval()


@pytest.fixture
def batch(policy, processor, make_prompt, make_rows):
    prompts = [make_prompt((128, 32)), make_prompt((32, 64), text="Which is larger?")]
    rows = make_rows([7, 3, 12, 1])
    return collate(prompts, [0, 1, 1, 0], rows, model_config=policy.config, pad_id=processor.pad_id)


@pytest.fixture
def folder(discriminator, processor, tmp_path):
    save_discriminator(discriminator, processor, tmp_path / "d")
    return tmp_path / "d"


def test_score_is_the_head_on_the_last_token_of_each_row(discriminator, batch):
    with torch.no_grad():
        out = discriminator(batch)
        every = hidden_states(discriminator.backbone, batch)
    for b, n in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(out.hidden[b], every[b, n - 1])
        torch.testing.assert_close(out.score[b], every[b, n - 1] @ discriminator.v_head[1].weight[0])
    assert out.score.std() > 0.01
    with torch.no_grad():
        earlier = discriminator(batch, last=batch.lengths - 2)
    torch.testing.assert_close(earlier.hidden, every[torch.arange(4), batch.lengths - 2])
    assert len(out.router_logits) == 2
    assert {tuple(x.shape) for x in out.router_logits} == {(batch.input_ids.numel(), 4)}


def test_gradients_reach_every_parameter_that_matters(discriminator, batch):
    model = copy.deepcopy(discriminator).train()
    model(batch).score.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_head_computes_in_float32_and_in_float64_for_float64(discriminator, batch):
    half = copy.deepcopy(discriminator).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = half(batch)
    assert out.score.dtype == torch.float32
    expected = out.hidden.double() @ half.v_head[1].weight[0].double()
    torch.testing.assert_close(out.score.double(), expected, rtol=1e-6, atol=1e-6)
    double = copy.deepcopy(discriminator).double()
    assert double(batch).score.dtype == torch.float64
    published = copy.deepcopy(half)
    published.head_in_float32 = False
    assert published(batch).score.dtype == torch.bfloat16


def test_equal_rows_get_equal_scores_to_the_bit(discriminator, processor, make_prompt, make_rows, rng):
    prompts = [make_prompt((128, 32)), make_prompt()]
    rows = make_rows(rng.integers(1, 30, 40))
    which = rng.integers(0, 2, 40).tolist()
    copies = rng.integers(0, 40, 25).tolist()
    batch = collate(
        prompts,
        which + [which[i] for i in copies],
        rows + [rows[i] for i in copies],
        model_config=discriminator.backbone.config,
        pad_id=processor.pad_id,
    )
    with torch.no_grad():
        score = discriminator(batch).score
    assert torch.equal(score[40:], score[copies])
    assert len(score.unique()) > 30


def test_head_dropout_acts_in_train_mode_only_and_scales(policy, generator):
    model = build_discriminator(policy, seed=1, head_dropout=0.5)
    hidden = torch.randn(2000, policy.config.text_config.hidden_size, generator=generator)
    torch.manual_seed(0)
    assert not torch.equal(model.train().score_hidden(hidden), model.score_hidden(hidden))
    assert torch.equal(model.eval().score_hidden(hidden), model.score_hidden(hidden))
    with torch.no_grad():
        mean = torch.stack([model.train().score_hidden(hidden) for _ in range(300)]).mean(0)
        plain = model.eval().score_hidden(hidden)
    assert (mean - plain).std() < 0.1 * plain.std()
    model = build_discriminator(policy, seed=1).train()
    assert torch.equal(model.score_hidden(hidden), model.score_hidden(hidden))


def test_the_seed_decides_the_head(policy):
    heads = [build_discriminator(policy, seed=s).v_head[1].weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std().item() < 0.03


def test_experts_are_ours_and_a_choice_by_hand_is_respected(discriminator):
    text = discriminator.backbone.config.text_config
    assert text._experts_implementation == "prism"
    other = copy.deepcopy(discriminator)
    other.backbone.set_experts_implementation("batched_mm")
    other.to(torch.float64)
    assert other.backbone.config.text_config._experts_implementation == "batched_mm"


def test_round_trip_keeps_every_bit(discriminator, folder, batch):
    loaded = load_discriminator(folder)
    theirs = loaded.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in discriminator.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(batch).score, discriminator(batch).score)


def test_files_have_the_released_layout(discriminator, folder):
    state = load_file(folder / "model.safetensors")
    text = discriminator.backbone.config.text_config
    e, h, i = text.num_experts, text.hidden_size, text.moe_intermediate_size
    prefix = "model.language_model.layers.1.mlp"
    experts = discriminator.backbone.language_model.layers[1].mlp.experts
    assert state[f"{prefix}.experts.gate_up_proj"].shape == (e, h, 2 * i)
    assert state[f"{prefix}.experts.down_proj"].shape == (e, i, h)
    assert torch.equal(state[f"{prefix}.experts.gate_up_proj"], experts.gate_up_proj.transpose(1, 2))
    assert torch.equal(state[f"{prefix}.experts.down_proj"], experts.down_proj.transpose(1, 2))
    assert state[HEAD_KEY].shape == (1, h)
    assert not [key for key in state if "lm_head" in key]
    side = torch.load(folder / "value_head.pt", weights_only=True)
    assert list(side) == ["v_head.summary.weight"]
    assert torch.equal(side["v_head.summary.weight"], state[HEAD_KEY])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert config["text_config"]["num_experts"] == e
    assert config["text_config"]["rope_theta"] == 10000.0
    assert config["text_config"]["rope_scaling"]["mrope_section"] == [2, 1, 1]
    assert "_name_or_path" not in json.dumps(config)


def test_stock_transformers_loads_the_folder(discriminator, folder, batch):
    stock, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {HEAD_KEY} and not info["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(stock.model, batch), hidden_states(discriminator.backbone, batch), rtol=1e-4, atol=1e-5
        )


def test_the_memory_layout_and_shards_load_too(discriminator, folder):
    state = load_file(folder / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in state.items()}
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(turned, folder, max_shard_size=40_000, metadata={"format": "pt"})
    assert not (folder / "model.safetensors").exists()
    loaded = load_discriminator(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in discriminator.state_dict().items())
    index = folder / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    del listing["weight_map"][HEAD_KEY]
    index.write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=rf"model.safetensors.index.json has no {HEAD_KEY}"):
        load_discriminator(folder)


def rewrite(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def published_head(folder) -> torch.nn.Linear:
    """A score head as the published loader makes it: drawn from the global generator, then overwritten by what it
    finds."""
    head = torch.nn.Linear(32, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=0.02)
    found = load_file(folder / "model.safetensors").get(HEAD_KEY)
    if found is None:
        warnings.warn("no weights of the score head were found", stacklevel=2)
    else:
        head.load_state_dict({"weight": found})
    return head


def test_a_missing_head_is_an_error_where_the_published_loader_draws_one(folder, discriminator):
    assert torch.equal(published_head(folder).weight, discriminator.v_head[1].weight)
    rewrite(folder, lambda state: state.pop(HEAD_KEY))
    with pytest.warns(UserWarning, match="score head"):
        drawn = [published_head(folder).weight for _ in range(2)]
    assert not torch.equal(*drawn), "other scores at every start"
    assert (folder / "value_head.pt").is_file(), "the side file does not help either"
    with pytest.raises(ValueError, match=rf"model.safetensors has no {HEAD_KEY}"):
        load_discriminator(folder)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (HEAD_KEY, torch.zeros(1, 7), r"v_head.1.weight in .* has shape \(1, 7\), expected \(1, 32\)"),
        ("model.language_model.norm.weight", None, "missing language_model.norm.weight"),
        (
            "model.language_model.norm.weight",
            torch.zeros(5),
            r"language_model.norm.weight \(file \(5,\), model \(32,\)\)",
        ),
        ("v_head.1.bias", torch.zeros(1), "unexpected v_head.1.bias"),
    ],
)
def test_damaged_checkpoints_are_named(folder, key, tensor, message):
    rewrite(folder, lambda state: state.pop(key) if tensor is None else state.update({key: tensor}))
    with pytest.raises(ValueError, match=message):
        load_discriminator(folder)


def test_square_experts_and_other_architectures_are_refused(folder, policy, processor, tmp_path):
    with pytest.raises(
        ValueError, match="'qwen3_vl_moe' model, but a policy must be 'qwen3_vl': load it with load_disc"
    ):
        load_policy(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gate_up_proj square"):
        load_discriminator(folder)
    dense = tmp_path / "dense"
    shutil.copytree(folder, dense)
    config["model_type"] = "qwen3_vl"
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be 'qwen3_vl_moe'"):
        load_discriminator(dense)


def test_a_language_model_head_in_the_file_is_ignored(folder, discriminator, processor):
    rewrite(folder, lambda state: state.update({"lm_head.weight": torch.zeros(len(processor.tokenizer), 32)}))
    assert torch.equal(load_discriminator(folder).v_head[1].weight, discriminator.v_head[1].weight)


def test_bfloat16_backbone_keeps_a_float32_head(folder):
    loaded = load_discriminator(folder, dtype=torch.bfloat16, head_dropout=0.1)
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    assert loaded.v_head[1].weight.dtype == torch.float32
    assert loaded.v_head[0].p == 0.1


# Load balancing


def test_load_balance_equals_transformers_with_and_without_mask(generator):
    logits = tuple(torch.randn(4 * 9, 5, generator=generator) for _ in range(3))
    mask = torch.rand(4, 9, generator=generator) > 0.4
    for given in (None, mask):
        ours = load_balance_loss(logits, 5, 2, given)
        torch.testing.assert_close(ours, load_balancing_loss_func(logits, 5, 2, given))


def test_load_balance_is_joint_over_layers_and_has_a_gradient(generator):
    """Each layer collapses onto its own expert: jointly that is balance, layer by layer it would not be."""
    collapsed = tuple((20.0 * torch.eye(2)[layer]).repeat(6, 1).requires_grad_() for layer in range(2))
    assert load_balance_loss(collapsed, 2, 1).item() == pytest.approx(1.0, abs=1e-6)
    assert load_balance_loss(collapsed[:1], 2, 1).item() == pytest.approx(2.0, abs=1e-6)
    logits = torch.randn(50, 4, generator=generator, dtype=torch.float64).requires_grad_()
    load_balance_loss((logits,), 4, 2).backward()
    assert logits.grad.abs().max() > 1e-4


def test_load_balance_of_micro_batches_adds_up_with_the_choices_of_the_whole(generator):
    logits = [torch.randn(40, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    mask = torch.rand(40, generator=generator) > 0.3
    whole = load_balance_loss(tuple(logits), 4, 2, mask)
    gradients = torch.autograd.grad(whole, logits)
    parts = [slice(0, 7), slice(7, 31), slice(31, 40)]
    choices = sum(expert_choices(tuple(x[part] for x in logits), 4, 2, mask[part]) for part in parts)
    assert choices.sum() == 2 * 2 * mask.sum(), "two choices per token and layer"
    cut = sum(load_balance_loss(tuple(x[p] for x in logits), 4, 2, mask[p], choices=choices) for p in parts)
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(cut, logits), gradients, rtol=1e-12, atol=1e-16)
    alone = sum(load_balance_loss(tuple(x[p] for x in logits), 4, 2, mask[p]) for p in parts) / 3
    assert abs(alone.item() - whole.item()) > 1e-3, "means of its own would make another loss of each micro-batch"


def test_double_softmax_flattens_the_probabilities_but_not_the_choice(generator):
    logits = (5 * torch.randn(64, 4, generator=generator),)
    plain, double = load_balance_loss(logits, 4, 2), load_balance_loss(logits, 4, 2, double_softmax=True)
    torch.testing.assert_close(double, load_balance_loss(tuple(x.softmax(-1) for x in logits), 4, 2))
    assert abs(double.item() - 2) < abs(plain.item() - 2)
    with pytest.raises(ValueError, match="4 experts, expected 3"):
        load_balance_loss(logits, 3, 2)
