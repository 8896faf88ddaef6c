from __future__ import annotations

import json

import numpy as np
import pytest

from prism_fast.data.order import SampleOrder


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
