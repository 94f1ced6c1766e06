"""The rate of a process's requests to a store: counted, and limited for as long as the store says that it is too much.

Additive increase, multiplicative decrease: an answer such as S3's `SlowDown` halves the limit, and each second of
other answers raises it by the same amount. So processes with the same work come to equal shares of what a store can
serve, without knowing of each other (Chiu & Jain 1989; TCP's congestion control, RFC 5681).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)
LEAST = 2.0
"""Requests per second that are always permitted."""
HOLD_S = 1.0
"""Seconds after a halving in which no other follows: requests that were under way say nothing new."""
CREDIT_S = 0.05
"""Seconds by which a thread may come late for its request without loss for the next one."""
RAISE = 0.1
"""What each second of answers adds to the limit, as a share of the rate at which the store first objected."""
LIFT = 1.5
"""How often that rate the limit has to reach to be lifted: the store serves again what it was asked for before."""


@dataclass(frozen=True)
class Throttling:
    """How a process's requests went since it was started.

    Attributes:
        requests: that were sent, including those that a client repeats by itself.
        per_second: of them in the last whole second.
        slow_downs: answers that the requests were too many.
        seconds: in which requests were made, or waited, while their rate was limited.
        limit: requests per second that are permitted now; None where there is no limit.
    """

    requests: int = 0
    per_second: int = 0
    slow_downs: int = 0
    seconds: float = 0.0
    limit: float | None = None


class RequestRate:
    """Spaces out the requests of all threads of a process to one store, for as long as the store asks for it.

    There is no limit until the store first objects. It is lifted again when it has grown beyond the rate of before.

    Args:
        store: name of the store, for the log.
        clock: returns seconds; another one than the computer's is for tests.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        store: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.store, self._clock, self._sleep = store, clock, sleep
        self._lock = threading.Lock()
        self._second, self._count, self._last_count = int(clock()), 0, 0  # requests of this second and of the last one
        self._requests = self._slow_downs = 0
        self._seconds = 0.0
        self._limit: _Limit | None = None

    def wait(self) -> None:
        """Wait until a request may be sent, and count it."""
        while (pause := self._take()) > 0:
            self._sleep(pause)

    def answered(self, *, too_many: bool) -> None:
        """Note an answer of the store.

        Args:
            too_many: whether it says that the requests are too many.
        """
        with self._lock:
            now, said = self._clock(), None
            self._pass(now)
            if too_many:
                said = self._object(now)
            elif self._limit is not None:
                self._limit.grow(now)
                if self._limit.rate >= LIFT * self._limit.before:
                    said, self._limit = self._limit.summary(self.store), None
        if said:
            logger.warning("%s", said)

    def throttling(self) -> Throttling:
        """Return the counts until now."""
        with self._lock:
            self._pass(self._clock())
            limit = None if self._limit is None else self._limit.rate
            return Throttling(self._requests, self._last_count, self._slow_downs, self._seconds, limit)

    def _take(self) -> float:
        """Count a request and return 0 if it may be sent now; else return after how many seconds to ask again."""
        with self._lock:
            now = self._clock()
            self._pass(now)
            if self._limit is not None:
                if now < self._limit.free_at:
                    return min(self._limit.free_at - now, HOLD_S)  # the limit may change meanwhile
                self._limit.free_at = max(self._limit.free_at, now - CREDIT_S) + 1 / self._limit.rate
            self._requests += 1
            self._count += 1
            return 0.0

    def _object(self, now: float) -> str | None:
        """Lower the limit; return a line for the log where this is the first answer of its kind."""
        self._slow_downs += 1
        if self._limit is not None:
            self._limit.shrink(now)
            return None
        self._limit = _Limit(float(max(self._last_count, self._count, LEAST)), now)
        return (
            f"{self.store} answers that it is asked too much (SlowDown): this process reads with at most "
            f"{self._limit.rate:,.0f} requests per second from now on, half as many as before, and with more again "
            "while the store answers"
        )

    def _pass(self, now: float) -> None:
        """Count the time since the last call."""
        if self._limit is not None:
            self._seconds += self._limit.last(now)
        if int(now) != self._second:
            self._last_count = self._count if int(now) == self._second + 1 else 0
            self._second, self._count = int(now), 0


class _Limit:
    """A limit from the first objection of a store on.

    Attributes:
        rate: requests per second.
        before: the rate at which the store objected.
        free_at: when the next request may be sent.
    """

    def __init__(self, before: float, now: float) -> None:
        self.before, self.rate, self.free_at = before, max(before / 2, LEAST), now
        self._lowest, self._slow_downs, self._seconds = self.rate, 1, 0.0
        self._halved_at = self._changed_at = self._seen_at = now

    def shrink(self, now: float) -> None:
        """Halve it after an objection, but for those that come within `HOLD_S` after the last time."""
        self._slow_downs += 1
        self._changed_at = now
        if now - self._halved_at >= HOLD_S:
            self.rate = max(self.rate / 2, LEAST)
            self._lowest, self._halved_at = min(self._lowest, self.rate), now

    def grow(self, now: float) -> None:
        """Raise it after an answer, by the seconds since the last answer or objection."""
        # What was not asked for in a longer time, the store has not granted.
        self.rate += RAISE * self.before * min(now - self._changed_at, HOLD_S)
        self._changed_at = now

    def last(self, now: float) -> float:
        """Return the seconds that it has lasted since the last call, but for a time without requests."""
        seconds, self._seen_at = min(now - self._seen_at, HOLD_S), now
        self._seconds += seconds
        return seconds

    def summary(self, store: str) -> str:
        """Return a line for the log when it is lifted."""
        return (
            f"{store} answers again: the reads of this process were limited for {self._seconds:,.0f} s, to "
            f"{self._lowest:,.0f} requests per second at the least, after {self._slow_downs:,} answers of SlowDown"
        )
