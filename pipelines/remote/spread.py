"""Work on many things as Ray tasks, one CPU each, whose results come as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipelines.presentation.progress import Notice, no_notice
from pipelines.remote.tasks import TaskError, finished
from pipelines.storage import is_local

TASKS_PER_CPU = 2
"""Tasks that are submitted at a time for each CPU of the cluster: one that runs, and one that can start at once."""
STALLED_S = 1800.0
"""Seconds without a finished task, each of up to thousands of large images, after which none is waited for."""

Advance = Callable[[int], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class OverRay:
    """Do work as Ray tasks; Ray repeats those that were lost with their node.

    Attributes:
        what: they do, in words.
        notice: called with a line where no task has finished for a minute.
        stalled_s: seconds without a finished task after which none is waited for.
    """

    what: str
    notice: Notice = no_notice
    stalled_s: float = STALLED_S

    @property
    def where(self) -> str:
        """Where the work is done, in words."""
        return f"as Ray tasks on {cluster_cpus():,} CPUs"

    def __call__(
        self, work: Callable[[T, Advance], R], items: Sequence[T], advance: Advance
    ) -> Iterator[tuple[int, R]]:
        """Yield (place in `items`, work(item, …)) as each of them finishes; after an error no further one is started.

        Args:
            work: is pickled, once for all tasks.
            items: each is pickled with its task.
            advance: called with what each task has counted, once the task has finished.

        Raises:
            TaskError: no node can run a task, none finishes any more, or one was lost with each node that ran it.
        """
        task, shared = ray.remote(num_cpus=1)(_counted), ray.put(work)
        calls = (task.remote(shared, item) for item in items)
        at_once = TASKS_PER_CPU * cluster_cpus()
        done = finished(calls, {"CPU": 1}, self.what, at_once=at_once, stalled_s=self.stalled_s, notice=self.notice)
        try:
            for place, (count, result) in done:
                advance(count)
                yield place, result
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise TaskError(
                f"Ray has lost a task of those that {self.what} again and again ({type(error).__name__}): see with "
                "`ray status` which nodes are there; the same command goes on with what has not finished"
            ) from error


def obstacle_to_tasks(addresses: Sequence[str]) -> str | None:
    """Return why Ray tasks cannot read and write these addresses; None if they can, "" without a connection to Ray."""
    if not ray.is_initialized():
        return ""
    if cluster_cpus() < 1:
        return "the Ray cluster has no CPUs"
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return None
    local = next((address for address in addresses if is_local(address)), None)
    return None if local is None else f"the Ray cluster's other nodes do not see {local.removeprefix('file://')}"


def cluster_cpus() -> int:
    """Return the number of CPUs of the cluster, free or in use."""
    return int(ray.cluster_resources().get("CPU", 0))


def _counted(work: Callable[[T, Advance], R], item: T) -> tuple[int, Any]:
    """Return what the work has counted, and its result."""
    counts: list[int] = []
    result = work(item, counts.append)
    return sum(counts), result
