"""Waiting for Ray tasks for as long as they take, unless no node can run them or they hang."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice, no_notice
from pipelines.storage.retry import PATIENCE_S

LOOK_EVERY_S = 10.0
SAY_AFTER_S = 60.0
"""Seconds without a finished task after which a notice says what is waited for."""


class TaskError(PipelineError):
    """Tasks that no node of the cluster can hold, or of which none finishes any more."""


def finished(
    tasks: Iterable[Any],
    needs: Mapping[str, float],
    what: str,
    patience_s: float = PATIENCE_S,
    *,
    at_once: int | None = None,
    stalled_s: float | None = None,
    notice: Notice = no_notice,
) -> Iterator[tuple[int, Any]]:
    """Yield (place in `tasks`, result) of each task as it finishes; the others are cancelled where that ends early.

    How long a task takes is not known here, so a task that runs is waited for, unless `stalled_s` bounds it. One that
    can never start is not: Ray itself would wait for a node that is large enough for ever.

    Args:
        tasks: references that the calls returned.
        needs: what each task has asked for, by Ray's names.
        what: they do, in words.
        at_once: tasks that are taken from `tasks` before one of them has finished; None for all of them.
        stalled_s: seconds without a finished task after which none is waited for any more; None to wait for ever.
        notice: called with a line where no task has finished for a minute.

    Raises:
        TaskError: for `patience_s` seconds no task has finished, and no node is large enough for one; or none has for
            `stalled_s` seconds.
    """
    coming = enumerate(tasks)
    places = {task: place for place, task in islice(coming, at_once)}
    since, short_since, said = time.monotonic(), None, False
    try:
        while places:
            done, _ = ray.wait(list(places), num_returns=1, timeout=LOOK_EVERY_S)
            for task in done:
                place = places.pop(task)
                places |= {further: later for later, further in islice(coming, 1)}
                yield place, ray.get(task)
            now = time.monotonic()
            if done:
                since, short_since, said = now, None, False
                continue
            if fits(needs):
                short_since = None
            elif short_since is None:
                short_since = now
            if short_since is not None and now - short_since >= patience_s:
                raise TaskError(
                    f"tasks that {what}, {len(places)} of them, wait for {named(needs)} on one node, and for "
                    f"{patience_s:.0f} s no node of the Ray cluster has had that: add such a node, or lower "
                    "cluster.gpus_per_worker"
                )
            if stalled_s is not None and now - since >= stalled_s:
                raise TaskError(
                    f"of the tasks that {what} {len(places)} are left, and none has finished for {stalled_s:.0f} s: "
                    "see with `ray status` whether something else keeps the Ray cluster busy, or a node stands still; "
                    "the same command goes on with what has not finished"
                )
            if now - since >= SAY_AFTER_S and not said:
                said = True
                notice(f"no task of those that {what} has finished for {now - since:.0f} s: it waits for {len(places)}")
    finally:
        for task in places:
            with suppress(RayError):
                ray.cancel(task)


def fits(needs: Mapping[str, float]) -> bool:
    """Return whether a live node has the resources of a task, free or in use."""
    return any(all(node.get(name, 0.0) >= need for name, need in needs.items()) for node in alive_nodes())


def alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each live node, free or in use, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def named(needs: Mapping[str, float]) -> str:
    """Return a description of the resources of a task or actor, by Ray's names."""
    return " and ".join(f"{need:g} {name}" for name, need in needs.items() if need)
