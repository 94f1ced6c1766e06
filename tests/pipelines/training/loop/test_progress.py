import time

import pytest

from pipelines.training.loop.progress import Clock


def test_seconds_by_kind_add_up_to_the_time_since_the_start():
    started = time.monotonic() - 5
    clock = Clock(started)
    clock.switch("step")
    with clock.during("grid"), clock.during("data"):
        time.sleep(0.02)
    with clock.during("checkpoint"):
        time.sleep(0.01)
    time.sleep(0.01)
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - started, abs=0.005)
    assert seconds["startup"] == pytest.approx(5, abs=0.1)
    assert seconds["data"] >= 0.02 and seconds["checkpoint"] >= 0.01 and seconds["step"] >= 0.01  # noqa: PT018


def test_the_time_in_a_phase_begins_anew_with_every_phase_and_not_when_it_is_counted():
    clock = Clock(time.monotonic() - 5)
    clock.seconds()
    phase, seconds = clock.phase()
    assert phase == "startup"
    assert seconds == pytest.approx(5, abs=0.5)
    with clock.during("data"):
        time.sleep(0.05)
        assert clock.phase()[0] == "data"
    assert clock.phase()[0] == "startup"
    assert clock.phase()[1] < 0.05
