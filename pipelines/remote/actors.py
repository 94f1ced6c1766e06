"""Actors of a Ray cluster that share the calls of one piece of work, and outlive the loss of any of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from pipelines.presentation.progress import Notice
from pipelines.remote.tasks import TaskError, fits, named

LOOK_EVERY_S = 5.0
RETRIES = 3
"""Number of times that all actors may be lost with their nodes before the work is given up."""


class PooledActor:
    """The methods that every actor of a pool has."""

    _finished = 0
    _waiting = False

    def ready(self) -> int:
        """Return how many of its calls it is not working on: the finished ones, and one that waits for an object.

        That it answers at all says that the actor has started, and its process runs.
        """
        return self._finished + self._waiting

    def fetch(self, reference: Any) -> Any:
        """Return an object of Ray's store; where the raylet of this node stands still, it does not come."""
        self._waiting = True
        try:
            return ray.get(reference)
        finally:
            self._waiting = False

    def call(self, method: str, *arguments: Any) -> Any:
        """Return the result of one of its methods."""
        try:
            return getattr(self, method)(*arguments)
        finally:
            self._finished += 1


class ActorPool:
    """Actors of one class, each of which has loaded what it needs. Used as a context, at whose end they end.

    Args:
        kind: their class.
        arguments: with which each is made.
        needs: what each asks for, by Ray's names.
        count: their number; those that the cluster has no room for begin when it has.
        patience_s: seconds to wait for a node that can hold one, and for one that does not answer.
    """

    def __init__(
        self,
        kind: type[PooledActor],
        arguments: tuple[Any, ...],
        needs: Mapping[str, float],
        count: int,
        patience_s: float,
        notice: Notice,
    ) -> None:
        self.arguments, self.needs = arguments, {name: need for name, need in needs.items() if need}
        # A second thread answers while the first one works.
        options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "max_concurrency": 2}
        self.kind = ray.remote(kind).options(**options, memory=needs.get("memory") or None)
        self.count, self.patience_s, self.notice = count, patience_s, notice
        self.actors, self.idle, self.lost = list[Any](), list[Any](), 0
        self.starting: dict[Any, Any] = {}
        self.calls: dict[Any, int] = {}
        self.asked: dict[Any, tuple[Any, float]] = {}
        self.looked = time.monotonic()

    def __enter__(self) -> ActorPool:
        for _ in range(self.count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        actor = self.kind.remote(*self.arguments)
        self.actors.append(actor)
        self.starting[actor.ready.remote()] = actor

    def _replace(self, error: RayActorError) -> None:
        """Start an actor that replaces one whose node or process is lost.

        Raises:
            RayActorError: too many were lost.
        """
        self.lost += 1
        if self.lost > RETRIES * self.count:
            raise error
        self._start()

    def _end_silent(self, busy: Iterable[Any]) -> None:
        """End those that have not worked for `patience_s`: what they were asked for then fails, and is done again.

        A process that was stopped, or a node that hangs, would be waited for without end: Ray notices only those that
        are gone. Where the node's raylet alone stands still, the actor answers that it has finished its call, and the
        result does not come, or that it waits for an object.

        Args:
            busy: actors that have a call.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY_S:
            return
        self.looked, before, self.asked = now, self.asked, {}
        for actor in busy:
            question, since = before.get(actor) or (actor.ready.remote(), now)
            if ray.wait([question], timeout=0)[0]:
                since = now if ray.get(question) < self.calls[actor] else since
                question = actor.ready.remote()
            if now - since < self.patience_s:
                self.asked[actor] = question, since
                continue
            self.notice(
                f"an actor of this work has not answered for {now - since:.0f} s, or its result has not come, or "
                "what it needs: its process or its node stands still; it is ended, and another does its work"
            )
            ray.kill(actor)

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (place in `calls`, result) of a method called with each of these arguments, as they finish.

        Only an actor that has started gets a call, so a cluster with room for one of them has it do all the work.

        Raises:
            TaskError: no node of the cluster can hold an actor.
        """
        waiting, running = deque(enumerate(calls)), dict[Any, tuple[int, Any]]()
        began, said, short_since = time.monotonic(), False, None
        while waiting or running:
            while waiting and self.idle:
                actor = self.idle.pop()
                place, arguments = waiting.popleft()
                self.calls[actor] = self.calls.get(actor, 0) + 1
                running[actor.call.remote(method, *arguments)] = place, actor
            done, _ = ray.wait([*running, *self.starting], num_returns=1, timeout=LOOK_EVERY_S)
            for ref in done:
                call = running.pop(ref, None)
                actor = self.starting.pop(ref) if call is None else call[1]
                try:
                    result = ray.get(ref)
                except RayActorError as error:
                    if call is not None:
                        waiting.appendleft((call[0], calls[call[0]]))
                    self._replace(error)
                    continue
                self.idle.append(actor)
                if call is not None:
                    yield call[0], result
            self._end_silent([actor for _, actor in running.values()])
            if done or running or self.idle:
                short_since = None
                continue
            now = time.monotonic()
            if fits(self.needs):
                if not said and now - began >= 2 * LOOK_EVERY_S:
                    said = True
                    self.notice("waiting for free CPUs: all of the Ray cluster are in use")
                continue
            short_since = now if short_since is None else short_since
            if now - short_since >= self.patience_s:
                raise TaskError(
                    f"this work needs {named(self.needs)} on one node, and for {self.patience_s:.0f} s no node of the "
                    "Ray cluster has had that: add such a node, or lower cluster.gpus_per_worker"
                )


def processors(*, use_gpu: bool) -> int:
    """Return how many processors or GPUs the Ray cluster has, in use or not."""
    return max(int(ray.cluster_resources().get("GPU" if use_gpu else "CPU", 1)), 1)
