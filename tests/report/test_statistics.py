from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from prism_fast.report.statistics import ENOUGH, Difference, accuracy_interval, paired_difference, sign_flip_p


def clustered(rng: np.random.Generator, clusters: int, per_cluster: int, spread: float) -> tuple[np.ndarray, list[int]]:
    """Answers whose chance of being right is 0.6 on average and differs between clusters."""
    chance = np.clip(0.6 + spread * rng.choice([-1.0, 1.0], size=clusters), 0.0, 1.0)
    correct = rng.random((clusters, per_cluster)) < chance[:, None]
    return correct.astype(float).ravel(), np.repeat(np.arange(clusters), per_cluster).tolist()


# Accuracies.


@pytest.mark.parametrize(("right", "n"), [(0, 8), (5, 8), (8, 8), (1, 2), (700, 1500)])
def test_single_items_have_the_exact_binomial_interval(right: int, n: int) -> None:
    interval = accuracy_interval([1] * right + [0] * (n - right), range(n))
    exact = stats.binomtest(right, n).proportion_ci(0.95, method="exact")
    assert interval == pytest.approx((right / n, exact.low, exact.high), abs=1e-9)


def test_none_right_is_not_certainly_none() -> None:
    assert accuracy_interval([0] * 8, range(8)) == pytest.approx((0.0, 0.0, 0.36942), abs=1e-5)
    # The items of an image may all share their fate, so 2 images say as much as 2 items.
    low, high = stats.binomtest(0, 2).proportion_ci(0.95, method="exact")
    assert accuracy_interval([0] * 8, [0] * 4 + [1] * 4) == pytest.approx((0.0, low, high))
    assert accuracy_interval([1] * 8, [0] * 4 + [1] * 4) == pytest.approx((1.0, 1 - high, 1.0))


@pytest.mark.parametrize("right", [(3, 2), (4, 1), (2, 2)])
def test_two_images_say_next_to_nothing_however_alike_they_are(right: tuple[int, int]) -> None:
    """5 of 8 in two images of 5 and 3 items, of which 3 and 2 are right: not [60, 66.7]."""
    sizes = (5, 3)
    values = [int(i < k) for k, size in zip(right, sizes, strict=True) for i in range(size)]
    interval = accuracy_interval(values, [0] * 5 + [1] * 3)
    assert interval.low < 0.05 and interval.high > 0.95


