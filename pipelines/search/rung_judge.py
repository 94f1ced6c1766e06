"""The judge of a training trial: scores the average of its weights at given numbers of images, within the training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import generate
from ddpm.model import ModelSpec
from ddpm.prediction import NetworkDenoiser
from ddpm.quality import FeatureMoments
from ddpm.schedule import make_schedule
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.evaluators import Encoder
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.likelihoods import conditions, held_out_bound
from pipelines.evaluation.real import Real
from pipelines.shards.captions import Captions
from pipelines.storage import Storage, join, layout
from pipelines.training.loop.collectives import all_gather_items, rank_indices
from pipelines.training.loop.state import TrainingState, ema_weights

BATCH = 64


@dataclass(frozen=True)
class RungJudge:
    """Scores the averaged weights of a training at given numbers of images; see `pipelines.training.shell.Judge`.

    The scores are written as files beside the run's checkpoints, so that a resumed trial keeps its earlier scores.

    Attributes:
        rungs: images seen at which the weights are scored.
        samples: number of images that are drawn at each rung.
        cond: classes and captions that images are drawn from; see `asked_for`.
        encoder: the network whose features are compared.
        reference: moments of the features of the real images that are the reference.
        held_out: real test images for the bound, [B, C, H, W] in [-1, 1], with their classes and captions, if any;
            B = 0 for no bound.
        seed: seed of the noise.
        storage: where the scores are written.
        uri: the folder of the scores.
    """

    rungs: tuple[int, ...]
    samples: int
    cond: Conditioning | None
    encoder: Encoder
    reference: FeatureMoments
    held_out: tuple[Tensor, Conditioning | None]
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
                cond=conditions(self.cond, image_ids, spec, device),
                shape=spec.shape,
                seed=self.seed,
                image_ids=image_ids.to(device),
                batch_size=BATCH,
            )
            own = self.encoder.to(device)(to_levels(images)).features
            features = all_gather_items(own.to(device), self.samples).cpu()
            distance = measured_frechet(self.reference, features)
            scores = {"frechet_distance": distance.value, "standard_error": distance.standard_error}
            real, of_real = self.held_out
            if len(real):
                bound_ids = rank_indices(len(real), rank)
                bound = held_out_bound(
                    denoiser,
                    schedule,
                    spec,
                    real[bound_ids].to(device),
                    conditions(of_real, bound_ids, spec, device),
                    seed=self.seed,
                    image_ids=bound_ids.to(device),
                )
                scores["bits_per_dim"] = all_gather_items(bound, len(real)).mean().item()
        if rank == 0:
            scores |= {"images_seen": float(state.images_seen), "samples": float(self.samples)}
            uri = join(self.uri, layout.numbered(state.images_seen))
            self.storage.write(uri, json.dumps(scores).encode())


def held_out_images(real: Real, captions: Captions | None) -> tuple[Tensor, Conditioning | None]:
    """Return the stored test images, [N, C, H, W] in [-1, 1], with their classes and captions, if any.

    Args:
        captions: of these images.
    """
    images, labels = real.held_out()
    cond = Conditioning() if captions is None else captions.condition(torch.arange(len(images)), labels=False)
    if labels is not None:
        cond = replace(cond, label=torch.from_numpy(labels))
    return torch.from_numpy(images).float() / 127.5 - 1, cond if cond.present else None
