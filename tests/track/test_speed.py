"""A step's times add up, and what is per second or per peak is divided by the right time."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_fast.track import speed
from prism_fast.track.metrics import WALL_CLOCK
from prism_fast.track.speed import StepTimer, peak_memory_bytes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock finds it one second later."""
    ticks = itertools.count(100.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))


def one_step(timer: StepTimer) -> dict:
    timer.begin()  # the clock's second look; each part takes two, and one second
    with timer.part("generate"):
        pass
    for _ in range(2):
        with timer.part("update", learns=True):
            timer.learned(tokens=50, forward_flops=10**12)
    return timer.metrics().read()


def test_a_step(clock):
    timer = StepTimer(CPU, torch.float32)
    timer.peak = 4e12
    read = one_step(timer)
    assert read.pop("perf/peak_memory_mib") > 0
    wanted = {"time/generate": 1.0, "time/update": 2.0, "time/step": 7.0}
    assert read == wanted | {"perf/tokens_per_second": 100 / 7, "perf/mfu": 6e12 / (2 * 4e12)}
    assert all(name.startswith(WALL_CLOCK) for name in read)
    again = one_step(timer)
    assert {name: again[name] for name in read} == read, "something of the first step is left"


def test_what_was_not_done_has_no_metric(clock):
    timer = StepTimer(CPU, torch.float32)
    assert timer.peak is None
    with timer.part("update", learns=True):
        timer.learned(tokens=1, forward_flops=1)
    assert "perf/mfu" not in timer.metrics().read()
    timer.begin()
    timer.peak = 1e12
    assert set(timer.metrics().read()) == {"time/step", "perf/peak_memory_mib"}


def test_a_part_that_fails_is_timed_too(clock):
    timer = StepTimer(CPU, torch.float32)
    with pytest.raises(ZeroDivisionError), timer.part("update", learns=True):
        raise ZeroDivisionError
    assert timer.seconds == {"update": 1.0}


def test_over_ranks(clock):
    timers = [StepTimer(CPU, torch.float32) for _ in range(2)]
    for timer, tokens, peak in zip(timers, (30, 10), (1e12, 2e12), strict=True):
        timer.peak = peak
        timer.begin()
        with timer.part("update", learns=True):
            timer.learned(tokens=tokens, forward_flops=10**11)
    first, second = (timer.metrics() for timer in timers)
    one, two, both = first.read(), second.read(), (first | second).read()
    assert both["perf/tokens_per_second"] == one["perf/tokens_per_second"] + two["perf/tokens_per_second"]
    assert both["perf/mfu"] == pytest.approx((0.3 + 0.15) / 2)
    for name in ("time/step", "time/update", "perf/peak_memory_mib"):
        assert both[name] == max(one[name], two[name])


def test_peak_memory_of_the_process_is_in_bytes():
    before = peak_memory_bytes(CPU)
    big = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory_bytes(CPU)
    assert 10 << 20 < before <= after < 1 << 40 and big.sum() == 64 << 20
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    assert peak_memory_bytes(CPU) == pytest.approx(peak, rel=0.05)


@pytest.mark.gpu
def test_peak_memory_of_a_card_is_that_of_the_step():
    device = torch.device("cuda")
    timer = StepTimer(device, torch.bfloat16)
    block = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    assert timer.metrics().read()["perf/peak_memory_mib"] >= 256
    del block
    timer.begin()
    assert timer.metrics().read()["perf/peak_memory_mib"] < 256
