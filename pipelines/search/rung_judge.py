"""The judge of a training trial: scores the average of its weights at given numbers of images, within the training."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.bound import variational_bound
from ddpm.conditioning import Conditioning
from ddpm.generate import generate
from ddpm.model import ModelSpec
from ddpm.prediction import Denoiser, NetworkDenoiser
from ddpm.quality import FeatureMoments
from ddpm.schedule import NoiseSchedule, make_schedule
from pipelines.evaluation.evaluators import Encoder
from pipelines.evaluation.images import to_levels
from pipelines.search.judge import measured_frechet
from pipelines.storage import Storage, join
from pipelines.training.loop.collectives import all_gather_items, rank_indices
from pipelines.training.loop.state import TrainingState, ema_weights

BOUND_STEPS = 64
"""Steps of the chain whose bound judges a trial, respaced from the schedule's own; each is one network evaluation."""
BATCH = 64


@dataclass(frozen=True)
class RungJudge:
    """Scores the averaged weights of a training at given numbers of images; see `pipelines.training.shell.Judge`.

    The scores are written as files beside the run's checkpoints, so that a resumed trial keeps its earlier scores.

    Attributes:
        rungs: images seen at which the weights are scored.
        samples: number of images that are drawn at each rung.
        labels: labels of the drawn images [N]; image i has label i modulo N. None for a model without classes.
        encoder: the network whose features are compared.
        reference: moments of the features of the real images that are the reference.
        held_out: real test images for the bound, [B, C, H, W] in [-1, 1]; B = 0 for no bound.
        held_out_labels: labels of `held_out` [B]; None without classes.
        seed: seed of the noise.
        storage: where the scores are written.
        uri: the folder of the scores.
    """

    rungs: tuple[int, ...]
    samples: int
    labels: Tensor | None
    encoder: Encoder
    reference: FeatureMoments
    held_out: Tensor
    held_out_labels: Tensor | None
    seed: int
    storage: Storage
    uri: str

    def due(self, before: int, seen: int) -> bool:
        """Return whether a rung lies in (before, seen]."""
        return any(before < rung <= seen for rung in self.rungs)

    def __call__(self, state: TrainingState, spec: ModelSpec, device: torch.device) -> None:
        """Draw images and compute scores, with the work divided among the ranks; rank 0 writes the scores."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        schedule = make_schedule(**spec.schedule)
        with ema_weights(state) as network, torch.no_grad():
            denoiser = NetworkDenoiser(network, schedule, spec.prediction)
            image_ids = rank_indices(self.samples, rank)
            images = generate(
                denoiser,
                schedule,
                spec.sampling,
                cond=conditions(self.labels, image_ids, spec, device),
                shape=spec.shape,
                seed=self.seed,
                image_ids=image_ids.to(device),
                batch_size=BATCH,
            )
            own = self.encoder.to(device)(to_levels(images)).features
            features = all_gather_items(own.to(device), self.samples).cpu()
            distance = measured_frechet(self.reference, features)
            scores = {"frechet_distance": distance.value, "standard_error": distance.standard_error}
            if len(self.held_out):
                bound_ids = rank_indices(len(self.held_out), rank)
                bound = held_out_bound(
                    denoiser,
                    schedule,
                    spec,
                    self.held_out[bound_ids].to(device),
                    conditions(self.held_out_labels, bound_ids, spec, device),
                    seed=self.seed,
                    image_ids=bound_ids.to(device),
                )
                scores["bits_per_dim"] = all_gather_items(bound, len(self.held_out)).mean().item()
        if rank == 0:
            scores |= {"images_seen": float(state.images_seen), "samples": float(self.samples)}
            uri = join(self.uri, f"{state.images_seen:012d}.json")
            self.storage.write(uri, json.dumps(scores).encode())


def conditions(labels: Tensor | None, image_ids: Tensor, spec: ModelSpec, device: torch.device) -> Conditioning | None:
    """Return the condition of images by their numbers; image i has label i modulo N of `labels` [N], if any."""
    if labels is None or not spec.classes:
        return None
    return Conditioning(label=labels[image_ids % len(labels)].to(device))


def held_out_bound(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    spec: ModelSpec,
    images: Tensor,
    cond: Conditioning | None,
    *,
    seed: int,
    image_ids: Tensor,
) -> Tensor:
    """Return the variational bound of real images [B, C, H, W] on a chain of `BOUND_STEPS` steps, bits/dim, [B]."""
    return variational_bound(
        spec.sampling.clipping.wrap(denoiser, schedule),
        schedule,
        images,
        cond,
        seed=seed,
        image_ids=image_ids,
        steps=min(BOUND_STEPS, schedule.num_steps),
    ).total
