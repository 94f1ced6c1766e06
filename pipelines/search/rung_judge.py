"""The judge of a training trial: scores the average of its weights at given numbers of images, within the training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.generate import configured, generate, to_uint8
from ddpm.interop import ModelSpec
from ddpm.likelihood import variational_bound
from ddpm.prediction import Conditioning, NetworkDenoiser
from ddpm.quality import FeatureMoments
from ddpm.schedule import make_schedule
from pipelines.evaluation.features import EvaluatorNetwork, extract
from pipelines.search.judge import distance_and_error
from pipelines.storage import Storage, join
from pipelines.training.preview import collect, share_out
from pipelines.training.state import Training, averaged

BOUND_STEPS = 64
"""Steps of the chain whose bound judges a trial, respaced from the schedule's own; each is one network evaluation."""
BATCH = 64


@dataclass(frozen=True)
class RungJudge:
    """Judges a training's average at given numbers of images; see `pipelines.training.shell.Judge`.

    The scores are files beside the run's checkpoints: a trial that comes again finds those it has earned.

    Attributes:
        rungs: images seen.
        samples: images drawn at each.
        labels: of them, in turn; None for a model without classes.
        evaluator: whose features judge.
        reference: moments of the real train split's features.
        held_out: real test images for the bound, [B, C, H, W] in [-1, 1]; none for B = 0.
        held_out_labels: theirs.
        seed: of the noise.
        storage: where the scores go.
        uri: the folder.
    """

    rungs: tuple[int, ...]
    samples: int
    labels: Tensor | None
    evaluator: EvaluatorNetwork
    reference: FeatureMoments
    held_out: Tensor
    held_out_labels: Tensor | None
    seed: int
    storage: Storage
    uri: str

    def due(self, before: int, seen: int) -> bool:
        """Whether a rung lies in (before, seen]."""
        return any(before < rung <= seen for rung in self.rungs)

    def __call__(self, training: Training, spec: ModelSpec, device: torch.device) -> None:
        """Draw and judge, the work shared out over the ranks; rank 0 writes the scores."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        schedule = make_schedule(**spec.schedule)
        with averaged(training) as network, torch.no_grad():
            denoiser = NetworkDenoiser(network, schedule, spec.prediction)
            mine = share_out(self.samples, rank)
            images = generate(
                denoiser,
                schedule,
                spec.sampling,
                cond=self._labels(self.labels, mine, spec, device),
                shape=spec.shape,
                seed=self.seed,
                images=mine.to(device),
                batch_size=BATCH,
            )
            features = collect(extract(self.evaluator, to_levels(images)).features.to(device), self.samples).cpu()
            scores, _ = distance_and_error(self.reference, features)
            if len(self.held_out):
                part = share_out(len(self.held_out), rank)
                bound = variational_bound(
                    configured(denoiser, schedule, replace(spec.sampling, scale=1.0, rescale=0.0)),
                    schedule,
                    self.held_out[part].to(device),
                    self._labels(self.held_out_labels, part, spec, device),
                    seed=self.seed,
                    images=part.to(device),
                    steps=min(BOUND_STEPS, schedule.num_steps),
                )
                scores["bits_per_dim"] = collect(bound.total, len(self.held_out)).mean().item()
        if rank == 0:
            scores |= {"images_seen": float(training.images_seen), "samples": float(self.samples)}
            where = join(self.uri, f"{training.images_seen:012d}.json")
            self.storage.write(where, json.dumps(scores).encode())

    @staticmethod
    def _labels(labels: Tensor | None, numbers: Tensor, spec: ModelSpec, device: torch.device) -> Conditioning | None:
        if labels is None or not spec.classes:
            return None
        return Conditioning(label=labels[numbers % len(labels)].to(device))


def to_levels(images: Tensor) -> Tensor:
    """Rounded to the 256 levels of a picture, on the CPU."""
    return to_uint8(images).permute(0, 3, 1, 2).float().cpu() / 127.5 - 1
