"""Callbacks of a Ray Train run: a quick start of its processes, and an end that frees what Ray Train forgets.

Ray Train sends them to its controller and to every worker, where this module is loaded before all others: it imports
only what they have imported anyway. Most of a start is imports, during which Python's garbage collector
scans all objects again and again and finds hardly any to free; it costs most where torch is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.util import remove_placement_group


class QuickStart(ControllerCallback):
    """Turns off the garbage collector of a process as soon as Ray Train sends this callback to it.

    Settings of torch follow in the same message, and with them its import. It stays off in a worker until
    `pipelines.training.startup.end_startup`, and in the controller until it has started.
    """

    def __reduce__(self) -> tuple[Callable[[], QuickStart], tuple[()]]:
        """Return what a process that receives this callback calls."""
        return _receive, ()

    def after_controller_start(self, train_run_context: object) -> None:
        """Turn the controller's collector on again."""
        gc.enable()


def _receive() -> QuickStart:
    # Only in actors, the controller and the workers: a server of Ray Client receives it too, and passes it on.
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        gc.disable()
    return QuickStart()


class FreeWorkers(ControllerCallback, WorkerGroupCallback):
    """Frees the resources of the newest group of workers when Ray Train's controller ends.

    A controller that loses a worker while it launches the training on a group, which is neither the start of the group
    nor the training, ends without it. The reservation lasts as long as the driver, and the driver's next controller
    would wait for the same CPUs.
    """

    def __init__(self) -> None:
        self._reserved: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the placement group of a new group of workers."""
        self._reserved = worker_group.get_worker_group_state().placement_group_handle.placement_group

    async def before_controller_shutdown(self) -> None:
        """Free it; where Ray Train has, nothing happens."""
        if self._reserved is not None:
            remove_placement_group(self._reserved)


class TellCause(ControllerCallback, WorkerGroupCallback):
    """Tells the monitor of a run why its workers are started again, for the ledger.

    It does so when the next ones start: until then Ray may not know of a node that it is lost with its workers. Nor do
    the errors of these always say that the node was announced to go, so announcements are remembered.

    Args:
        monitor: handle of the actor.
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self.cause: str | None = None
        self.nodes: set[str] = set()
        self.announced: set[str] = set()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remember the nodes that Ray has announced to be about to be taken away."""
        notice = worker_group_status.get_preemption_info()
        if notice is not None:
            self.announced.update(notice.preempted_node_ids)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Remember what has ended a group of workers, where a new state of Ray Train's controller says so."""
        error = getattr(current_state, "training_failed_error", None)
        cause = "resize" if isinstance(current_state, ResizingState) else error and cause_of(error)
        self.cause = self.cause or cause

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell why the group before this one has ended."""
        if self.cause is not None:
            lost = self.nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if lost and self.cause in ("process", "error"):
                self.cause = "preemption" if lost & self.announced else "node"
            self.monitor.lost.remote(self.cause)
        self.cause, self.nodes = None, {worker.metadata.node_id for worker in worker_group.get_workers()}


def cause_of(error: BaseException) -> str:
    """Return which of `goodput.CAUSES` an error of Ray Train means.

    Where one worker is lost, the others fail as well, in the middle of a collective: its loss is the cause.
    """
    if isinstance(error, PreemptionError):
        return "preemption"
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    failures = [each.controller_failure if isinstance(each, ControllerError) else each for each in failures]
    failures = [
        each.health_check_failure if isinstance(each, WorkerHealthCheckFailedError) else each for each in failures
    ]
    lost = [each for each in failures if isinstance(each, RayActorError)]
    if any(each.preempted for each in lost):
        return "preemption"
    return "process" if lost or any(isinstance(each, WorkerHealthCheckTimeoutError) for each in failures) else "error"
