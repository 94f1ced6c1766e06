"""Samples and bounds of several settings or models on the same noise, computed by actors of the Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import ray
import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from pipelines.config import Config
from pipelines.presentation.progress import Notice
from pipelines.remote.actors import ActorPool, PooledActor, processors
from pipelines.search.judge import Drawn, SampleScorer, Subject
from pipelines.search.rung_judge import conditions, held_out_bound

SHOWN = 20
"""Images that are kept of each setting, for the study's page."""
PART = 256
"""Images that one call draws, a multiple of those that are drawn together."""


def draw_all(
    asked: Sequence[tuple[Any, Sampling]], samples: int, seed: int, base: Config, notice: Notice
) -> list[Drawn]:
    """Draw images 0..samples - 1 of a seed with each of the settings.

    Args:
        asked: (reference to a subject in Ray's object store, settings).
        base: says whether an actor has a GPU.
        notice: called where an actor is lost.
    """
    parts = [torch.arange(first, min(first + PART, samples)) for first in range(0, samples, PART)]
    calls = [([subject], settings, part, seed) for subject, settings in asked for part in parts]
    found = _call("draw", calls, base, notice)
    return [reduce(add, found[i : i + len(parts)]) for i in range(0, len(found), len(parts))]


def bounds(
    subjects: Sequence[Any], images: Tensor, cond: Conditioning | None, seed: int, base: Config, notice: Notice
) -> list[Tensor]:
    """Return the bound of each image for each of the subjects, references in Ray's object store, [N] each."""
    return _call("bound", [([subject], images, cond, seed) for subject in subjects], base, notice)


def _call(method: str, calls: Sequence[tuple[Any, ...]], base: Config, notice: Notice) -> list[Any]:
    """Return the results of all calls, in their order."""
    needs = {"CPU": 1.0, "GPU": float(min(base.cluster.gpus_per_worker, 1))}
    count = min(processors(use_gpu=needs["GPU"] > 0), len(calls))
    with ActorPool(_Scorer, (), needs, count, base.cluster.patience_s, notice) as actors:
        found = dict(actors.map(method, calls))
    return [found[place] for place in range(len(calls))]


class _Scorer(PooledActor):
    """Draws of one subject after another; the networks of the last one stay loaded."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._loaded: tuple[Any, SampleScorer] | None = None

    def _scorer(self, reference: list[Any]) -> SampleScorer:
        """Return the scorer of a subject; a reference in a list is not resolved by Ray at each call."""
        (subject,) = reference
        if self._loaded is None or self._loaded[0] != subject:
            found: Subject = ray.get(subject)
            self._loaded = subject, SampleScorer(found)
        return self._loaded[1]

    def draw(self, reference: list[Any], settings: Sampling, image_ids: Tensor, seed: int) -> Drawn:
        """Draw images of a seed by their numbers; the first ones of all are kept."""
        keep = max(SHOWN - int(image_ids[0]), 0)
        return self._scorer(reference).draw(settings, image_ids, seed=seed, keep=keep)

    def bound(self, reference: list[Any], images: Tensor, cond: Conditioning | None, seed: int) -> Tensor:
        """Return the bound of each image, [N]."""
        scorer = self._scorer(reference)
        model, device, image_ids = scorer.model, scorer.device, torch.arange(len(images))
        with torch.no_grad():
            return held_out_bound(
                model.denoiser,
                model.schedule,
                model.spec,
                images.to(device),
                conditions(cond, image_ids, model.spec, device),
                seed=seed,
                image_ids=image_ids.to(device),
            ).cpu()
