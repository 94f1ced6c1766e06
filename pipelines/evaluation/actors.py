"""Actors of a Ray cluster that draw samples and compute likelihoods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from ddpm.generate import to_uint8
from ddpm.model import Model
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.images import pack_samples, thumbnail_size, thumbnails, to_levels, unpack_samples
from pipelines.evaluation.likelihoods import Likelihood, likelihood
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import Drawn, DrawnUnit, Plan, Request, SampleFiles, Unit
from pipelines.presentation.progress import Notice, Progress
from pipelines.remote.actors import ActorPool, PooledActor, processors
from pipelines.signing import Derived
from pipelines.storage import Storage


def sampling_actors(
    model: Model,
    evaluator: Evaluator,
    storage: Storage,
    request: Request,
    units: int,
    *,
    prompts: Prompts | None = None,
    notice: Notice,
) -> ActorPool:
    """Return actors that draw samples and compute likelihoods: model and evaluator are loaded once in each.

    Args:
        request: says how many there are, and whether each has a GPU.
        units: parts of the work, of which there are not fewer than actors.
        prompts: captions that are drawn from, with what judges them; None without prompts.
    """
    shared = ray.put((model.to("cpu"), evaluator, prompts))
    count = min(request.actors or processors(use_gpu=request.use_gpu), units)
    needs = {"CPU": 1.0, "GPU": float(request.use_gpu)}
    return ActorPool(_SamplingActor, (shared, storage), needs, count, request.patience_s, notice)


class _SamplingActor(PooledActor):
    """An actor with a model and an evaluator."""

    def __init__(self, shared: tuple[Model, Evaluator, Prompts | None], storage: Storage) -> None:
        torch.set_num_threads(1)
        self.device = task_device()
        model, self.evaluator, self.prompts = shared
        judge = None if self.prompts is None else self.prompts.matcher
        self.match = None if judge is None else judge.encoder.to(self.device)
        self.judges = (self.evaluator.digest[:16], *(() if judge is None else (judge.digest[:16],)))
        self.model = model.to(self.device)
        self.encode = self.evaluator.encoder.to(self.device)
        self.storage = storage

    def draw(self, unit: Unit, plan: Plan, believed: Mapping[str, str]) -> DrawnUnit:
        """Return the rows of a batch of samples; what is stored, and believed, is not made again.

        Args:
            believed: name of a file -> its SHA-256.
        """
        name = unit.rows(self.judges)
        stored = plan.stored(self.storage)
        data = stored.read(unit.path(name), believed.get(name))
        if data is not None:
            return DrawnUnit(load(data), {name: believed[name]}, ())
        images, finite, files = self._images(unit, plan, stored, believed)
        # Drawn and stored images may differ in the stride of a single channel, by which convolutions choose how to add.
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        encoded = self.encode(levels.to(self.device))
        rows = {"features": encoded.features.numpy(), "pixels": thumbnails(levels), "finite": finite}
        if encoded.probabilities is not None:
            rows["probabilities"] = encoded.probabilities.numpy()
        if self.match is not None:
            rows["vectors"] = self.match(levels.to(self.device)).features.numpy()
        files |= {name: stored.write(unit.path(name), save(rows))}
        return DrawnUnit(rows, files, tuple(name for name in (unit.shard, name) if name in believed))

    def _images(
        self, unit: Unit, plan: Plan, stored: Derived, believed: Mapping[str, str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], dict[str, str]]:
        """Return the samples of a unit, uint8 [N, H, W, C], which are finite, and their file's SHA-256 by its name.

        They are the stored ones, else new ones.
        """
        data = stored.read(unit.path(unit.shard), believed.get(unit.shard))
        if data is not None:
            return *unpack_samples(data, self.model.spec.shape[0]), {unit.shard: believed[unit.shard]}
        labels = None if unit.labels is None else torch.from_numpy(unit.labels).to(self.device)
        text = None
        if unit.captions is not None:
            assert self.prompts is not None
            text = self.prompts.condition(unit.captions).to(self.device)
        images = self.model.generate(
            labels,
            text=text,
            sampling=plan.sampling,
            seed=unit.seed,
            image_ids=torch.arange(unit.first, unit.stop, device=self.device),
            batch_size=plan.batch_size,
        )
        finite = images.isfinite().flatten(1).all(1).cpu().numpy()
        levels = to_uint8(images).cpu().numpy()
        data = pack_samples(levels, unit.labels, unit.first, finite)
        return levels, finite, {unit.shard: stored.write(unit.path(unit.shard), data)}

    def noise(self, count: int, seed: int) -> NDArray[np.float32]:
        """Return the features of images of noise, which no model should be as bad as."""
        shape = (count, *self.model.spec.shape)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        parts = to_levels(images).split(256)
        return np.concatenate([self.encode(part.to(self.device)).features.numpy() for part in parts])

    def likelihood(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, first: int, seed: int
    ) -> Likelihood:
        """Return the likelihood of a batch of real images, given their captions where the model is on text."""
        span = slice(first, first + len(images))
        text = None if self.prompts is None else self.prompts.likelihood_condition(span).to(self.device)
        return likelihood(self.model, images, labels, first, seed, self.device, text)


def draw(
    actors: ActorPool, files: SampleFiles, evaluator: Evaluator, model: Model, folder: Path, progress: Progress
) -> Drawn:
    """Draw the samples of a plan, and return their rows in files below `folder`.

    Args:
        files: that are stored of it.
    """
    channels, height, width = model.spec.shape
    small = (channels, *thumbnail_size(height, width))
    plan, units = files.plan, files.plan.units()
    features = Rows(folder / "features", (evaluator.encoder.width,), np.float32)
    pixels = Rows(folder / "pixels", small, np.uint8)
    finite = Rows(folder / "finite", (), np.bool_)
    optional: dict[str, Rows] = {}
    done, total = 0, len(plan.seeds) * plan.n
    for place, drawn in actors.map("draw", [(unit, plan, files.of(unit)) for unit in units]):
        unit, rows = units[place], drawn.rows
        files.add(unit, drawn)
        features.write(unit.row, rows["features"])
        pixels.write(unit.row, rows["pixels"])
        finite.write(unit.row, rows["finite"])
        for name in ("probabilities", "vectors"):
            if name in rows:
                if name not in optional:
                    optional[name] = Rows(folder / name, rows[name].shape[1:], np.float32)
                optional[name].write(unit.row, rows[name])
        done += unit.stop - unit.first
        progress(done, total)
    files.write()
    return Drawn(features, optional.get("probabilities"), pixels, finite, optional.get("vectors"))
