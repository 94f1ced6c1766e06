"""What a rank is given: its job, and the shell around its loop. Ray is one shell, a test's process group another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ddpm.interop import ModelSpec
from pipelines.config import Config
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine
from pipelines.storage import Storage, join
from pipelines.tracking import Tracker
from pipelines.training.progress import Progress

if TYPE_CHECKING:
    from pipelines.training.state import Training

Store = Callable[[str], None]
"""Writes a checkpoint's files to a folder's URI (s3:// or file://), `state.json` last."""


class Shell(Protocol):
    """What surrounds the loop: where checkpoints go, who watches, who may ask it to stop."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The newest complete checkpoint folder, or None for a fresh start; the same on every rank."""

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Keep a checkpoint; called by every rank at the same step, with something to store on rank 0 only.

        Returns quickly: `store(uri)` is called once, with a URI that is new, in a thread of the shell's, one checkpoint
        after the other. It takes long and raises `StorageError` where storage stays away.
        """

    def flush(self) -> None:
        """Wait until everything saved is durable; called by every rank at the same step.

        Raises:
            Exception: what a `store` raised.
        """

    def progress(self, progress: Progress) -> None:
        """Tell whoever watches; rank 0 only, after every step and once more at the end, must not block."""

    def stop_requested(self) -> bool:
        """Whether to stop at the next step boundary, with a checkpoint; rank 0 only, must not block."""

    def checkpoint_requested(self) -> bool:
        """Whether to save a checkpoint at the next step boundary and go on (preemption); any rank, must not block.

        True once per wish: asking answers it.
        """


class Judge(Protocol):
    """Scores a model while it trains; picklable."""

    def due(self, before: int, seen: int) -> bool:
        """Whether a step from `before` to `seen` images calls for it; the same on every rank."""

    def __call__(self, training: Training, spec: ModelSpec, device: torch.device) -> None:
        """Judge the average; called by every rank at the same step."""


@dataclass(frozen=True)
class Job:
    """Everything a rank needs to know, picklable."""

    config: Config
    dataset: Dataset
    storage: Storage
    tracker: Tracker
    lineage: dict[str, Any]
    quarantine: Quarantine | None = None
    judge: Judge | None = None

    @property
    def published_uri(self) -> str:
        """Where checkpoints that stay are copied to."""
        return join(self.config.storage.root, "runs", self.config.name, "published")
