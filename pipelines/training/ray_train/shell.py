"""The shell of the training loop in a Ray Train worker: checkpoints go into Ray's list, progress to the driver."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.checkpoints import fetch_first
from pipelines.errors import PipelineError
from pipelines.scratch import scratch_folder
from pipelines.storage import Fence, Storage, join
from pipelines.training.loop.progress import Progress
from pipelines.training.loop.shell import Store
from pipelines.training.resume import listed_checkpoints

POST_EVERY_S = 0.5
ORPHANED_S = 30.0
"""How long a worker without a driver waits for Ray to end it."""
BACKLOG = 1
"""How many checkpoints may wait behind the one that is uploading, before the loop waits for storage."""


class DriverLostError(PipelineError):
    """The driver of this worker has ended. Another may have taken over, so this worker must not write any more."""


class RayShell:
    """`Shell` inside a Ray Train worker.

    Args:
        monitor: handle of the run's monitor actor.
        folder: address of the run, below which Ray Train keeps its checkpoints.
        fence: checks that no other driver has taken over the run.
        started: `time.monotonic()` when this attempt began.
    """

    def __init__(self, monitor: Any, rank: int, storage: Storage, folder: str, fence: Fence, started: float) -> None:
        self.monitor, self.rank, self.storage, self.folder = monitor, rank, storage, folder
        self.fence, self.started = fence, started
        self.attempt = uuid.uuid4().hex
        self.reply: Any = None  # reference to the monitor's reply that is not there yet
        self.unsent: Progress | None = None
        self.stop = False
        self.posted_at = 0.0
        self.preemption: object = None  # the newest notice of Ray's
        self.uploads: deque[Future[None]] = deque()

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """Return the newest complete checkpoint of Ray Train's list, downloaded to this node."""
        newest = ray.train.get_checkpoint()
        names: list[str] = []
        if newest is not None:
            first = Path(newest.path).name
            names = [first, *(name for name in listed_checkpoints(self.folder, self.storage) if name != first)]
        with downloaded_checkpoint(self.folder, names, self.storage) as folder:
            yield folder

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Upload in Ray Train's thread, which then enters the checkpoint in the list that a restart reads.

        This waits for one actor call, which agrees on a name, and for storage only where more than one checkpoint is
        waiting: otherwise an unreachable store would fill the disk.
        """
        if store is None:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self.wait_for_backlog()
        done: Future[None] = Future()
        self.uploads.append(done)

        def upload(local: Checkpoint, name: str) -> Checkpoint:
            try:
                self.fence.check()
                store(join(self.folder, name))
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)
            ray_storage = ray.train.get_context().get_storage()
            path = ray_storage.build_checkpoint_path_from_name(name)
            return Checkpoint(path, filesystem=ray_storage.storage_filesystem)

        # Ray requires a folder to upload; `upload` ignores it, because `store` has the files.
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(tempfile.gettempdir()),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )

    def wait_for_backlog(self) -> None:
        """Wait until at most `BACKLOG` checkpoints wait behind the one that is uploading."""
        while len(self.uploads) > BACKLOG:
            self.uploads.popleft().result()

    def flush(self) -> None:
        """Wait for the uploads; Ray Train itself waits for the last entry in its list before the run ends."""
        while self.uploads:
            self.uploads.popleft().result()

    def progress(self, progress: Progress) -> None:
        """Send progress at most twice a second; the reply is read later, without waiting."""
        self.unsent = progress
        self._read_reply(timeout=0)
        if self.reply is None and time.monotonic() - self.posted_at > POST_EVERY_S:
            self._post()

    def close(self) -> None:
        """Send the last progress and wait until it has arrived."""
        self._read_reply(timeout=10)
        if self.unsent is not None and self.reply is None:
            self._post()
            self._read_reply(timeout=10)

    def stop_requested(self) -> bool:
        """Return the driver's last reply."""
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


@contextmanager
def downloaded_checkpoint(folder: str, names: Sequence[str], storage: Storage) -> Iterator[Path | None]:
    """Return the first complete checkpoint of those named, downloaded to this node; None where there are no names."""
    with tempfile.TemporaryDirectory(prefix="restored-", dir=scratch_folder()) as scratch:
        target = Path(scratch) / "checkpoint"
        if names:
            fetch_first(storage, [join(folder, name) for name in names], target)
        yield target if names else None
