"""The mailboxes between workers and driver, without the actors around them."""

from __future__ import annotations

import pytest

from pipelines.training.ray_train.mailboxes import Orders

NOTHING_YET, THE_END = (Orders.WAIT, None), (Orders.END, None)


def test_each_worker_takes_every_run_once_and_in_order():
    orders = Orders(idle_s=60)
    last = [0, 0]
    for number, order in enumerate(("first", "second", "third"), start=1):
        assert [orders.take(seen) for seen in last] == [NOTHING_YET] * 2
        assert orders.put(order) == number
        for rank in (1, 0):
            assert orders.take(last[rank]) == (number, order)
            last[rank] = number
            assert orders.take(last[rank]) == NOTHING_YET  # the other is still at it
        assert orders.state()[:2] == (number, True)
        orders.done(number)
        assert orders.state()[:2] == (number, False)
    orders.close()
    assert [orders.take(seen) for seen in last] == [THE_END] * 2
    assert orders.put("fourth") is None


def test_workers_that_have_started_again_take_the_run_under_way_and_none_that_has_ended():
    orders = Orders(idle_s=60)
    orders.begin()
    orders.put("first")
    orders.done(1)
    orders.put("second")
    orders.begin()
    assert orders.take(0) == (2, "second")
    orders.done(1)  # late news of an earlier run
    assert orders.state() == (2, True, 2)
    orders.done(2)
    assert orders.take(0) == NOTHING_YET


def test_workers_end_together_after_a_while_without_a_run(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    orders = Orders(idle_s=20)
    orders.put("long")
    now += 3600
    assert orders.take(1) == NOTHING_YET  # the other trains for an hour
    orders.done(1)
    now += 19
    assert orders.take(1) == NOTHING_YET
    now += 2
    assert orders.take(1) == THE_END
    assert orders.put("too late") is None
    assert orders.take(1) == THE_END
