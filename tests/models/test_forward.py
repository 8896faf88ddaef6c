from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.patch_embedding import LinearPatchEmbedding, use_linear_patch_embedding
from prism_fast.models.upcycle import upcycle

LENGTHS = (5, 9, 0, 4, 1)
ROWS = (2, 0, 0, 1, 2)


@pytest.fixture
def prompts(make_prompt):
    return [make_prompt((128, 32)), make_prompt(), make_prompt((64, 96), (160, 64), text="Compare them, please.")]


@pytest.fixture
def batch(policy, processor, prompts, make_rows):
    return collate(prompts, ROWS, make_rows(LENGTHS), model_config=policy.config, pad_id=processor.pad_id)


def stock_logits(model, prompts, batch) -> torch.Tensor:
    """The model's own forward: every row's images given and encoded again, padding masked."""
    images = [prompts[p] for p in ROWS if prompts[p].pixel_values is not None]
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        pixel_values=torch.cat([p.pixel_values for p in images]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in images]),
        mm_token_type_ids=(batch.input_ids == model.config.image_token_id).int(),
        use_cache=False,
    ).logits


# Stock modules hold float32 islands (RMSNorm, rotary tables): float64 does not bring the two closer than about 1e-8.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sparse", [False, True])
def test_logits_and_all_gradients_equal_the_stock_forward(policy, prompts, batch, generator, dtype, sparse):
    model = upcycle(policy, seed=1) if sparse else copy.deepcopy(policy)
    model = model.to(dtype)
    valid = batch.attention_mask
    ours = model.lm_head(hidden_states(model.model, batch))
    theirs = stock_logits(model, prompts, batch)
    scale = theirs[valid].abs().max()
    assert (ours - theirs)[valid].abs().max() <= 2e-6 * scale
    weight = torch.randn(ours.shape, generator=generator, dtype=dtype) * valid[..., None]
    parameters = dict(model.named_parameters())
    mine = torch.autograd.grad((ours * weight).sum(), list(parameters.values()))
    stock = torch.autograd.grad((theirs * weight).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, mine, stock, strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).norm() <= 5e-6 * b.norm(), name


def test_padding_and_neighbours_do_not_change_a_row(policy, processor, prompts, make_rows):
    tail = make_rows([6])[0]
    fill = {"model_config": policy.config, "pad_id": processor.pad_id}
    alone = collate(prompts, [0], [tail], **fill)
    crowd = collate(prompts, [1, 2, 0, 2], [*make_rows([40, 3]), tail, make_rows([1])[0]], **fill)
    with torch.no_grad():
        a = hidden_states(policy.model, alone)[0]
        b = hidden_states(policy.model, crowd)[2, : len(a)]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_each_distinct_prompt_is_encoded_once_and_unused_ones_never(policy, processor, prompts, make_rows):
    fill = {"model_config": policy.config, "pad_id": processor.pad_id}
    same = collate([*prompts, prompts[0]], [0, 3, 0, 3], make_rows([2] * 4), **fill)
    assert same.image_grid_thw.tolist() == [[1, 2, 8]]
    assert len(same.pixel_values) == 16
    assert same.image_feature.tolist() == [0, 1, 2, 3] * 4
    text = collate(prompts, [1, 1], make_rows([2, 3]), **fill)
    assert text.pixel_values is None and text.image_slot is None
    seen = []
    handle = policy.model.visual.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        hidden_states(policy.model, same)
        hidden_states(policy.model, text)
    handle.remove()
    assert len(seen) == 1


def test_another_image_changes_only_the_rows_that_show_it(policy, prompts, batch, generator):
    noise = torch.zeros_like(batch.pixel_values)
    noise[-16:] = torch.randn(16, noise.shape[1], generator=generator)  # prompt 0 was used last; it has 16 patches
    other = dataclasses.replace(batch, pixel_values=batch.pixel_values + noise)
    with torch.no_grad():
        a, b = hidden_states(policy.model, batch), hidden_states(policy.model, other)
    changed = ((a - b).abs().amax(-1) * batch.attention_mask).amax(-1) > 1e-4
    assert changed.tolist() == [p == 0 for p in ROWS]


