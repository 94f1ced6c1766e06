"""The shell of a run on reusable workers: to Ray Train there is no such run, so its checkpoints are listed here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.storage import Fence, Storage, join
from pipelines.training.loop.shell import Store
from pipelines.training.ray_train.shell import RayShell, downloaded_checkpoint
from pipelines.training.resume import enter_checkpoint, listed_checkpoints


class ListingShell(RayShell):
    """A `RayShell` that uploads checkpoints and keeps their list itself.

    Args:
        keep: the number of checkpoints that stay in the list.
    """

    def __init__(
        self, monitor: Any, rank: int, storage: Storage, folder: str, fence: Fence, started: float, keep: int
    ) -> None:
        super().__init__(monitor, rank, storage, folder, fence, started)
        self.keep = keep
        self.pool = ThreadPoolExecutor(1, "checkpoints")

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """Return the newest complete checkpoint of the list, downloaded to this node."""
        names = listed_checkpoints(self.folder, self.storage)
        with downloaded_checkpoint(self.folder, names, self.storage) as folder:
            yield folder

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Upload in a thread, then enter the checkpoint in the list."""
        if store is None:
            return
        self.wait_for_backlog()
        self.uploads.append(self.pool.submit(self._store, store, metrics))

    def close(self) -> None:
        """Send the last progress, and end the thread."""
        super().close()
        self.pool.shutdown()

    def _store(self, store: Store, metrics: dict[str, Any]) -> None:
        self.fence.check()
        name = f"checkpoint_{metrics['images_seen']:012d}_{self.attempt[:8]}"
        store(join(self.folder, name))
        self.fence.check()
        enter_checkpoint(self.folder, self.storage, name, metrics, self.keep)
