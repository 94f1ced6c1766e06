"""What is fixed during one attempt of one rank; every part of the loop reads it from here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpm.consistency import ConsistencyTuning
from ddpm.model import ModelSpec
from ddpm.objectives import Objective
from ddpm.prediction import Denoiser
from ddpm.schedule import NoiseSchedule
from pipelines.checkpoints import references
from pipelines.config import Config, noise_schedule, training_objective
from pipelines.training.loop.collectives import broadcast_object
from pipelines.training.loop.hardware import Precision, resolve_precision
from pipelines.training.loop.shell import Job


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
