"""Samples of several settings or models on the same noise, drawn as tasks on the Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
import torch

from ddpm.generate import Sampling
from pipelines.config import Config
from pipelines.ray_tasks import finished
from pipelines.search.judge import Drawn, SampleScorer, Subject

SHOWN = 20
"""Images that are kept of each setting, for the study's page."""


def draw_all(asked: Iterable[tuple[Any, Sampling]], samples: int, seed: int, base: Config) -> list[Drawn]:
    """Draw images 0..samples - 1 of a seed with each of the settings, a Ray task each.

    Args:
        asked: (reference to a subject in Ray's object store, settings).
        base: says whether a task has a GPU.
    """
    needs = {"CPU": 1, "GPU": min(base.cluster.gpus_per_worker, 1)}
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_draw)
    waiting = [task.remote(subject, settings, samples, seed) for subject, settings in asked]
    return [drawn for _, drawn in sorted(finished(waiting, needs, "draw samples"), key=lambda pair: pair[0])]


def _draw(subject: Subject, settings: Sampling, samples: int, seed: int) -> Drawn:
    """Draw images 0..samples - 1 of a seed in a Ray task."""
    torch.set_num_threads(1)
    return SampleScorer(subject).draw(settings, torch.arange(samples), seed=seed, keep=SHOWN)
