"""Which groups carry a gradient, and how many to generate so that enough of them do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_fast.algorithms.advantages import outcome_advantage
from prism_fast.algorithms.dynamic_sampling import UsefulShare, useful_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.9, 0.1, 0.2, 1 / 3, 0.8 + 0.2, -0.7, 0.0])
@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_equal_rewards_are_not_useful_whatever_their_value(value, n, dtype):
    reward, group = torch.full((2 * n,), value, dtype=dtype), torch.arange(2).repeat_interleave(n)
    reward[-1] = torch.nextafter(reward[-1], reward[-1] + 1)  # one group has a neighbour of the value
    assert useful_groups(reward, group, 2).tolist() == [False, True]
    assert outcome_advantage(reward, group)[:n].abs().max() == 0


def test_the_published_deviation_rule_keeps_some_groups_of_equal_rewards():
    """Published: the deviation is above 0. In floating point the deviation of equal numbers can be above 0."""
    kept = [n for n in range(2, 40) if np.std(np.full(n, 0.9)) > 0]
    assert kept, "numpy computes the mean of equal numbers exactly here: the test has lost its example"
    for n in kept:
        assert not useful_groups(torch.full((n,), 0.9), torch.zeros(n, dtype=torch.int64), 1).any()


def test_groups_in_any_order_lone_ones_and_empty_ones(generator):
    group = torch.tensor([2, 0, 2, 4, 0, 2])
    reward = torch.tensor([0.9, 0.2, 0.9, 0.5, 1.0, 0.9])
    assert useful_groups(reward, group, 6).tolist() == [True, False, False, False, False, False]
    order = torch.randperm(6, generator=generator)
    assert torch.equal(useful_groups(reward[order], group[order], 6), useful_groups(reward, group, 6))
    assert useful_groups(torch.empty(0), torch.empty(0, dtype=torch.int64), 0).tolist() == []


def test_useful_groups_are_those_with_an_advantage(generator):
    reward = torch.randint(0, 3, (400,), generator=generator) / 10
    group = torch.randint(0, 150, (400,), generator=generator)
    carries = torch.zeros(150).index_add(0, group, outcome_advantage(reward, group).abs()) > 0
    assert torch.equal(useful_groups(reward, group, 150), carries) and 0 < carries.sum() < 150


@pytest.mark.parametrize("true_share", [0.15, 0.4, 0.8])
@pytest.mark.parametrize("missing", [4, 32])
def test_one_round_usually_suffices_and_wastes_little(true_share, missing):
    dice = np.random.default_rng(round(1000 * true_share) + missing)
    share, enough, asked = UsefulShare(), [], []
    for step in range(400):
        count = share.to_generate(missing)
        found = int(dice.binomial(count, true_share))
        share.observe(count, found)
        if step >= 20:  # it has learnt the share by then
            enough.append(found >= missing)
            asked.append(count)
    assert 0.7 < np.mean(enough) < 0.98
    needed = missing / true_share
    assert needed < np.mean(asked) < needed + 3 * np.sqrt(needed / true_share)


def test_the_share_follows_a_change():
    share = UsefulShare()
    for _ in range(30):
        share.observe(50, 45)
    assert share.share == pytest.approx(0.9, abs=0.01)
    for _ in range(10):
        share.observe(50, 5)
    assert share.share == pytest.approx(0.1, abs=0.1)


@pytest.mark.parametrize("useful", [0, 100])
def test_extreme_shares_ask_for_finite_numbers(useful):
    share = UsefulShare()
    for _ in range(50):
        share.observe(100, useful)
    assert 0 < share.share < 1
    assert share.to_generate(8) >= 8 and share.to_generate(0) == 0


def test_the_state_goes_on_to_the_bit_and_nonsense_is_refused():
    first, second = UsefulShare(), UsefulShare()
    for useful in (3, 1, 7):
        first.observe(9, useful)
    second.load_state_dict(first.state_dict())
    first.observe(9, 2), second.observe(9, 2)
    assert first.share == second.share and first.to_generate(32) == second.to_generate(32)
    with pytest.raises(ValueError, match="useful=5"):
        first.observe(4, 5)
