"""The rate of requests falls by halves while a store objects, and rises by equal steps while it does not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.storage import rate
from pipelines.storage.rate import RequestRate


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Reader:
    """Sends requests one after another, as fast as it may and can.

    Attributes:
        sent: when, in seconds.
        limits: after each answer.
    """

    def __init__(self, most: float = 100.0) -> None:
        self.clock, self.most = Clock(), most
        self.rate = RequestRate("the store", self.clock, self.clock.sleep)
        self.sent: list[float] = []
        self.limits: list[tuple[float, float | None]] = []

    def read(self, seconds: float, too_many: Callable[[], bool] = lambda: False) -> None:
        end = self.clock() + seconds
        while self.clock() < end:
            self.rate.wait()
            self.sent.append(self.clock())
            self.clock.sleep(1 / self.most)
            self.rate.answered(too_many=too_many())
            self.limits.append((self.clock(), self.rate.throttling().limit))

    def sent_in(self, first: float, last: float) -> int:
        return sum(first <= at < last for at in self.sent)


def test_without_an_objection_nobody_waits_and_requests_are_counted_by_the_second():
    reader = Reader(most=100)
    reader.read(3.5)
    done = reader.rate.throttling()
    assert done.requests == len(reader.sent) == pytest.approx(350, abs=1)
    assert done.per_second == pytest.approx(100, abs=1)
    assert (done.limit, done.slow_downs, done.seconds) == (None, 0, 0)
    reader.clock.sleep(10)
    assert reader.rate.throttling().per_second == 0


def test_an_objection_halves_the_rate_and_answers_raise_it_by_equal_steps_until_it_is_lifted(caplog):
    reader = Reader(most=100)
    reader.read(3)
    began = reader.clock()
    reader.rate.answered(too_many=True)
    assert reader.rate.throttling().limit == pytest.approx(50, abs=1)
    reader.read(5)
    steps = [b - a for (_, a), (_, b) in pairwise(reader.limits[-200:])]
    seconds = [b - a for (a, _), (b, _) in pairwise(reader.limits[-200:])]
    slopes = [step / second for step, second in zip(steps, seconds, strict=True)]
    assert slopes == pytest.approx([rate.RAISE * 100] * len(slopes), rel=0.02)
    assert reader.sent_in(began, began + 5) == pytest.approx(5 * 75, rel=0.05)  # 50 to 100, and 75 on average
    reader.read(10)
    done = reader.rate.throttling()
    assert done.limit is None
    assert done.seconds == pytest.approx((rate.LIFT - 0.5) / rate.RAISE, abs=0.2)
    first, last = [record.getMessage() for record in caplog.records]
    assert "the store answers that it is asked too much (SlowDown)" in first
    assert "at most 50 requests per second" in first
    assert "the store answers again: the reads of this process were limited for 10 s, to 50 " in last
    assert "after 1 answers of SlowDown" in last
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_storm_halves_the_rate_once_a_second_down_to_the_least():
    reader = Reader(most=200)
    reader.read(2)
    reader.read(20, lambda: True)
    limits = [limit for _, limit in reader.limits if limit is not None]
    levels = list(dict.fromkeys(limits))
    assert levels[-1] == rate.LEAST
    assert all(b == max(a / 2, rate.LEAST) for a, b in pairwise(levels))
    changes = [at for (_, a), (at, b) in pairwise(reader.limits) if a is not None and b != a]
    assert all(later - sooner >= rate.HOLD_S for sooner, later in pairwise(changes))
    reader.read(40)
    assert reader.rate.throttling().limit is None
    assert reader.sent_in(reader.clock() - 2, reader.clock()) == pytest.approx(400, rel=0.05)


def test_many_objections_at_once_are_one_and_all_are_counted():
    reader = Reader(most=100)
    reader.read(2)
    for _ in range(16):  # of the threads of a process
        reader.rate.answered(too_many=True)
    done = reader.rate.throttling()
    assert done.limit == pytest.approx(50, abs=1)
    assert done.slow_downs == 16


def test_time_without_requests_neither_raises_the_limit_nor_counts():
    reader = Reader(most=100)
    reader.read(2)
    reader.rate.answered(too_many=True)
    before = reader.rate.throttling()
    reader.clock.sleep(3_600)  # all shards are in the cache
    reader.rate.answered(too_many=False)
    after = reader.rate.throttling()
    assert before.limit is not None
    assert after.limit == pytest.approx(before.limit + rate.RAISE * 100, rel=0.02)
    assert after.seconds - before.seconds <= 2 * rate.HOLD_S


@given(capacity=st.integers(20, 500), more=st.floats(1.5, 10))
def test_a_store_that_serves_less_than_is_asked_is_asked_about_as_much_as_it_serves(capacity, more):
    """It objects to what exceeds its capacity in a second; goodput is high, and few requests are in vain."""
    reader = Reader(most=capacity * more)
    served: dict[int, int] = {}

    def too_many() -> bool:
        second = int(reader.clock())
        served[second] = served.get(second, 0) + 1
        return served[second] > capacity

    reader.read(60, too_many)
    end = int(reader.clock())
    late = [served[second] for second in range(end - 30, end)]
    good = sum(min(count, capacity) for count in late) / len(late)
    assert good > 0.55 * capacity
    assert sum(late) / len(late) < 1.35 * capacity


def test_processes_with_the_same_work_come_to_equal_shares_wherever_they_begin():
    """Chiu & Jain 1989: increase by sums and decrease by factors converge to fairness."""
    clock = Clock()
    capacity, rates = 100.0, [RequestRate("the store", clock, clock.sleep) for _ in range(2)]
    for each in rates:
        for _ in range(100):
            each.wait()
        each.answered(too_many=True)
    for _ in range(3):  # one of them has been unlucky
        clock.sleep(1)
        rates[1].answered(too_many=True)

    def limits() -> list[float]:
        found = [each.throttling().limit for each in rates]
        assert None not in found
        return [limit for limit in found if limit is not None]

    assert limits()[0] > 7 * limits()[1]
    for _ in range(100):
        clock.sleep(1)
        over = sum(limits()) > capacity
        for each in rates:
            each.answered(too_many=over)
    first, second = limits()
    assert first == pytest.approx(second, rel=0.05)


def test_threads_share_one_limit():
    done = RequestRate("the store")
    for _ in range(80):
        done.wait()
    done.answered(too_many=True)
    limit = done.throttling().limit
    assert limit is not None
    stop = threading.Event()
    sent: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            done.wait()
            sent.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    counted = len(sent)
    stop.set()
    for thread in threads:
        thread.join()
    assert 0.5 * limit <= counted <= 1.2 * limit + 8
