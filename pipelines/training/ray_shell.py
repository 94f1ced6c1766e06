"""What surrounds the rank loop in a Ray Train worker: checkpoints to Ray's list, news to the driver, wishes back."""

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
from pipelines.storage import Fence, Storage, join
from pipelines.training.progress import Progress
from pipelines.training.resume import listed_checkpoints
from pipelines.training.shell import Store

POST_EVERY_S = 0.5
ORPHANED_S = 30.0
WAITING = 1
"""Checkpoints that may wait behind the one that is uploading, before the loop waits for storage."""


class DriverLostError(PipelineError):
    """The driver of this worker has ended: another may have taken over, so nothing more is written."""


class RayShell:
    """`Shell` inside a Ray Train worker.

    Args:
        folder: address of the run, below which Ray Train keeps its checkpoints.
        fence: says whether this worker's driver is still the one that counts.
        started: `time.monotonic()` when this attempt began.
    """

    def __init__(self, monitor: Any, rank: int, storage: Storage, folder: str, fence: Fence, started: float) -> None:
        self.monitor, self.rank, self.storage, self.folder = monitor, rank, storage, folder
        self.fence, self.started = fence, started
        self.attempt = uuid.uuid4().hex
        self.answer: Any = None
        self.unsent: Progress | None = None
        self.stop = False
        self.posted = 0.0
        self.notice: object = None
        self.uploads: deque[Future[None]] = deque()

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The newest checkpoint of Ray Train's list that is whole, fetched for this rank."""
        newest = ray.train.get_checkpoint()
        names: list[str] = []
        if newest is not None:
            first = Path(newest.path).name
            names = [first, *(name for name in listed_checkpoints(self.folder, self.storage) if name != first)]
        with fetched(self.folder, names, self.storage) as folder:
            yield folder

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Upload in Ray Train's thread, which then enters the checkpoint in the list that a restart reads.

        Only the agreement on a name is waited for here, one call of an actor; and storage, where it is more than a
        checkpoint behind: otherwise a store that is away would fill the disk.
        """
        if store is None:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self.make_room()
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

        # Ray wants a folder to upload; ours is known to `store` alone.
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(tempfile.gettempdir()),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )

    def make_room(self) -> None:
        """Wait for storage where more than one checkpoint waits behind the one that is uploading."""
        while len(self.uploads) > WAITING:
            self.uploads.popleft().result()

    def flush(self) -> None:
        """Wait for the uploads; Ray Train itself waits for the last entry in its list before the run ends."""
        while self.uploads:
            self.uploads.popleft().result()

    def progress(self, progress: Progress) -> None:
        """Send at most twice a second; the answer is looked at later, without waiting."""
        self.unsent = progress
        self._look_for_answer(timeout=0)
        if self.answer is None and time.monotonic() - self.posted > POST_EVERY_S:
            self._post()

    def close(self) -> None:
        """Send the last progress and wait until it has arrived."""
        self._look_for_answer(timeout=10)
        if self.unsent is not None and self.answer is None:
            self._post()
            self._look_for_answer(timeout=10)

    def stop_requested(self) -> bool:
        """What the driver last answered."""
        return self.stop

    def checkpoint_requested(self) -> bool:
        """Whether Ray has told this worker since the last question that a node of the run is about to be taken away.

        `ray.train.get_preemption_info` would make every rank wait for all others at every step. What it reads is told
        to each worker by Ray's own watcher; the loop shares its flags in an all-reduce anyway.
        """
        notice = get_train_context().preemption_context.preemption_info
        fresh = notice is not None and notice != self.notice
        self.notice = notice
        return fresh

    def _post(self) -> None:
        elapsed = time.monotonic() - self.started
        self.answer = self.monitor.post.remote(self.attempt, elapsed, self.unsent)
        self.unsent, self.posted = None, time.monotonic()

    def _look_for_answer(self, timeout: float) -> None:
        if self.answer is None:
            return
        done, _ = ray.wait([self.answer], timeout=timeout)
        if not done:
            return
        answer, self.answer = self.answer, None
        if not self.stop:
            self.stop = bool(heard(answer))


def heard(answer: Any) -> Any:
    """What an actor of the driver's has answered; None where it cannot be reached for a moment.

    Raises:
        DriverLostError: it is gone for good.
    """
    try:
        return ray.get(answer)
    except ActorUnavailableError:
        return None  # the network, perhaps; the next answer tells
    except (ActorDiedError, RayActorError) as error:
        # Ray is about to end this worker, and its controller. A failure that came first would have the controller
        # start other workers, whose resources nobody gives back when it is ended in the middle of that.
        time.sleep(ORPHANED_S)
        raise DriverLostError("the driver of this run has ended; start it again to resume") from error


@contextmanager
def fetched(folder: str, names: Sequence[str], storage: Storage) -> Iterator[Path | None]:
    """The first of a run's checkpoints that is whole, on this node; None where there are no names."""
    with tempfile.TemporaryDirectory(prefix="ddpm-restored-") as scratch:
        target = Path(scratch) / "checkpoint"
        if names:
            fetch_first(storage, [join(folder, name) for name in names], target)
        yield target if names else None
