"""A rank in a Ray Train worker, and the shell of its loop: progress goes to the driver, its requests come back."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.train.torch import get_device
from ray.train.v2._internal.execution.context import get_train_context

from pipelines import tracking
from pipelines.checkpoints import ModelError
from pipelines.presentation.errors import PipelineError
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import FencedError
from pipelines.training.loop.context import Job, RunContext
from pipelines.training.loop.progress import Progress
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.worker_logs import recorded

FINAL_ERRORS = (FloatingPointError, ShardCorruptError, ModelError, FencedError)
"""Errors that a restart of the workers cannot mend: stream, data and checkpoints would be the same."""
POST_EVERY_S = 0.5
ORPHANED_S = 30.0
"""How long a worker without a driver waits for Ray to end it."""


class DriverLostError(PipelineError):
    """The driver of this worker has ended. Another may have taken over, so this worker must not write any more."""


@contextmanager
def open_rank(job: Job, monitor: Any, started: float) -> Iterator[tuple[RunContext, RayShell]]:
    """Yield the context and shell of this Ray Train worker's rank; inside, its log lines reach the driver.

    Args:
        monitor: handle of the run's monitor actor, which is told of an error that would come again.
        started: `time.monotonic()` when this attempt began.
    """
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    worker = ray.train.get_context()
    rank, node = worker.get_world_rank(), f"node-{worker.get_node_rank()}"
    shell = RayShell(monitor, started)
    with (
        recorded(job.storage, job.run_uri, monitor, epoch=job.epoch, rank=rank, attempt=shell.attempt[:8]),
        tracking.system_metrics(job.tracker, node, job.fence) if worker.get_local_rank() == 0 else nullcontext(),
    ):
        try:
            if job.fence is not None:
                job.fence.check()  # a driver that was replaced may be starting its workers again
            yield RunContext.of(job, rank=rank, world_size=worker.get_world_size(), device=get_device()), shell
        except FINAL_ERRORS as error:
            answer(monitor.set_final_error.remote(str(error)), f"an error that no restart cures ({error})")
            raise  # the others may be waiting for this rank: Ray Train ends them
        shell.close()


def failed_for_good(monitor: Any) -> bool:
    """Return whether a worker of the run has met an error that would come again."""
    return answer(monitor.final_error.remote(), "errors that no restart cures") is not None


class RayShell:
    """`Shell` inside a Ray Train worker.

    Args:
        monitor: handle of the run's monitor actor.
        started: `time.monotonic()` when this attempt began.
    """

    def __init__(self, monitor: Any, started: float) -> None:
        self.monitor, self.started = monitor, started
        self.attempt = uuid.uuid4().hex
        self.reply: Any = None  # reference to the monitor's reply that is not there yet
        self.unsent: Progress | None = None
        self.stop = False
        self.posted_at = 0.0
        self.preemption: object = None  # the newest notice of Ray's

    def progress(self, progress: Progress) -> None:
        """Send progress at most twice a second; the reply is read later, without waiting."""
        self.unsent = progress
        self._read_reply(timeout=0)
        if self.reply is None and time.monotonic() - self.posted_at > POST_EVERY_S:
            self._post()

    def samples(self, images: NDArray[np.uint8]) -> None:
        """Send samples to be shown, without waiting; lost ones are followed by others."""
        self.monitor.show.remote(images)

    def close(self) -> None:
        """Send the last progress and wait until it has arrived."""
        self._read_reply(timeout=10)
        if self.unsent is not None and self.reply is None:
            self._post()
            self._read_reply(timeout=10)

    def stop_requested(self) -> bool:
        """Return whether the driver's last reply asks for a stop."""
        return self.stop

    def checkpoint_requested(self) -> bool:
        """Return whether Ray has announced, since the last call, that a node of the run is about to be preempted.

        `ray.train.get_preemption_info` would make every rank wait for all others at every step. Ray's watcher sends the
        notice to each worker, and the loop all-reduces the flags of the ranks anyway.
        """
        notice = get_train_context().preemption_context.preemption_info
        is_new = notice is not None and notice != self.preemption
        self.preemption = notice
        return is_new

    def _post(self) -> None:
        elapsed = time.monotonic() - self.started
        self.reply = self.monitor.post.remote(self.attempt, elapsed, self.unsent)
        self.unsent, self.posted_at = None, time.monotonic()

    def _read_reply(self, timeout: float) -> None:
        if self.reply is None:
            return
        done, _ = ray.wait([self.reply], timeout=timeout)
        if not done:
            return
        reply, self.reply = self.reply, None
        if not self.stop:
            self.stop = bool(get_reply(reply))


def get_reply(reply: Any) -> Any:
    """Return the reply of an actor of the driver's; None where it cannot be reached at the moment.

    Args:
        reply: the reference that the call returned.

    Raises:
        DriverLostError: the actor has ended, and so has the driver.
    """
    try:
        return ray.get(reply)
    except ActorUnavailableError:
        return None  # the network, perhaps: the next call will show
    except (ActorDiedError, RayActorError) as error:
        # Ray is about to end this worker and its controller. If this worker failed first, the controller would start
        # other workers, and nobody would give back their resources when it is ended in the middle of that.
        time.sleep(ORPHANED_S)
        raise DriverLostError("the driver of this run has ended; start it again to resume") from error
