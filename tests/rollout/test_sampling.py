"""Random numbers of a response and the draw from a distribution."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import TopKLogitsWarper, TopPLogitsWarper

from prism_fast.rollout.sampling import draw, response_key, truncated, uniform

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator, in Python's integers."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_the_published_vector():
    """Of SplitMix64 with seed 1234567, as many implementations test it."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = torch.tensor([1234567])
    for t, z in enumerate(splitmix64(1234567, 3)):
        assert uniform(keys, t).tolist() == [(z >> 11) * 2.0**-53]


def test_a_key_is_a_signed_integer_of_seed_and_number():
    for seed in (0, 1, 2**63 + 1, MASK):
        (start,) = splitmix64(seed, 1)
        wanted = splitmix64(start, 3)
        assert [response_key(seed, k) % 2**64 for k in range(3)] == wanted
        assert all(-(2**63) <= response_key(seed, k) < 2**63 for k in range(9))
    keys = {response_key(seed, k) for seed in range(200) for k in range(200)}
    assert len(keys) == 40_000
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="below 2"):
            response_key(seed, 0)


def test_numbers_are_uniform_and_those_of_neighbours_independent():
    keys = torch.tensor([response_key(seed, k) for seed in range(100) for k in range(20)])
    table = torch.stack([uniform(keys, t) for t in range(30)], dim=1)  # [2000, 30]
    assert ((table >= 0) & (table < 1)).all()
    assert kstest(table.flatten().numpy(), "uniform").pvalue > 1e-3
    z = (table - 0.5) * 12**0.5
    for other in (z.roll(1, 0), z.roll(20, 0), z.roll(1, 1)):  # next response, next seed, next position
        assert abs(float((z * other).mean())) < 4 / z.numel() ** 0.5


def test_the_numbers_of_a_row_do_not_depend_on_the_others():
    keys = torch.tensor([response_key(5, k) for k in range(9)])
    whole = uniform(keys, 4)
    for k in range(9):
        assert uniform(keys[k : k + 1], 4).item() == whole[k].item()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_draws_follow_the_softmax(generator, temperature):
    V, B = 23, 40_000
    scores = 2 * torch.randn(V, generator=generator)
    scores[[4, 9]] = -torch.inf
    probs = torch.softmax(scores / temperature, dim=-1)
    keys = torch.tensor([response_key(seed, k) for seed in range(B // 16) for k in range(16)])
    found = torch.bincount(draw(probs.expand(B, V), uniform(keys, 2)), minlength=V)
    assert found[4] == found[9] == 0
    expected = probs.double() * B
    often = expected > 5
    rest = expected[~often].sum()
    counts = torch.cat([found[often], found[~often].sum()[None]])
    wanted = torch.cat([expected[often], rest[None]])
    kept = wanted > 0
    assert chisquare(counts[kept].numpy(), (wanted[kept] * B / wanted.sum()).numpy()).pvalue > 1e-3


def test_draws_invert_the_cumulated_distribution():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(7, 6)
    at = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert draw(probs, at).tolist() == [1, 1, 3, 3, 4, 4, 3]


def test_a_token_of_probability_0_is_never_drawn_however_large_the_vocabulary(generator):
    V = 150_000
    probs = torch.softmax(torch.randn(4, V, generator=generator), dim=-1)
    probs[:, ::2] = 0
    at = torch.tensor([0.0, 1 - 2.0**-53, 0.5, 0.123], dtype=torch.float64)
    found = draw(probs, at)
    assert (found % 2 == 1).all() and found[0] == 1 and found[1] == V - 1


def test_rows_with_nan_give_a_token():
    probs = torch.tensor([[torch.nan, 0.5, 0.5], [0.2, 0.3, 0.5]])
    found = draw(probs, torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert 0 <= found[0] < 3 and found[1] == 2


@pytest.mark.gpu
def test_cuda_draws_what_the_cpu_draws(generator):
    keys = torch.tensor([response_key(seed, k) for seed in range(64) for k in range(16)])
    probs = torch.softmax(2 * torch.randn(1024, 5000, generator=generator), dim=-1)
    for t in (0, 1, 4095):
        numbers = uniform(keys, t)
        assert uniform(keys.cuda(), t).cpu().equal(numbers)
        assert draw(probs.cuda(), numbers.cuda()).cpu().equal(draw(probs, numbers))


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (0, 0.05), (12, 0.9), (1, 0.5), (99, 0.999)])
def test_the_tokens_that_stay_are_those_of_transformers(generator, top_k, top_p):
    scores = 2 * torch.randn(40, 64, generator=generator)
    expected = scores
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = truncated(scores, top_k, top_p)
    assert torch.equal(found, expected)
    assert 0 < found.isfinite().sum() < scores.numel() or top_k == 99


def test_equal_scores_at_the_border():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    assert truncated(scores, 2, 1.0).isfinite().tolist() == [[True, True, True, True]]
    assert truncated(torch.zeros(1, 4), 0, 0.5).isfinite().tolist() == [[True, True, False, False]]