def test_effective_items_by_hand() -> None:
    """Four images of 3 items with 0, 1, 2 and 3 right: n = 12, share 0.5, design effect 20/9 * 11/12 * ..."""
    values = [0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    interval = accuracy_interval(values, [i // 3 for i in range(12)])
    variance = 4 / 3 * sum((k - 1.5) ** 2 for k in range(4)) / 12**2
    effective = 12 * (0.25 / 11) / variance * (stats.t.ppf(0.975, 11) / stats.t.ppf(0.975, 3)) ** 2
    low = stats.beta.ppf(0.025, effective / 2, effective / 2 + 1)
    assert interval == pytest.approx((0.5, low, 1 - low), abs=1e-9) and effective < 4


def test_copies_within_a_cluster_add_nothing() -> None:
    correct = (np.random.default_rng(7).random(120) < 0.6).astype(int)
    once = accuracy_interval(correct, [f"image-{i:03d}" for i in range(120)])
    fivefold = accuracy_interval(np.repeat(correct, 5), [f"image-{i // 5:03d}" for i in range(600)])
    assert fivefold == pytest.approx(once, abs=0.003)


@pytest.mark.parametrize(("clusters", "spread"), [(3, 0.3), (8, 0.0), (8, 0.4), (60, 0.3)])
def test_interval_covers_the_truth(clusters: int, spread: float) -> None:
    rng = np.random.default_rng(clusters)
    hits, trials = 0, 400
    for _ in range(trials):
        low, high = accuracy_interval(*clustered(rng, clusters, 6, spread))[1:]
        hits += low <= 0.6 <= high
    assert hits >= 0.93 * trials
    if clusters == 60:  # and with many images it is no wider than it must be
        assert hits <= 0.985 * trials
        correct, names = clustered(rng, 60, 6, spread)
        assert np.diff(accuracy_interval(correct, range(correct.size))[1:]) < np.diff(
            accuracy_interval(correct, names)[1:]
        )


# Differences.


def test_two_images_with_one_item_better_in_each_are_no_evidence() -> None:
    """+25 points with p = 0.5, as the sign test has it, and without an interval."""
    a, b, names = [1, 1, 0, 0] * 2, [1, 0, 0, 0] * 2, [0] * 4 + [1] * 4
    assert paired_difference(a, b, names, seed=0) == Difference(0.25, 0.5, None, 2)


@pytest.mark.parametrize(("gains", "losses"), [(2, 0), (6, 0), (5, 1), (9, 3), (1, 1), (0, 7), (40, 22)])
def test_p_of_single_items_is_that_of_the_sign_test(gains: int, losses: int) -> None:
    values = np.array([1] * gains + [-1] * losses + [0] * 30)
    assert sign_flip_p(values) == pytest.approx(stats.binomtest(gains, gains + losses).pvalue, abs=1e-12)


def test_p_of_clusters_is_that_of_all_sign_flips() -> None:
    values = np.array([3, -1, 2, 0, 4, -2, 1, 1, -1])
    every = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    assert sign_flip_p(values) == pytest.approx(every, abs=1e-12)
    assert sign_flip_p(-values) == sign_flip_p(values) and sign_flip_p(np.zeros(4, dtype=int)) == 1.0


@pytest.mark.parametrize("clusters", [2, 6, 12, 60])
def test_p_is_small_no_more_often_than_it_says(clusters: int) -> None:
    """Two stages that are equally good, with images that both find hard or easy."""
    rng, trials, small = np.random.default_rng(clusters), 400, 0
    for _ in range(trials):
        chance = np.repeat(rng.random(clusters), 3)
        a, b = (rng.random(chance.size) < chance for _ in range(2))
        small += paired_difference(a, b, np.repeat(np.arange(clusters), 3), seed=0, resamples=100).p <= 0.1
    assert small <= 0.13 * trials
    if clusters >= 12:
        assert small >= 0.04 * trials  # and it is not blind


def test_p_finds_what_is_there() -> None:
    six = paired_difference([1] * 6, [0] * 6, range(6), seed=0)
    assert (six.p, six.direction, six.interval) == (2 / 64, 1, None)
    assert paired_difference([0] * 6, [1] * 6, range(6), seed=0).direction == -1
    assert paired_difference([1] * 5, [0] * 5, range(5), seed=0).direction == 0


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_bootstrap_covers_the_truth_where_enough_images_differ(share: float) -> None:
    """Images of 3 items; a gains 0.6 of the items that differ, b the others."""
    rng, covered, made = np.random.default_rng(3), 0, 0
    clusters = int((ENOUGH + 3) / (1 - (1 - share) ** 3))  # a little more than ENOUGH of them differ
    while made < 400:
        differ = rng.random((clusters, 3)) < share
        gain = differ & (rng.random((clusters, 3)) < 0.6)
        a, b = gain.ravel(), (differ & ~gain).ravel()
        interval = paired_difference(a, b, np.repeat(np.arange(clusters), 3), seed=made, resamples=400).interval
        if interval is None:
            continue
        made += 1
        covered += interval.low <= share * 0.2 <= interval.high
    assert 0.925 * made <= covered <= 0.98 * made


def test_interval_comes_with_enough_images_that_differ() -> None:
    for count in (ENOUGH - 1, ENOUGH):
        a = [1] * count + [0] * 200
        found = paired_difference(a, [0] * len(a), range(len(a)), seed=0)
        assert found.differing == count and (found.interval is None) == (count < ENOUGH)


def test_bootstrap_agrees_with_a_plain_loop_on_unequal_clusters() -> None:
    rng = np.random.default_rng(11)
    sizes = rng.integers(1, 9, size=60)
    a = [(rng.random(size) < rng.uniform(0.4, 0.9)).astype(float) for size in sizes]
    b = [(rng.random(size) < 0.5).astype(float) for size in sizes]
    differing = sum(x.sum() != y.sum() for x, y in zip(a, b, strict=True))
    means = []
    for _ in range(4000):
        drawn = rng.integers(60, size=60)
        means.append(np.concatenate([a[i] - b[i] for i in drawn]).mean())
    wider = stats.norm.cdf(-math.sqrt(differing / (differing - 1)) * stats.t.ppf(0.975, differing - 1))
    low, high = np.percentile(means, [100 * wider, 100 - 100 * wider])
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    found = paired_difference(np.concatenate(a), np.concatenate(b), names, seed=0, resamples=4000)
    assert found.mean == pytest.approx((np.concatenate(a) - np.concatenate(b)).mean(), abs=1e-12)
    assert found.interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_order_of_items_is_irrelevant_to_the_last_bit() -> None:
    rng = np.random.default_rng(2)
    a, names = clustered(rng, 40, 5, 0.2)
    b, _ = clustered(rng, 40, 5, 0.2)
    order = rng.permutation(a.size)
    shuffled = [names[i] for i in order]
    assert accuracy_interval(a[order], shuffled)[1:] == accuracy_interval(a, names)[1:]
    found = paired_difference(a[order], b[order], shuffled, seed=4)
    assert found == paired_difference(a, b, names, seed=4) and found.interval is not None
    assert found.interval != paired_difference(a, b, names, seed=5).interval


def test_pairing_removes_shared_variance() -> None:
    rng = np.random.default_rng(9)
    difficulty = rng.random(900)
    names = [i // 3 for i in range(900)]
    a = (difficulty + 0.05 * rng.standard_normal(900) < 0.70).astype(int)
    b = (difficulty + 0.05 * rng.standard_normal(900) < 0.65).astype(int)
    paired = paired_difference(a, b, names, seed=0)
    apart = math.hypot(*(high - low for _, low, high in (accuracy_interval(a, names), accuracy_interval(b, names))))
    assert paired.interval.high - paired.interval.low < 0.6 * apart
    assert paired.mean == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert paired.interval.low < paired.mean < paired.interval.high


def test_difference_changes_sign_with_its_arguments_and_p_does_not_change() -> None:
    rng = np.random.default_rng(13)
    a, b = (rng.random(300) < 0.60).astype(int), (rng.random(300) < 0.55).astype(int)
    names = [i // 2 for i in range(300)]
    forth, back = paired_difference(a, b, names, seed=8), paired_difference(b, a, names, seed=8)
    assert back.interval == pytest.approx((-forth.mean, -forth.interval.high, -forth.interval.low), abs=1e-12)
    assert back.p == forth.p and back.differing == forth.differing


def test_equal_answers_do_not_differ() -> None:
    assert paired_difference([1] * 50, [1] * 50, range(50), seed=0) == Difference(0.0, 1.0, None, 0)


def test_uids_must_be_the_same_items_in_the_same_order() -> None:
    names = ["x", "x", "y"]
    equal = paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "b", "c"]))
    assert equal.mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="item 1 is 'b' in a and 'c' in b"):
        paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "c", "b"]))
    with pytest.raises(ValueError, match="3 items but 3 and 2 uids"):
        paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "b"]))


