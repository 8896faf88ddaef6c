"""Packed rows give what the unshared forward gives: logits, scores, losses and every parameter's gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from prism_fast import ops
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.packing import PromptGroup, SharedImages, pack
from prism_fast.models.shared_prefix import use_shared_prefix
from tests.support.float64 import Float64Islands
from tests.support.packed import packed_hidden_states

# One prompt without image, one with one, one with two of other sizes; ragged branches, one of a single token, some that
# are not computed, and a group with none at all. Demonstrations: one branch each, so that no segment sees another one.
LENGTHS = {
    "groups": ((5, None, 9, 1), (4, 12, 3), (None, 2, 7, 7, 1), (None, None)),
    "demonstrations": ((6,), (None, 1), (9,), (None, None)),
    "both": ((5, 2), (7,), (None, 8, 3), (1,)),
}
CUTS = {"one row": 10_000, "several rows": 160, "sub-groups": 75, "one branch each": 1}


@pytest.fixture(params=LENGTHS)
def groups(request, make_prompt, make_rows):
    prompts = [
        make_prompt(),
        make_prompt((128, 32)),
        make_prompt((64, 96), (160, 64), text="Compare them, please."),
        make_prompt((32, 32), text="Nobody answers."),
    ]
    found = []
    for prompt, lengths in zip(prompts, LENGTHS[request.param], strict=True):
        rows = iter(make_rows([n for n in lengths if n is not None]))
        found.append(PromptGroup(prompt, [None if n is None else next(rows) for n in lengths]))
    return found


def laid_out(groups, rows):
    """(group, branch) in the order of the packed rows."""
    return [branch for row in rows for branch in row.branches]


def unshared(groups, order, model, processor):
    return collate(
        [group.prompt for group in groups],
        [g for g, _ in order],
        [groups[g].branches[b] for g, b in order],
        model_config=model.config,
        pad_id=processor.pad_id,
    )


def gradients(model, loss):
    """By parameter; loss may be a list of losses to send backward one after the other."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(found, wanted, tolerance):
    """The whole gradient within the tolerance. In float32 single parameters' are sums with much cancellation (routers):
    ten times the tolerance for each; float64 has the proof."""
    assert found.keys() == wanted.keys() and found
    flat = [torch.cat([gradient.flatten() for gradient in part.values()]) for part in (found, wanted)]
    assert (flat[0] - flat[1]).norm() <= tolerance * flat[1].norm()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).norm() <= 10 * tolerance * gradient.norm(), name


def precision(kind):
    """(context, dtype, tolerance); float32 runs the modules as they are."""
    return (Float64Islands(), torch.float64, 1e-9) if kind == "float64" else (nullcontext(), torch.float32, 2e-6)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_policy_loss_and_every_gradient_equal_the_unshared_ones(policy, processor, groups, generator, cut, kind):
    islands, dtype, tolerance = precision(kind)
    model = copy.deepcopy(policy).to(dtype)
    use_shared_prefix(model)
    rows = pack(groups, CUTS[cut], model_config=model.config)
    order = laid_out(groups, rows)
    advantage = torch.randn(len(order), generator=generator, dtype=dtype)
    tokens = sum(len(groups[g].branches[b]) for g, b in order)

    def loss_of(hidden, rows, advantage):
        logp = ops.linear_logprob(hidden, model.lm_head.weight, rows.target).logp
        options = {"denominator": torch.tensor(float(tokens)), "loss": "dapo"}
        return ops.policy_loss(logp, advantage, rows.cu_seqlens, **options)[0], logp

    batch = unshared(groups, order, model, processor)
    wanted = response_rows(batch)
    with islands:
        loss, logp = loss_of(hidden_states(model.model, batch).flatten(0, 1)[wanted.index], wanted, advantage)
        want = gradients(model, loss)

        model.zero_grad(set_to_none=True)
        images, done, found, total = SharedImages(rows), 0, [], 0.0
        for row in rows:
            hidden = packed_hidden_states(model.model, row, images)[row.predict.index]
            part, packed = loss_of(hidden, row.predict, advantage[done : done + len(row.branches)])
            part.backward()
            images.finish(row, lambda surrogate: surrogate.backward())
            done, total = done + len(row.branches), total + float(part.detach())
            found.append(packed)
    assert done == sum(branch is not None for group in groups for branch in group.branches)
    torch.testing.assert_close(torch.cat(found), logp, rtol=tolerance, atol=tolerance)
    assert total == pytest.approx(float(loss.detach()), rel=tolerance, abs=tolerance)
    compare({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, tolerance)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_discriminator_scores_losses_and_gradients_equal_the_unshared_ones(
    policy, processor, groups, generator, cut, kind
):
    islands, dtype, tolerance = precision(kind)
    model = build_discriminator(policy, seed=5, head_std=0.5).to(dtype)
    use_shared_prefix(model.backbone)
    rows = pack(groups, CUTS[cut], model_config=model.backbone.config)
    order = laid_out(groups, rows)
    upstream = torch.randn(len(order), generator=generator, dtype=dtype)
    batch = unshared(groups, order, model.backbone, processor)
    with islands:
        out = model(batch)
        want = gradients(model, (out.score * upstream).sum())
        model.zero_grad(set_to_none=True)
        images, done, found = SharedImages(rows), 0, []
        for row in rows:
            hidden = packed_hidden_states(model.backbone, row, images)
            score = model.score_hidden(hidden[row.span_end])
            (score * upstream[done : done + len(row.branches)]).sum().backward()
            images.finish(row, lambda surrogate: surrogate.backward())
            done += len(row.branches)
            found.append(score.detach())
    # Scores are sums with cancellation, too, of the order of 1.
    torch.testing.assert_close(torch.cat(found), out.score.detach(), rtol=tolerance, atol=4 * tolerance)
    compare({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, tolerance)
