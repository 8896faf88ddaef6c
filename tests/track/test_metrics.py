"""Each metric has one reduction, the same over micro-batches, updates and ranks."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from prism_fast.track.metrics import Metrics


def test_every_reduction_and_the_order_of_names():
    metrics = Metrics()
    for value, tokens in ((3, 2), (5, 1), (4, 5)):
        metrics.sum("rows", value)
        metrics.mean("loss", value * tokens, tokens)
        metrics.mean("plain", value)
        metrics.max("gap", value)
        metrics.last("lr", value / 10)
    read = metrics.read()
    assert read == {"rows": 12, "loss": 31 / 8, "plain": 4.0, "gap": 5, "lr": 0.4}
    assert list(read) == ["rows", "loss", "plain", "gap", "lr"]
    assert [type(value) for value in read.values()] == [int, float, float, int, float]
    assert metrics.read() == read, "reading takes nothing away"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_tensors_are_as_good_as_numbers(dtype):
    values = [torch.tensor(value, dtype=dtype) for value in (1, 0, 1)]
    metrics = Metrics()
    for value in values:
        metrics.sum("sum", value)
        metrics.mean("mean", value, torch.tensor(2))
        metrics.max("max", value)
        metrics.last("last", value)
    read = metrics.read()
    assert read == {"sum": 2, "mean": 2 / 6, "max": 1, "last": 1}
    whole = float if dtype.is_floating_point else int
    assert [type(value) for value in read.values()] == [whole, float, whole, whole]


def test_integers_stay_integers_until_a_float_joins_them():
    metrics = Metrics()
    metrics.sum("rows", 2**60 + 1)  # no float64 holds it
    metrics.sum("rows", numpy.int64(1))
    metrics.sum("tokens", 2)
    metrics.sum("tokens", numpy.float32(0.5))
    read = metrics.read()
    assert read == {"rows": 2**60 + 2, "tokens": 2.5}
    assert json.loads(json.dumps(read)) == read


def test_what_has_no_value_is_absent():
    metrics = Metrics()
    metrics.mean("score", 0.0, 0)
    metrics.mean("gap", torch.tensor(0.0), torch.tensor(0))
    metrics.sum("rows", 0)
    assert metrics.read() == {"rows": 0}
    later = Metrics()
    later.mean("score", 3.0, 2)
    assert (metrics | later).read() == {"score": 1.5, "rows": 0}
    assert Metrics().read() == {}


def test_a_metric_keeps_the_value_of_its_moment_and_no_graph():
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    total = weight * 2
    metrics = Metrics()
    metrics.sum("loss", total)
    with torch.no_grad():
        total.add_(5)
    assert metrics.read() == {"loss": 2.0}


def test_both_as_one_and_neither_is_changed():
    first, second = Metrics(), Metrics()
    for metrics, (value, count) in ((first, (1.0, 3)), (second, (2.0, 1))):
        metrics.sum("sum", value)
        metrics.mean("mean", value, count)
        metrics.max("max", value)
        metrics.last("last", value)
    second.sum("only", 7)
    read = (first | second).read()
    assert read == {"sum": 3.0, "mean": 0.75, "max": 2.0, "last": 2.0, "only": 7}
    assert (second | first).read()["last"] == 1.0
    assert first.read() == {"sum": 1.0, "mean": 1 / 3, "max": 1.0, "last": 1.0}
    merged = first
    merged |= second
    assert merged.read() == read and first.read() != read


def test_a_name_with_two_reductions_is_refused():
    first, second = Metrics(), Metrics()
    first.sum("rows", 1)
    second.max("rows", 1)
    for join in (
        lambda: first.max("rows", 1),
        lambda: first | second,
        lambda: first.read(lambda s: [s, second.state()]),
    ):
        with pytest.raises(ValueError, match="'rows' is reduced by sum in one place and by max in another"):
            join()
    assert first.read() == {"rows": 1}, "the refused value left something"


@pytest.mark.parametrize("value", [torch.ones(1), torch.ones(2, 3), torch.tensor(1j), None, "1", [1]])
def test_what_is_no_number_is_refused_and_leaves_nothing(value):
    metrics = Metrics()
    for add in (metrics.sum, metrics.mean, metrics.max, metrics.last):
        with pytest.raises(ValueError, match="'loss' must be a number"):
            add("loss", value)
    with pytest.raises(ValueError, match="'loss' must be a number"):
        metrics.mean("loss", 1.0, value)
    assert metrics.read() == {}


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_not_finite_is_never_lost(order):
    nan, inf = math.nan, math.inf
    for values, wanted in (((1.0, nan, 2.0), nan), ((1.0, inf), inf), ((inf, -inf), nan), ((1e308, 1e308), inf)):
        metrics = Metrics()
        for value in values[::order]:
            metrics.sum("sum", value)
            metrics.mean("mean", value)
            metrics.max("max", torch.tensor(value, dtype=torch.float64))
        read = metrics.read()
        assert read["sum"] == pytest.approx(wanted, nan_ok=True), values
        assert not math.isfinite(read["mean"]), values
        assert math.isnan(read["max"]) == any(math.isnan(v) for v in values), values


def test_one_transfer_for_all_tensors_and_none_before(monkeypatch):
    metrics, seen = Metrics(), []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        spied = lambda self, *a, _o=original, _n=name, **k: (seen.append(_n), _o(self, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, spied)
    for i in range(20):
        metrics.sum("loss", torch.tensor(float(i)))
        metrics.mean("gap", torch.tensor(i), torch.tensor(i))
        metrics.max(f"max{i}", torch.tensor(i, dtype=torch.bfloat16))
    assert seen == []
    assert metrics.read()["loss"] == 190.0
    assert seen == ["tolist"]


def _micro_batch(i: int) -> Metrics:
    draw = torch.Generator().manual_seed(i)
    value = torch.randn((), generator=draw, dtype=torch.float64) * 10.0 ** (i % 7)
    metrics = Metrics()
    metrics.sum("loss", value)
    metrics.sum("rows", i)
    metrics.mean("score", value, i % 4)
    metrics.max("gap", value.abs())
    metrics.last("lr", 0.5)
    if i % 5 == 0:
        metrics.sum("rare", float(value))  # not on every rank
    return metrics


def _over_ranks(ranks: int, count: int = 12) -> list[dict]:
    """What each of ``ranks`` reads when they share ``count`` micro-batches in turn."""
    shares = [Metrics() for _ in range(ranks)]
    for i in range(count):
        shares[i % ranks] |= _micro_batch(i)
    states = [json.loads(json.dumps(share.state())) for share in shares]  # as they travel
    return [share.read(gather=lambda _: states) for share in shares]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_micro_batches_on_any_number_of_ranks_give_the_same_bits(ranks):
    whole = Metrics()
    for i in range(12):
        whole |= _micro_batch(i)
    for read in _over_ranks(ranks):
        assert read == whole.read() and list(read) == list(_over_ranks(ranks)[0])
    assert whole.read()["rows"] == 66 and len(whole.read()) == 6


def test_the_last_value_is_that_of_the_last_rank_that_has_one():
    ranks = [Metrics(), Metrics(), Metrics()]
    ranks[0].last("budget", 1)
    ranks[1].last("budget", 2)
    ranks[2].sum("rows", 1)
    assert Metrics.joined(rank.state() for rank in ranks).read() == {"budget": 2, "rows": 1}


@pytest.mark.gpu
def test_values_of_host_and_device_are_joined():
    cuda, metrics = torch.device("cuda"), Metrics()
    metrics.sum("loss", torch.tensor(1.5, device=cuda))
    metrics.sum("loss", torch.tensor(2.0))
    metrics.mean("gap", torch.tensor(3, device=cuda), 2)
    metrics.sum("rows", torch.tensor(2, device=cuda))
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.max("max", torch.ones((), device=cuda, dtype=torch.bfloat16))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.read() == {"loss": 3.5, "gap": 1.5, "rows": 2, "max": 1.0}