@pytest.mark.parametrize(
    ("correct", "names", "message"),
    [
        ([], [], "at least one item"),
        ([[1, 0]], ["a"], "one-dimensional"),
        ([1, float("nan")], ["a", "b"], r"correct\[1\] must be 0 or 1, got nan"),
        ([1, 0.5], ["a", "b"], r"correct\[1\] must be 0 or 1, got 0.5"),
        ([1, 0], ["a"], "2 items but 1 cluster names"),
        ([1, 0], ["a", "a"], "at least two"),
    ],
)
def test_accuracy_refuses(correct: list, names: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_interval(correct, names)


def test_difference_refuses_unequal_lengths_and_too_few_sets() -> None:
    with pytest.raises(ValueError, match="a has 2 items and b has 3"):
        paired_difference([1, 0], [1, 0, 1], ["x", "y"], seed=0)
    with pytest.raises(ValueError, match="at least 100"):
        paired_difference([1, 0], [1, 0], ["x", "y"], seed=0, resamples=99)


def test_many_clusters_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, names = clustered(rng, 50, 2, 0.2)
    b, _ = clustered(rng, 50, 2, 0.2)
    whole = paired_difference(a, b, names, seed=6, resamples=500)
    monkeypatch.setattr("prism_fast.report.statistics._DRAWS_AT_ONCE", 170)
    assert paired_difference(a, b, names, seed=6, resamples=500) == whole and whole.interval is not None
