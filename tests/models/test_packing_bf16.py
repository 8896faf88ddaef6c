"""Packed rows in bfloat16: no further from the exact result than the accuracy contract lets an unshared pass be.

Both start from the same bfloat16 weights and are compared with float64. Experts are those that the packed pass chose,
in all three: at a near-tie rounding decides between two, and what follows is another function, not an error. How often
that happens without replay is counted apart.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.packing import PackedRow, PromptGroup, pack, packed_outputs
from prism_fast.models.score_rows import states_at
from prism_fast.models.shared_prefix import use_shared_prefix
from tests.support.float64 import Float64Islands
from tests.support.packed import packed_hidden_states
from tests.support.replayed_experts import by_token, recorded, replayed

ULP = torch.finfo(torch.bfloat16).eps
LENGTHS = ((5, None, 9, 1), (4, 12, 3), (None, 2, 7, 7))


class Result(NamedTuple):
    """``values``: log-probs or scores; ``gradients`` by parameter."""

    values: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture
def groups(make_prompt, make_rows):
    prompts = [make_prompt(), make_prompt((128, 32)), make_prompt((64, 96), (160, 64), text="Compare them, please.")]
    found = []
    for prompt, lengths in zip(prompts, LENGTHS, strict=True):
        rows = iter(make_rows([n for n in lengths if n is not None]))
        found.append(PromptGroup(prompt, [None if n is None else next(rows) for n in lengths]))
    return found


def unshared(groups, row: PackedRow, model, processor):
    return collate(
        [group.prompt for group in groups],
        [g for g, _ in row.branches],
        [groups[g].branches[b] for g, b in row.branches],
        model_config=model.config,
        pad_id=processor.pad_id,
    )


def result(model, values: Tensor, upstream: Tensor) -> Result:
    model.zero_grad(set_to_none=True)
    (values * upstream.to(values)).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return Result(values.detach().double(), found)


def within_contract(draws: list[tuple[Result, Result, Result]]) -> None:
    """(packed, unshared, exact) of each draw. Values and each parameter's gradient, in the norm and in the maximum: at
    most twice the unshared pass's error and four units in the last place. Over all draws, where chance has less of a
    say, at most twice its error and nothing: of the values, and of the whole gradient."""
    totals = {"values": [0.0, 0.0, 0.0], "gradient": [0.0, 0.0, 0.0]}
    for ours, theirs, exact in draws:
        assert ours.gradients.keys() == theirs.gradients.keys() == exact.gradients.keys() and len(exact.gradients) > 30
        pairs = {"values": (ours.values, theirs.values, exact.values)}
        pairs |= {n: (ours.gradients[n], theirs.gradients[n], g) for n, g in exact.gradients.items()}
        for name, (a, b, true) in pairs.items():
            for kind, size in (("norm", Tensor.norm), ("maximum", lambda x: x.abs().max())):
                mine, other, magnitude = (float(size(x)) for x in (a - true, b - true, true))
                assert magnitude > 0 and mine <= 2 * other + 4 * ULP * magnitude, (name, kind, mine, other, magnitude)
            total = totals["values" if name == "values" else "gradient"]
            for i, x in enumerate((a - true, b - true, true)):
                total[i] += float(x.square().sum())
    for name, (mine, other, magnitude) in totals.items():
        print(
            f"{name}: relative error {(mine / magnitude) ** 0.5:.2e} packed, {(other / magnitude) ** 0.5:.2e} unshared"
        )
        assert 0 < mine <= 4 * other, name


def test_policy(policy, processor, groups, generator):
    model = copy.deepcopy(policy).to(torch.bfloat16)
    use_shared_prefix(model)
    (row,) = pack(groups, 10_000, model_config=model.config)
    batch = unshared(groups, row, model, processor)
    exact = copy.deepcopy(model).double()

    def logp(model, hidden: Tensor, rows) -> Tensor:
        return model.lm_head(hidden[rows.index], rows.target).logp

    def plain(model) -> Tensor:
        return logp(model, hidden_states(model.model, batch).flatten(0, 1), response_rows(batch))

    draws = []
    for _ in range(2):
        upstream = torch.randn(len(row.predict.target), generator=generator)
        ours = result(model, logp(model, packed_hidden_states(model.model, row), row.predict), upstream)
        theirs = result(model, plain(model), upstream)
        with Float64Islands():
            draws.append((ours, theirs, result(exact, plain(exact), upstream)))
    within_contract(draws)


def tokens_of(row: PackedRow, batch) -> Tensor:
    """[B·S] the packed place of every unshared token, -1 for padding."""
    source = torch.full(batch.input_ids.shape, -1)
    layout = row.layout
    starts = layout.cu_branch.tolist()
    segments = [s for s, prefix in enumerate(layout.branch_prefix.tolist()) if prefix >= 0]
    for b, segment in enumerate(segments):
        prefix = int(layout.branch_prefix[segment])
        n, length = int(batch.prompt_lengths[b]), int(batch.lengths[b])
        source[b, :n] = int(layout.prefix_start[prefix]) + torch.arange(n)
        source[b, n:length] = starts[segment] + torch.arange(length - n)
    same = source.flatten() >= 0
    assert torch.equal(row.input_ids[0, source.flatten()[same]], batch.input_ids.flatten()[same])
    return source.flatten()


@pytest.mark.parametrize("noise_std", [0.01, 0.3], ids=["alike", "apart"])
def test_discriminator(policy, processor, groups, generator, noise_std):
    """Experts that are nearly copies of each other, as upcycling makes them, and experts that are not."""
    draws, flips, tokens = [], 0, 0
    for seed in range(4):
        model = build_discriminator(policy, seed=seed, head_std=0.5, noise_std=noise_std).to(torch.bfloat16)
        use_shared_prefix(model.backbone)
        (row,) = pack(groups, 10_000, model_config=model.backbone.config)
        batch = unshared(groups, row, model.backbone, processor)
        upstream = torch.randn(len(row.branches), generator=generator)
        with recorded() as choices:
            hidden, _ = states_at(model.backbone, row.span_end, partial(packed_outputs, model.backbone, row))
        ours = result(model, model.score_hidden(hidden), upstream)
        source = tokens_of(row, batch)
        forced = [*by_token(choices[:-1], source), choices[-1]]  # the last layer routes the scored rows, in their order
        with recorded() as free, torch.no_grad():
            model(batch)
        with replayed(forced):
            score = model(batch).score
        theirs = result(model, score, upstream)
        exact = copy.deepcopy(model).double()
        with Float64Islands(), replayed(forced):
            draws.append((ours, theirs, result(exact, exact(batch).score, upstream)))
        for layer, (wanted, found) in enumerate(zip(forced, free, strict=True)):
            real = source >= 0 if layer < len(forced) - 1 else torch.ones(len(found), dtype=torch.bool)
            flips += int((wanted.sort(-1).values != found.sort(-1).values).any(-1)[real].sum())
            tokens += int(real.sum())
    within_contract(draws)
    print(f"without replay {flips} of {tokens} choices are others")
    assert tokens > 1000 and flips <= 0.02 * tokens
