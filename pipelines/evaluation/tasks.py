"""Waiting for Ray tasks that draw samples: as long as they take, but not for a cluster that cannot hold them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from pipelines.errors import PipelineError
from pipelines.retry import PATIENCE_S

LOOK_EVERY_S = 10.0


class TaskError(PipelineError):
    """Tasks that no node of the cluster can hold."""


def finished(
    tasks: Sequence[Any], needs: Mapping[str, float], what: str, patience_s: float = PATIENCE_S
) -> Iterator[tuple[int, Any]]:
    """Yield (place in `tasks`, result) of each task as it finishes.

    How long a task takes is not known here, so a task that runs is waited for. One that can never start is not: Ray
    itself would wait for a node that is large enough for ever.

    Args:
        tasks: references that the calls returned.
        needs: what each task has asked for, by Ray's names.
        what: they do, in words.

    Raises:
        TaskError: for `patience_s` seconds no task has finished, and no node is large enough for one.
    """
    places = {task: place for place, task in enumerate(tasks)}
    short_since: float | None = None
    while places:
        done, _ = ray.wait(list(places), num_returns=1, timeout=LOOK_EVERY_S)
        for task in done:
            yield places.pop(task), ray.get(task)
        if done or fits(needs):
            short_since = None
            continue
        now = time.monotonic()
        short_since = now if short_since is None else short_since
        if now - short_since >= patience_s:
            asked = " and ".join(f"{need:g} {name}" for name, need in needs.items() if need)
            raise TaskError(
                f"{len(places)} of {len(tasks)} tasks that {what} wait for {asked} on one node, and for "
                f"{patience_s:.0f} s no node of the Ray cluster has had that: add such a node, or lower "
                "cluster.gpus_per_worker"
            )


def fits(needs: Mapping[str, float]) -> bool:
    """Return whether a node that is alive has what a task needs, free or in use."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0.0) >= need for name, need in needs.items()) for node in nodes)
