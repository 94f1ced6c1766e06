"""The job of a rank, the shell around its loop, and its place among the ranks; Ray is one shell, a test another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.consistency import ConsistencyTuning
from ddpm.model import ModelSpec
from ddpm.objectives import Objective
from ddpm.prediction import Denoiser
from ddpm.schedule import NoiseSchedule
from pipelines.checkpoints import references, run_folder
from pipelines.config import Config, noise_schedule, training_objective
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine
from pipelines.storage import Fence, Storage, join, layout
from pipelines.tracking import Tracker
from pipelines.training.loop.collectives import broadcast_object
from pipelines.training.loop.hardware import Precision, resolve_precision
from pipelines.training.loop.progress import Progress

if TYPE_CHECKING:  # a type of arguments only; nothing here makes or reads a state
    from pipelines.training.loop.state import TrainingState


class Shell(Protocol):
    """The surroundings of the loop: who is shown progress, and who may ask the loop to stop."""

    def progress(self, progress: Progress) -> None:
        """Report progress; called on rank 0 after every step and once more at the end, must not block."""

    def samples(self, images: NDArray[np.uint8]) -> None:
        """Show samples [N, H, W, C] of the averaged weights; called on rank 0, must not block."""

    def stop_requested(self) -> bool:
        """Return whether to stop at the next step boundary, with a checkpoint; rank 0 only, must not block."""

    def checkpoint_requested(self) -> bool:
        """Return whether to save a checkpoint at the next step boundary and go on; any rank, must not block.

        A node that is about to be preempted is the reason. Each request is returned once.
        """


class EvaluationHook(Protocol):
    """Scores a model while it trains, such as a trial of a study at its rungs; it must pickle."""

    def due(self, before: int, seen: int) -> bool:
        """Return whether a step from `before` to `seen` images calls for it; the same on every rank."""

    def __call__(self, state: TrainingState, spec: ModelSpec, device: torch.device) -> None:
        """Score the averaged weights; called by every rank at the same step."""


@dataclass(frozen=True)
class Job:
    """Everything that the workers need for a run; it must pickle.

    Attributes:
        config: the configuration of the run.
        dataset: the shards and their index.
        tracker: the MLflow run.
        lineage: what the model's description says of its origin, such as commit and run ID.
        quarantine: samples that are left out of the dataset, if any.
        evaluation_hook: called while training goes on, if any.
        fence: of the driver whose workers train; None where there is no driver, as in a test.
    """

    config: Config
    dataset: Dataset
    tracker: Tracker
    lineage: dict[str, Any]
    quarantine: Quarantine | None = None
    evaluation_hook: EvaluationHook | None = None
    fence: Fence | None = None

    @property
    def storage(self) -> Storage:
        """Reads and writes what is stored."""
        return Storage.of(self.config)

    @property
    def epoch(self) -> int:
        """The number of the driver, counted from 1; 0 without one."""
        return self.fence.epoch if self.fence else 0

    @property
    def run_uri(self) -> str:
        """The folder with everything that the run stores."""
        return run_folder(self.config)

    def published_uri(self, name: str) -> str:
        """Return the address to which the checkpoint of this name is published, which no other writer uses."""
        return join(self.run_uri, layout.PUBLISHED, name.removeprefix(layout.CHECKPOINT_PREFIX))


@dataclass(frozen=True)
class RunContext:
    """The job of a run together with what is derived from it, and this rank's place in the process group.

    Attributes:
        job: configuration, dataset, storage and tracker of the run.
        spec: the description of the model that goes into every checkpoint.
        schedule: the noise schedule.
        objective: what the network predicts, and its loss; or the settings of consistency tuning.
        device: where this rank computes.
        precision: what forward and backward compute in; rank 0's on every rank, so that unlike GPUs compute alike.
        rank: 0..world_size - 1 in the process group.
        world_size: the number of ranks.
        teacher: the model whose trajectories consistency tuning learns, guided or not; None where it learns the data's.
    """

    job: Job
    spec: ModelSpec
    schedule: NoiseSchedule
    objective: Objective | ConsistencyTuning
    device: torch.device
    precision: Precision
    rank: int
    world_size: int
    teacher: Denoiser | None = None

    @classmethod
    def of(cls, job: Job, *, rank: int, world_size: int, device: torch.device) -> RunContext:
        """Return the context of a job on one rank; called by every rank."""
        precision = broadcast_object(resolve_precision(job.config.optim, device))
        lineage = {**job.lineage, "precision": precision}
        spec = references.model_spec(job.config, job.dataset, lineage, job.quarantine)
        schedule, objective = noise_schedule(job.config), training_objective(job.config)
        return cls(job, spec, schedule, objective, device, precision, rank, world_size)

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.job.config
