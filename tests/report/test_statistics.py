from __future__ import annotations

import math

import numpy as np
import pytest

from prism_fast.report.statistics import Interval, accuracy_interval, paired_difference


def clustered(rng: np.random.Generator, clusters: int, per_cluster: int, spread: float) -> tuple[np.ndarray, list[int]]:
    """Answers whose chance of being right is 0.6 on average and differs between clusters."""
    chance = np.clip(0.6 + spread * rng.choice([-1.0, 1.0], size=clusters), 0.0, 1.0)
    correct = rng.random((clusters, per_cluster)) < chance[:, None]
    return correct.astype(float).ravel(), np.repeat(np.arange(clusters), per_cluster).tolist()


def width(interval: tuple[float, ...]) -> float:
    return interval[2] - interval[1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_single_items_give_the_binomial_interval(share: float) -> None:
    n = 1500
    correct = (np.arange(n) < share * n).astype(int)
    interval = accuracy_interval(correct, list(range(n)), seed=3, resamples=4000)
    half = 1.959964 * math.sqrt(share * (1 - share) / n)
    assert interval.mean == pytest.approx(share, abs=1e-12)
    assert interval.low == pytest.approx(share - half, abs=0.08 * half)
    assert interval.high == pytest.approx(share + half, abs=0.08 * half)


def test_copies_within_a_cluster_add_nothing() -> None:
    rng = np.random.default_rng(7)
    correct = (rng.random(120) < 0.6).astype(int)
    once = accuracy_interval(correct, [f"image-{i:03d}" for i in range(120)], seed=1)
    fivefold = accuracy_interval(np.repeat(correct, 5), [f"image-{i // 5:03d}" for i in range(600)], seed=1)
    assert fivefold == pytest.approx(once, abs=1e-12)


def test_agrees_with_a_plain_loop_on_unequal_clusters() -> None:
    rng = np.random.default_rng(11)
    sizes = rng.integers(1, 9, size=60)
    members = [(rng.random(size) < rng.uniform(0.2, 0.9)).astype(float) for size in sizes]
    means = []
    for _ in range(4000):
        drawn = np.concatenate([members[i] for i in rng.integers(60, size=60)])
        means.append(drawn.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    interval = accuracy_interval(np.concatenate(members), names, seed=0, resamples=4000)
    assert interval.mean == pytest.approx(np.concatenate(members).mean(), abs=1e-12)
    assert interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_interval_covers_the_truth_and_items_alone_would_not() -> None:
    rng = np.random.default_rng(5)
    hits = ignoring = 0
    for trial in range(200):
        correct, names = clustered(rng, clusters=60, per_cluster=8, spread=0.3)
        by_cluster = accuracy_interval(correct, names, seed=trial, resamples=300)
        by_item = accuracy_interval(correct, list(range(correct.size)), seed=trial, resamples=300)
        hits += by_cluster.low <= 0.6 <= by_cluster.high
        ignoring += by_item.low <= 0.6 <= by_item.high
    assert 0.88 * 200 <= hits <= 0.99 * 200
    assert ignoring < 0.85 * 200


def test_order_of_items_is_irrelevant_to_the_last_bit() -> None:
    rng = np.random.default_rng(2)
    correct, names = clustered(rng, 40, 5, 0.2)
    values = correct * rng.random(correct.size)
    order = rng.permutation(correct.size)
    shuffled = [names[i] for i in order]
    assert accuracy_interval(values[order], shuffled, seed=4)[1:] == accuracy_interval(values, names, seed=4)[1:]
    other = accuracy_interval(values, names, seed=5)
    assert other[1:] != accuracy_interval(values, names, seed=4)[1:]


def test_pairing_removes_shared_variance() -> None:
    rng = np.random.default_rng(9)
    difficulty = rng.random(900)
    names = [i // 3 for i in range(900)]
    a = (difficulty + 0.05 * rng.standard_normal(900) < 0.70).astype(int)
    b = (difficulty + 0.05 * rng.standard_normal(900) < 0.65).astype(int)
    paired = paired_difference(a, b, names, seed=0)
    apart = math.hypot(width(accuracy_interval(a, names, seed=0)), width(accuracy_interval(b, names, seed=1)))
    assert width(paired) < 0.6 * apart
    assert paired.mean == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert paired.low < paired.mean < paired.high


def test_difference_changes_sign_with_its_arguments_and_p_does_not_change() -> None:
    rng = np.random.default_rng(13)
    a, b = (rng.random(300) < 0.60).astype(int), (rng.random(300) < 0.55).astype(int)
    names = [i // 2 for i in range(300)]
    forth, back = paired_difference(a, b, names, seed=8), paired_difference(b, a, names, seed=8)
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low), abs=1e-12)
    assert back.p == forth.p


def test_p_is_one_for_equal_answers_and_smallest_for_a_clear_gain() -> None:
    right = [1] * 50
    assert paired_difference(right, right, range(50), seed=0) == (0.0, 0.0, 0.0, 1.0)
    clear = paired_difference(right, [0] * 50, range(50), seed=0, resamples=999)
    assert clear.mean == clear.low == clear.high == 1.0
    assert clear.p == pytest.approx(2 / 1000)


def test_p_is_small_about_as_often_as_it_should_be() -> None:
    rng = np.random.default_rng(21)
    small = 0
    for trial in range(300):
        a, b = rng.random(200) < 0.6, rng.random(200) < 0.6
        result = paired_difference(
            a.astype(int), b.astype(int), [i // 2 for i in range(200)], seed=trial, resamples=300
        )
        small += result.p <= 0.1
        excludes_zero = result.low > 0 or result.high < 0
        assert excludes_zero <= (result.p < 0.08)  # interval and p never contradict each other
    assert 0.04 * 300 <= small <= 0.18 * 300


def test_uids_must_be_the_same_items_in_the_same_order() -> None:
    names = ["x", "x", "y"]
    equal = paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "b", "c"]))
    assert equal.mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="item 1 is 'b' in a and 'c' in b"):
        paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "c", "b"]))
    with pytest.raises(ValueError, match="3 items but 3 and 2 uids"):
        paired_difference([1, 0, 1], [0, 0, 1], names, seed=0, uids=(["a", "b", "c"], ["a", "b"]))


@pytest.mark.parametrize(
    ("correct", "names", "options", "message"),
    [
        ([], [], {}, "at least one item"),
        ([[1, 0]], ["a"], {}, "one-dimensional"),
        ([1, float("nan")], ["a", "b"], {}, r"correct\[1\] is not finite"),
        ([1, 0], ["a"], {}, "2 items but 1 cluster names"),
        ([1, 0], ["a", "a"], {}, "at least two"),
        ([1, 0], ["a", "b"], {"resamples": 99}, "at least 100"),
    ],
)
def test_refuses(correct: list, names: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_interval(correct, names, seed=0, **options)


def test_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="a has 2 items and b has 3"):
        paired_difference([1, 0], [1, 0, 1], ["x", "y"], seed=0)


def test_many_clusters_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    correct, names = clustered(np.random.default_rng(1), 50, 2, 0.2)
    whole = accuracy_interval(correct, names, seed=6, resamples=500)
    monkeypatch.setattr("prism_fast.report.statistics._DRAWS_AT_ONCE", 170)
    assert accuracy_interval(correct, names, seed=6, resamples=500) == whole
    assert isinstance(whole, Interval)
