"""How groups are laid out in rows, and what a row promises: isolation, one encoding per image, checkpointing."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from prism_fast.models.discriminator import build_discriminator, load_balance_loss
from prism_fast.models.forward import collate, language_outputs
from prism_fast.models.packing import PromptGroup, SharedImages, pack, packed_outputs
from prism_fast.models.shared_prefix import NAME, use_shared_prefix
from tests.support.float64 import Float64Islands
from tests.support.packed import packed_hidden_states


@pytest.fixture(scope="module")
def packed_policy(policy):
    model = copy.deepcopy(policy)
    use_shared_prefix(model)
    return model


def test_row_layout(policy, make_prompt, make_rows):
    prompt, other, tails = make_prompt((64, 96)), make_prompt(), make_rows([3, 1, 4])
    groups = [PromptGroup(prompt, [tails[0], None, tails[1], []]), PromptGroup(other, [tails[2]])]
    (row,) = pack(groups, 1000, model_config=policy.config)
    p, q = len(prompt.input_ids), len(other.input_ids)
    ids = [*prompt.input_ids, *tails[0], *tails[1], *other.input_ids, *tails[2]]
    assert row.input_ids.tolist() == [ids] and row.tokens == len(ids) == p + 4 + q + 4
    assert row.branches == ((0, 0), (0, 2), (0, 3), (1, 0))
    # The other prompt has one branch: nothing to share, one segment.
    assert row.layout.cu_branch.tolist() == [0, p, p + 3, p + 4, p + 4, p + 8 + q]
    assert row.layout.branch_prefix.tolist() == [-1, 0, 0, 0, -1]
    assert (row.layout.prefix_start.tolist(), row.layout.prefix_len.tolist()) == ([0], [p])
    assert row.layout[4:] == (p, max(p, q + 4), 4, None)
    assert all(x.dtype == torch.int32 for x in row.layout[:4])
    start = p + 4 + q
    assert row.predict.index.tolist() == [p - 1, p, p + 1, p - 1, start - 1, start, start + 1, start + 2]
    assert row.predict.target.tolist() == [*tails[0], *tails[1], *tails[2]]
    assert row.predict.cu_seqlens.tolist() == [0, 3, 4, 4, 8]
    assert row.span_end.tolist() == [p + 2, p + 3, p - 1, start + 3]
    assert row.branch.tolist() == [-1] * p + [0] * 3 + [1] + [-1] * q + [3] * 4
    assert row.copies.tolist() == [3] * p + [1] * 4 + [1] * q + [1] * 4
    after = int(row.position_ids[:, 0, :p].max()) + 1
    assert row.position_ids[:, 0, p : p + 4].tolist() == [[after, after + 1, after + 2, after]] * 3
    assert row.image_slot.tolist() == [i for i, t in enumerate(ids) if t == policy.config.image_token_id]
    assert row.image_feature.tolist() == list(range(6)) and row.prompts == (prompt,)


def test_positions_and_rows_equal_those_of_the_unshared_layout(policy, processor, make_prompt, make_rows):
    groups = [PromptGroup(make_prompt((96, 64)), make_rows([5, 2]))]
    for positions in ("mrope", "text"):
        (row,) = pack(groups, 1000, model_config=policy.config, positions=positions)
        batch = collate(
            [groups[0].prompt],
            [0, 0],
            groups[0].branches,
            model_config=policy.config,
            pad_id=processor.pad_id,
            positions=positions,
        )
        p = len(groups[0].prompt.input_ids)
        assert torch.equal(row.position_ids[:, 0, : p + 5], batch.position_ids[:, 0])
        assert torch.equal(row.position_ids[:, 0, p + 5 :], batch.position_ids[:, 1, p : p + 2])


@pytest.mark.parametrize("budget", [1, 60, 90, 150, 400, 10_000])
def test_every_branch_stands_once_within_the_budget(policy, make_prompt, make_rows, rng, budget):
    groups = [
        PromptGroup(
            make_prompt(), [None if n == 0 else row for n, row in zip(lengths, make_rows(lengths), strict=True)]
        )
        for lengths in (rng.integers(0, 30, 6).tolist() for _ in range(7))
    ]
    rows = pack(groups, budget, model_config=policy.config)
    placed = Counter(branch for row in rows for branch in row.branches)
    assert placed == Counter((g, b) for g, group in enumerate(groups) for b, x in enumerate(group.branches) if x)
    for row in rows:
        assert row.tokens <= budget or len(row.branches) == 1
    smallest = len(groups[0].prompt.input_ids) + 30
    used = sum(row.tokens for row in rows)
    if budget >= 10_000:
        assert len(rows) == 1
    if budget > 2 * smallest:  # no two rows could have been one
        assert all(a.tokens + b.tokens > budget for i, a in enumerate(rows) for b in rows[:i]), used
    again = pack(groups, budget, model_config=policy.config)
    assert [r.branches for r in again] == [r.branches for r in rows]
    # The parts of a group that was cut follow each other, so that its image need not be kept longer.
    at = [{g for g, _ in row.branches} for row in rows]
    for g in range(len(groups)):
        places = [i for i, members in enumerate(at) if g in members]
        assert not places or places == list(range(places[0], places[-1] + 1))


def test_one_branch_leaves_the_others_bits_alone(packed_policy, make_prompt, make_rows):
    groups = [PromptGroup(make_prompt((128, 32)), make_rows([9, 7, 8, 1])), PromptGroup(make_prompt(), make_rows([5]))]
    (row,) = pack(groups, 1000, model_config=packed_policy.config)
    other = dataclasses.replace(row, input_ids=row.input_ids.clone())
    begin, end = row.layout.cu_branch[2:4].tolist()  # the second branch
    other.input_ids[0, begin:end] = (other.input_ids[0, begin:end] + 77) % 256
    with torch.no_grad():
        a, b = (packed_hidden_states(packed_policy.model, x) for x in (row, other))
    assert torch.equal(a[:begin], b[:begin]) and torch.equal(a[end:], b[end:])
    assert (a[begin:end] != b[begin:end]).any(-1).all()


def test_in_the_discriminator_within_rounding(policy, make_prompt, make_rows):
    backbone = build_discriminator(policy, seed=2).backbone.double()
    use_shared_prefix(backbone)
    groups = [PromptGroup(make_prompt((128, 32)), make_rows([9, 7, 8, 1]))]
    (row,) = pack(groups, 1000, model_config=policy.config)
    other = dataclasses.replace(row, input_ids=row.input_ids.clone())
    begin, end = row.layout.cu_branch[2:4].tolist()
    other.input_ids[0, begin:end] = (other.input_ids[0, begin:end] + 77) % 256
    with torch.no_grad(), Float64Islands():
        a, b = (packed_hidden_states(backbone, x) for x in (row, other))
    assert (a - b)[:begin].abs().max() <= 1e-12 and (a - b)[end:].abs().max() <= 1e-12
    assert (a[begin:end] - b[begin:end]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("budget", [1000, 45])
def test_an_image_is_encoded_once_however_a_group_is_cut(packed_policy, make_prompt, make_rows, budget):
    groups = [
        PromptGroup(make_prompt((128, 32)), make_rows([9, 7, 8])),
        PromptGroup(make_prompt((32, 32)), make_rows([5])),
    ]
    rows = pack(groups, budget, model_config=packed_policy.config)
    assert len(rows) == (1 if budget == 1000 else 4)
    patches = []
    handle = packed_policy.model.visual.register_forward_hook(lambda _m, args, _o: patches.append(len(args[0])))
    images = SharedImages(rows)
    backward = []
    for row in rows:
        hidden = packed_hidden_states(packed_policy.model, row, images)
        hidden.sum().backward()
        images.finish(row, lambda loss: (backward.append(loss.shape), loss.backward()))
    handle.remove()
    assert sum(patches) == 16 + 4
    assert backward == ([] if budget == 1000 else [()])  # one group was cut
    packed_policy.zero_grad(set_to_none=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(packed_policy, make_prompt, make_rows, generator, reentrant):
    groups = [PromptGroup(make_prompt((128, 32)), make_rows([4, 7, 1])), PromptGroup(make_prompt(), make_rows([5]))]
    (row,) = pack(groups, 1000, model_config=packed_policy.config)
    upstream = torch.randn(row.tokens, packed_policy.config.text_config.hidden_size, generator=generator)

    def run(model):
        out = packed_hidden_states(model.model, row)
        (out * upstream).sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = copy.deepcopy(packed_policy).train(), copy.deepcopy(packed_policy).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    a, b = run(plain), run(checkpointed)
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()
    assert all(torch.equal(g, b[1][name]) for name, g in a[1].items())


def test_another_attention_is_refused_and_rows_without_layout_are_ordinary(
    policy, packed_policy, processor, make_prompt, make_rows
):
    groups = [PromptGroup(make_prompt((128, 32)), make_rows([4, 3]))]
    (row,) = pack(groups, 1000, model_config=policy.config)
    with pytest.raises(ValueError, match=f"needs attention '{NAME}', this model computes 'sdpa'"):
        packed_hidden_states(policy.model, row)
    batch = collate([groups[0].prompt], [0, 0], groups[0].branches, model_config=policy.config, pad_id=processor.pad_id)
    with torch.no_grad():
        a, b = (language_outputs(m.model, batch).last_hidden_state for m in (policy, packed_policy))
        masked = [
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
            for m in (policy, packed_policy)
        ]
        prompt = torch.tensor([groups[0].prompt.input_ids])[:, -5:]
        texts = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (policy, packed_policy)]
    assert torch.equal(a, b) and torch.equal(*masked) and torch.equal(*texts)
    assert NAME not in packed_policy.config.to_json_string(use_diff=False)
    two = dataclasses.replace(
        row, input_ids=row.input_ids.expand(2, -1), position_ids=row.position_ids.expand(3, 2, -1), prompts=()
    )
    with pytest.raises(NotImplementedError, match="got 2 row"):
        packed_hidden_states(packed_policy.model, two)


def test_copies_give_the_load_balance_of_the_unshared_rows(policy, processor, make_prompt, make_rows):
    backbone = build_discriminator(policy, seed=2).backbone
    use_shared_prefix(backbone)
    groups = [PromptGroup(make_prompt((128, 32)), make_rows([4, 3, 6])), PromptGroup(make_prompt(), make_rows([8]))]
    (row,) = pack(groups, 1000, model_config=policy.config)
    batch = collate(
        [g.prompt for g in groups],
        [0, 0, 0, 1],
        [x for g in groups for x in g.branches],
        model_config=policy.config,
        pad_id=processor.pad_id,
    )
    shared = packed_outputs(backbone, row, output_router_logits=True).router_logits
    repeated = language_outputs(backbone, batch, output_router_logits=True).router_logits
    found, wanted = load_balance_loss(shared, 4, 2, row.copies), load_balance_loss(repeated, 4, 2, batch.attention_mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert float((load_balance_loss(shared, 4, 2) - wanted).detach().abs()) > 1e-4


def test_moving_a_row_moves_everything_but_pixels(policy, make_prompt, make_rows):
    (row,) = pack([PromptGroup(make_prompt((32, 32)), make_rows([2]))], 1000, model_config=policy.config)
    moved = row.to("meta")
    tensors = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    tensors = [*tensors, *moved.layout, *moved.predict]
    found = [x.device.type for x in tensors if isinstance(x, torch.Tensor)]
    assert len(found) == 7 + 4 + 3 and set(found) == {"meta"}


def test_refusals(policy, processor, make_prompt, make_rows):
    prompt, tails = make_prompt((32, 32)), make_rows([2])
    fill = {"model_config": policy.config}
    with pytest.raises(ValueError, match="budget must be 1 or more, got 0"):
        pack([PromptGroup(prompt, tails)], 0, **fill)
    with pytest.raises(ValueError, match="positions must be"):
        pack([PromptGroup(prompt, tails)], 10, positions="rope", **fill)
    with pytest.raises(ValueError, match="continuation 1 holds an image token"):
        pack([PromptGroup(prompt, [tails[0], [5, processor.image_token_id]])], 100, **fill)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pack([PromptGroup(prompt, tails), PromptGroup(dataclasses.replace(prompt, input_ids=()), tails)], 100, **fill)
    assert pack([], 10, **fill) == [] and pack([PromptGroup(prompt, [None])], 10, **fill) == []
