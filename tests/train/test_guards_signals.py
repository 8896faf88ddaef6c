"""The first signal is noted, the second stops at once; a step that cannot be left is finished."""

from __future__ import annotations

import os
import signal

import pytest

from prism_fast.train.signals import Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_and_second_signal(number, capfd):
    name = number.name
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.poll("nothing was asked for")
        os.kill(os.getpid(), number)
        told = capfd.readouterr().err
        assert told == f"{name}: saving as soon as the step in progress allows; a second one stops at once\n"
        with pytest.raises(Stopped, match="^here$"):
            stop.poll("here")
        with pytest.raises(KeyboardInterrupt, match="second"):
            os.kill(os.getpid(), number)
            signal.pause()
    told = capfd.readouterr().err
    assert told == f"second {name}: stopped at once; a resumed run goes on from the newest checkpoint\n"
    assert signal.getsignal(number) is before


def test_a_step_decides_whether_it_can_be_left():
    saved: list[str] = []
    with StopRequest() as stop:
        stop.save = lambda: bool(saved.append("asked"))  # None: it must be finished first
        stop.poll("no signal, so nobody is asked")
        os.kill(os.getpid(), signal.SIGTERM)
        stop.poll("asked, and not left")
        assert stop.requested and saved == ["asked"]
        stop.save = lambda: True
        with pytest.raises(Stopped):
            stop.poll("saved")