def test_layout(policy, processor, prompts, make_rows):
    tails = make_rows(LENGTHS)
    batch = collate(prompts, ROWS, tails, model_config=policy.config, pad_id=processor.pad_id)
    assert batch.input_ids.shape[1] == int(batch.lengths.max())
    rows = response_rows(batch)
    flat = batch.input_ids.view(-1)
    for b, (p, tail) in enumerate(zip(ROWS, tails, strict=True)):
        ids, n = prompts[p].input_ids, int(batch.lengths[b])
        assert batch.input_ids[b].tolist() == [*ids, *tail] + [processor.pad_id] * (batch.input_ids.shape[1] - n)
        assert batch.attention_mask[b].sum() == n == len(ids) + len(tail)
        part = slice(int(rows.cu_seqlens[b]), int(rows.cu_seqlens[b + 1]))
        assert rows.target[part].tolist() == tail
        assert torch.equal(flat[rows.index[part] + 1], rows.target[part])
        if tail:
            assert int(rows.index[part][0]) == b * batch.input_ids.shape[1] + len(ids) - 1
            after = batch.position_ids[:, b, len(ids) : n]
            start = int(batch.position_ids[:, b, : len(ids)].max()) + 1
            assert torch.equal(after, torch.arange(start, start + len(tail)).expand(3, -1))
    assert rows.cu_seqlens.dtype == torch.int32 and rows.index.dtype == rows.target.dtype == torch.int64


def test_text_positions_count_image_tokens_and_change_the_result(policy, processor, prompts, make_rows):
    tails = make_rows([4])
    fill = {"model_config": policy.config, "pad_id": processor.pad_id}
    text = collate(prompts, [2], tails, positions="text", **fill)
    n = int(text.lengths[0])
    assert torch.equal(text.position_ids[:, 0, :n], torch.arange(n).expand(3, -1))
    with torch.no_grad():
        a = hidden_states(policy.model, text)
        b = hidden_states(policy.model, collate(prompts, [2], tails, **fill))
    assert (a - b).abs().max() > 1e-3


def test_moving_a_batch_moves_everything(batch):
    moved = batch.to("meta")
    for field in dataclasses.fields(moved):
        assert getattr(moved, field.name).device.type == "meta", field.name


@pytest.mark.parametrize(
    ("rows", "tails", "message"),
    [
        ([0, 1], [[1]], "one prompt index per continuation"),
        ([], [], "one prompt index per continuation"),
        ([3], [[1]], r"must lie in \[0, 3\)"),
        ([-1], [[1]], r"must lie in \[0, 3\)"),
    ],
)
def test_impossible_batches_are_refused(policy, processor, prompts, rows, tails, message):
    with pytest.raises(ValueError, match=message):
        collate(prompts, rows, tails, model_config=policy.config, pad_id=processor.pad_id)


def test_bad_prompts_and_continuations_are_named(policy, processor, prompts):
    def lay_out(prompt, tail=(1,), **kwargs):
        config = {"model_config": policy.config, "pad_id": processor.pad_id}
        return collate([prompts[1], prompt], [0, 1], [[1], tail], **config, **kwargs)

    with pytest.raises(ValueError, match="continuation 1 holds an image token"):
        lay_out(prompts[0], [5, processor.image_token_id])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        lay_out(dataclasses.replace(prompts[1], input_ids=()))
    with pytest.raises(ValueError, match="prompt 1: 4 image tokens but"):
        lay_out(dataclasses.replace(prompts[0], pixel_values=None, image_grid_thw=None))
    with pytest.raises(ValueError, match="prompt 1 has 768 values per patch but the model takes 1536"):
        lay_out(dataclasses.replace(prompts[0], pixel_values=prompts[0].pixel_values[:, :768]))
    with pytest.raises(ValueError, match="positions must be"):
        lay_out(prompts[0], positions="rope")


def test_linear_patch_embedding_equals_the_convolution(generator):
    config = Qwen3VLConfig(vision_config={"depth": 1, "hidden_size": 48, "num_heads": 4, "patch_size": 8}).vision_config
    config.deepstack_visual_indexes = []
    stock = Qwen3VLVisionModel._from_config(config, dtype=torch.float64)
    ours = copy.deepcopy(stock)
    holder = torch.nn.Module()
    holder.visual = ours
    use_linear_patch_embedding(holder)
    use_linear_patch_embedding(holder)
    assert isinstance(ours.patch_embed.proj, LinearPatchEmbedding)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.randn(7, 3 * 2 * 8 * 8, generator=generator, dtype=torch.float64)
    outputs = [model.patch_embed(x) for model in (stock, ours)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    seed = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    grads = [
        torch.autograd.grad((o * seed).sum(), list(m.patch_embed.parameters()))
        for o, m in zip(outputs, (stock, ours), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="kernel = stride"):
        ours.patch_embed.proj = torch.nn.Conv3d(3, 4, 2, stride=1)
        use_linear_patch_embedding(holder)
