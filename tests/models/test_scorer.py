"""A score head and a routing bias per kind of span: equal to none of it at first, stored whole, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel

from prism_fast.models.convert import from_released, to_released
from prism_fast.models.discriminator import Discriminator, build_discriminator, load_discriminator, save_discriminator
from prism_fast.models.forward import collate
from prism_fast.models.scorer import BIAS_KEY, CONFIG_KEY, HEAD_KEY, SpanSwitches
from prism_fast.models.sizes import discriminator_size
from prism_fast.models.upcycle import sparse_config

BOTH = SpanSwitches("per_span", "span")
KIND = torch.tensor([0, 1, 0, 1])


def build(policy, switches: SpanSwitches | None = None) -> Discriminator:
    return build_discriminator(policy, seed=21, head_std=0.5, router_std=0.3, switches=switches).eval()


@pytest.fixture
def learnt(policy, generator) -> Discriminator:
    """With both on, and values that show."""
    model = build(policy, BOTH)
    with torch.no_grad():
        model.routing_bias.copy_(torch.randn(model.routing_bias.shape, generator=generator))
        model.v_head[1].weight.copy_(torch.randn(model.v_head[1].weight.shape, generator=generator))
    return model


@pytest.fixture
def batch(policy, processor, make_prompt, make_rows):
    prompts = [make_prompt((128, 32)), make_prompt((32, 64), text="Which is larger?")]
    return collate(prompts, [0, 1, 1, 0], make_rows([7, 3, 12, 0]), model_config=policy.config, pad_id=processor.pad_id)


@pytest.fixture
def folder(learnt, processor, tmp_path) -> Path:
    save_discriminator(learnt, processor, tmp_path / "d")
    return tmp_path / "d"


@torch.no_grad()
def scores(model: Discriminator, batch) -> torch.Tensor:
    return model(batch, kind=KIND).score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", [SpanSwitches(heads="per_span"), SpanSwitches(routing_bias="span"), BOTH])
def test_switched_on_nothing_changes_to_the_bit(policy, batch, switches, dtype):
    off, on = build(policy), build(policy, switches)
    assert on.scorer().switches == switches and off.scorer().switches == SpanSwitches()
    for model in (off, on):
        model.backbone.to(dtype)
    with torch.no_grad():
        one, other = off(batch), on(batch, kind=KIND)
    assert torch.equal(one.score, other.score) and float(one.score.abs().min()) > 0
    assert torch.equal(one.hidden, other.hidden)
    assert all(torch.equal(a, b) for a, b in zip(one.router_logits, other.router_logits, strict=True))


@torch.no_grad()
def test_a_bias_is_part_of_the_logits_of_its_spans_rows_and_of_no_other(policy, batch, learnt):
    plain = build(policy)
    width, prompt = batch.input_ids.shape[1], batch.prompt_lengths
    inside = torch.arange(width) >= prompt[:, None]  # [B, S]; the last row has no span
    logits = [model(batch, kind=KIND).router_logits for model in (plain, learnt)]
    moved = (logits[1][0] - logits[0][0]).view(4, width, -1)  # of the first layer, whose input is the same
    for b, kind in enumerate(KIND):
        torch.testing.assert_close(moved[b][inside[b]], learnt.routing_bias[0, kind].expand(inside[b].sum(), -1))
        assert not moved[b][~inside[b]].any()
    assert bool((learnt.routing_bias[:, 0] != learnt.routing_bias[:, 1]).all())
    changed = scores(learnt, batch) != plain(batch).score
    assert changed[:3].all()


@torch.no_grad()
def test_each_kind_has_its_head(policy, batch, learnt):
    out = learnt(batch, kind=KIND)
    for b, kind in enumerate(KIND):
        torch.testing.assert_close(out.score[b], out.hidden[b] @ learnt.v_head[1].weight[kind])
    assert not torch.equal(scores(learnt, batch), learnt(batch, kind=1 - KIND).score)


def test_what_needs_a_kind_says_so(policy, batch):
    for switches, message in ((SpanSwitches(heads="per_span"), "two heads"), (BOTH, "routing bias")):
        with pytest.raises(ValueError, match=message):
            build(policy, switches)(batch)
    with pytest.raises(ValueError, match="head_in_float32=False is for the published head"):
        Discriminator(build(policy).backbone, head_in_float32=False, switches=SpanSwitches(heads="per_span"))


def test_a_folder_holds_both_and_says_so(folder, learnt, batch, tmp_path):
    found = load_discriminator(folder).eval()
    assert found.scorer().switches == BOTH and torch.equal(scores(found, batch), scores(learnt, batch))
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in learnt.state_dict().items())
    entry = json.loads((folder / "config.json").read_text())[CONFIG_KEY]
    assert entry["heads"] == "per_span" and entry["routing_bias"] == "span" and "stock transformers" in entry["note"]
    assert not (folder / "value_head.pt").exists(), "a reader of one head and no bias would score wrongly"
    (tmp_path / "value_head.pt").write_bytes(b"of one head")
    save_discriminator(learnt, None, tmp_path)
    assert not (tmp_path / "value_head.pt").exists(), "nor may one stay that stood there"
    double = load_discriminator(folder, dtype=torch.float64)
    assert double.routing_bias.dtype == double.v_head[1].weight.dtype == torch.float64
    half = load_discriminator(folder, dtype=torch.bfloat16)
    assert half.routing_bias.dtype == half.v_head[1].weight.dtype == torch.float32


def test_stock_transformers_reports_what_it_leaves_out(folder, learnt):
    stock, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {HEAD_KEY, BIAS_KEY} and not info["missing_keys"]
    theirs = stock.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in learnt.backbone.state_dict().items())


def test_off_leaves_the_released_folder_as_it_was(policy, processor, tmp_path):
    save_discriminator(build(policy), processor, tmp_path / "d")
    assert CONFIG_KEY not in json.loads((tmp_path / "d/config.json").read_text())
    assert (tmp_path / "d/value_head.pt").is_file()
    assert BIAS_KEY not in load_file(tmp_path / "d/model.safetensors")


def test_a_shared_head_becomes_two_and_the_way_back_is_refused(policy, processor, batch, folder, tmp_path):
    save_discriminator(build(policy), processor, tmp_path / "shared")
    on = load_discriminator(tmp_path / "shared", switches=BOTH).eval()
    assert on.scorer().switches == BOTH
    assert torch.equal(scores(on, batch), load_discriminator(tmp_path / "shared").eval()(batch).score)
    for switches, key in (
        (SpanSwitches("shared", "span"), "align.discriminator.heads=per_span"),
        (SpanSwitches("per_span", "none"), "align.discriminator.routing_bias=span"),
    ):
        with pytest.raises(ValueError, match=f"{folder}.*{key}"):
            load_discriminator(folder, switches=switches)


def test_a_round_trip_of_layouts_keeps_both(folder, tmp_path):
    from_released(folder, tmp_path / "stock")
    to_released(tmp_path / "stock", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in folder.iterdir()}
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_discriminator(tmp_path / "stock").scorer().switches == BOTH


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        (BIAS_KEY, None, f"has no {BIAS_KEY}: its config.json says"),
        (BIAS_KEY, torch.zeros(2, 1, 4), rf"{BIAS_KEY} in .* has shape \(2, 1, 4\), expected"),
        (HEAD_KEY, torch.zeros(1, 32), rf"{HEAD_KEY} in .* has shape \(1, 32\), expected \(2, "),
        (CONFIG_KEY, None, rf"{HEAD_KEY} in .* has shape \(2, .*expected \(1, "),
        (CONFIG_KEY, {"routing_bias": "none", "heads": "per_span"}, f"unexpected .*{BIAS_KEY}"),
        (CONFIG_KEY, {"heads": "three"}, "which this version does not know"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(folder, tmp_path, key, entry, message):
    bent = tmp_path / "bent"
    shutil.copytree(folder, bent)
    holder = bent / ("config.json" if key == CONFIG_KEY else "model.safetensors")
    content = json.loads(holder.read_text()) if key == CONFIG_KEY else load_file(holder)
    del content[key]
    content |= {} if entry is None else {key: entry}
    if key == CONFIG_KEY:
        holder.write_text(json.dumps(content))
    else:
        save_file(content, holder, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_discriminator(bent)


def test_sizes_count_them(policy):
    config = sparse_config(policy.config, 4, 2)
    model = build_discriminator(policy, seed=1, switches=BOTH)
    size = discriminator_size(config, torch.float32, BOTH)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert isinstance(model.backbone, Qwen3VLMoeModel)
