from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prism_fast.data.order import MixedOrder, SampleOrder, order_of
from prism_fast.data.problems import Place
from prism_fast.data.samples import Row, Samples


@pytest.mark.parametrize(("size", "step"), [(1, 3), (7, 7), (10, 3), (5, 12)])
def test_each_epoch_is_a_permutation(size, step):
    order = SampleOrder(size, seed=5)
    drawn: list[int] = []
    while len(drawn) < 6 * size:
        drawn += order.next_indices(step)
    for epoch in range(6):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ_and_steps_do_not_matter():
    whole = SampleOrder(50, seed=1).next_indices(150)
    assert whole[:50] != whole[50:100] != whole[100:]
    assert whole != SampleOrder(50, seed=2).next_indices(150)
    assert whole[:50] != list(range(50))
    rng = np.random.default_rng(0)
    order, pieces = SampleOrder(50, seed=1), []
    while len(pieces) < 150:
        pieces += order.next_indices(int(min(rng.integers(0, 9), 150 - len(pieces))))
    assert pieces == whole


@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11, 25])
def test_resume_continues_exactly(taken):
    order = SampleOrder(10, seed=3)
    order.next_indices(taken)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = SampleOrder(10, seed=3)
    resumed.next_indices(4)
    resumed.load_state_dict(state)
    assert resumed.next_indices(33) == order.next_indices(33)


def test_unshuffled_is_file_order():
    assert SampleOrder(3, seed=0, shuffle=False).next_indices(7) == [0, 1, 2, 0, 1, 2, 0]


def test_refusals():
    with pytest.raises(ValueError, match="size = 0"):
        SampleOrder(0, seed=0)
    with pytest.raises(ValueError, match="seed = -1"):
        SampleOrder(1, seed=-1)
    order = SampleOrder(4, seed=0)
    with pytest.raises(ValueError, match="count = -2"):
        order.next_indices(-2)
    state = order.state_dict()
    for key, value in (("size", 5), ("seed", 1), ("shuffle", False)):
        with pytest.raises(ValueError, match=f"saved with {key} = {value}, this run has"):
            order.load_state_dict({**state, key: value})
    with pytest.raises(ValueError, match="position 9 is outside"):
        order.load_state_dict({**state, "position": 9})
    with pytest.raises(ValueError, match="lacks epoch, position"):
        order.load_state_dict({"size": 4, "seed": 0, "shuffle": True})


def mixed(sizes=(3, 50, 7), weights=(2, 1, 1), seed=5) -> MixedOrder:
    ends = np.cumsum(sizes)
    members = [range(end - size, end) for end, size in zip(ends.tolist(), sizes, strict=True)]
    return MixedOrder(members, weights, seed)


@pytest.mark.parametrize("weights", [(2, 1, 1), (0.7, 0.2, 0.1), (1, 1, 1)])
def test_every_run_of_draws_holds_the_shares(weights):
    drawn = np.searchsorted([3, 53], mixed(weights=weights).next_indices(400), side="right")
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(drawn[:, None] == np.arange(3), axis=0)  # [400, 3]
    assert np.abs(counts - shares * np.arange(1, 401)[:, None]).max() < 1.0


def test_each_data_set_goes_round_once_before_it_comes_again():
    drawn = [index for index in mixed(weights=(1, 1, 1)).next_indices(150) if index >= 3 and index < 53]
    assert len(drawn) == 50 and sorted(drawn) == list(range(3, 53)) and drawn != sorted(drawn)


def test_a_draw_depends_on_seed_and_number_alone():
    whole = mixed().next_indices(90)
    in_parts = mixed()
    assert in_parts.next_indices(1) + in_parts.next_indices(40) == whole[:41]
    resumed = mixed()
    resumed.load_state_dict(json.loads(json.dumps(in_parts.state_dict())))
    assert resumed.next_indices(49) == whole[41:]
    assert mixed(seed=6).next_indices(90) != whole


@pytest.mark.parametrize("other", [{"sizes": (4, 50, 7)}, {"weights": (1, 1, 1)}, {"seed": 6}])
def test_the_state_of_another_mixture_is_refused(other):
    with pytest.raises(ValueError, match="resume with the same data"):
        mixed(**other).load_state_dict(mixed().state_dict())


def test_without_weights_each_sample_comes_once():
    rows = [Row(Place(Path("a")), lambda decode: None, b"", entry=n // 5) for n in range(10)]
    assert order_of(Samples(rows), 3).next_indices(10) == SampleOrder(10, 3).next_indices(10)
    weighted = order_of(Samples(rows, (9.0, 1.0)), 3).next_indices(10)
    assert sum(index >= 5 for index in weighted) == 1
    assert set(order_of(Samples(rows[:5], (9.0, 1.0)), 3).next_indices(10)) == set(range(5))  # all of one was left out
