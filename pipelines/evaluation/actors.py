"""Actors of a Ray cluster that draw samples and compute likelihoods, of one model after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.model import Model
from ddpm.quality import Measured
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.devices import actors_that_hold, seen_gpus
from pipelines.evaluation.drawing import JudgedModel, with_labels
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.images import pack_samples, thumbnail_size, thumbnails, to_levels, unpack_samples
from pipelines.evaluation.likelihoods import BATCH, Bounds, Likelihood, likelihood
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import DrawnRows, DrawnUnit, SampledModel, SampleFiles, SamplePlan, SampleSpec, Unit
from pipelines.presentation.progress import Notice, Progress
from pipelines.remote.actors import ActorPool, PooledActor
from pipelines.remote.shared import packed, unpacked
from pipelines.remote.tasks import alive_nodes
from pipelines.signing import Authority, Derived
from pipelines.storage import Storage


@dataclass(frozen=True)
class Sampled:
    """The samples of a subject.

    Attributes:
        rows: what the evaluator says of them.
        files: that hold them.
    """

    plan: SamplePlan
    rows: DrawnRows
    files: SampleFiles

    def prompt_accuracies(self, prompts: Prompts | None) -> list[Measured]:
        """Return the share of samples whose caption matches best, of each noise seed; none where nobody can tell."""
        plan, vectors = self.plan, self.rows.vectors
        if prompts is None or vectors is None:
            return []
        drawn = [
            (place * plan.n, rows, seed)
            for place, seed in enumerate(plan.seeds)
            if (rows := plan.rows(seed)) is not None
        ]
        return [found for each in drawn if (found := prompts.accuracy(vectors, *each)) is not None]


class SamplingActors:
    """Actors that draw and judge samples of subjects. Used as a context, at whose end they end.

    The evaluator is loaded once in each; the networks of the last subject stay loaded.

    Args:
        data: what judges the samples; its configuration says how many actors there are, and whether each has a GPU.
        request: how many samples are drawn of each subject.
        authority: says whose stored samples are believed, and signs the new ones; None to draw all of them.
        notice: called where an actor is lost, and where what is stored is not believed.
        subjects: whose samples are drawn.

    Raises:
        TaskError: no device holds the weights of a subject, or not those of as many actors.
    """

    def __init__(
        self,
        data: EvaluationData,
        request: SampleSpec,
        authority: Authority | None,
        notice: Notice,
        subjects: Iterable[SampledModel],
    ) -> None:
        self.data, self.request, self.authority, self.notice = data, request, authority, notice
        n = request.n or data.real.test.count
        units = len(request.seeds) * -(-n // request.batch_size)
        cluster, weights = data.config.cluster, max(subject.model.nbytes for subject in subjects)
        gpus = seen_gpus() if cluster.gpus_per_worker > 0 else None
        count = min(actors_that_hold(weights, data.config.evaluation.actors, alive_nodes(), gpus), units)
        needs = {"CPU": 1.0, "GPU": float(gpus is not None), "memory": float(weights) if gpus is None else 0.0}
        shared = ray.put(data.evaluator)
        self.pool = ActorPool(_SamplingActor, (shared, data.storage), needs, count, cluster.patience_s, notice)
        self._shared: dict[str, Any] = {}

    def __enter__(self) -> SamplingActors:
        self.pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.__exit__(*error)

    def _ask(self, subject: SampledModel, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (place, result) of calls of a method of `Drawer` for a subject, as they finish."""
        if subject.digest not in self._shared:
            self._shared[subject.digest] = ray.put(packed((subject.model.to("cpu"), subject.prompts)))
        # Ray resolves an argument that is a reference at each call, and one in a list not.
        reference = [self._shared[subject.digest]]
        return self.pool.map("of", [(reference, method, call) for call in calls])

    def draw(self, subject: SampledModel, folder: Path, progress: Progress) -> Sampled:
        """Draw the samples of a subject, with their rows in files below `folder`; those that are stored are read."""
        model, evaluator = subject.model, self.data.evaluator
        channels, height, width = model.spec.shape
        small = (channels, *thumbnail_size(height, width))
        plan = subject.plan(self.request, self.data.real)
        files, units = SampleFiles(plan, self.data.storage, self.authority, self.notice), plan.units()
        rows = {
            "features": Rows(folder / "features", (evaluator.encoder.width,), np.float32),
            "pixels": Rows(folder / "pixels", small, np.uint8),
            "finite": Rows(folder / "finite", (), np.bool_),
        }
        done, total = 0, len(plan.seeds) * plan.n
        try:
            for place, drawn in self._ask(subject, "draw", [(unit, plan, files.of(unit)) for unit in units]):
                unit = units[place]
                files.add(unit, drawn)
                for name, found in drawn.rows.items():
                    if name not in rows:  # what not every evaluator says
                        rows[name] = Rows(folder / name, found.shape[1:], np.float32)
                    rows[name].write(unit.row, found)
                done += unit.stop - unit.first
                progress(done, total)
        finally:
            files.write()
        return Sampled(plan, DrawnRows(**rows), files)

    def evaluations(self, subject: SampledModel, plan: SamplePlan) -> float:
        """Return how many network evaluations an image of a subject takes; see `counted`."""
        ((_, found),) = self._ask(subject, "evaluations", [(plan.units()[0], plan.sampling)])
        return float(found)

    def noise(self, subject: SampledModel, count: int, seed: int) -> NDArray[np.float32]:
        """Return the features of images of noise [N, D], which no model should be as bad as."""
        ((_, found),) = self._ask(subject, "noise", [(count, seed)])
        return np.asarray(found)

    def likelihood(self, subject: SampledModel, images: Tensor, cond: Conditioning | None, seed: int) -> Likelihood:
        """Return the likelihood of real images [N, C, H, W] in [-1, 1], with their classes and captions, if any."""
        spans = [slice(first, first + BATCH) for first in range(0, len(images), BATCH)]
        calls = [(images[span], None if cond is None else cond[span], span.start, seed) for span in spans]
        found = dict(self._ask(subject, "likelihood", calls))
        parts = [found[place] for place in range(len(calls))]
        return Likelihood(Bounds.joined([part.bounds for part in parts]), np.concatenate([part.ode for part in parts]))

    def bound(self, subject: SampledModel, images: Tensor, cond: Conditioning | None, seed: int) -> Tensor:
        """Return the bound of each of some real images [N], in [-1, 1]; see `JudgedModel.bound`."""
        ((_, found),) = self._ask(subject, "bound", [(images, cond, seed)])
        assert isinstance(found, Tensor)
        return found


class _SamplingActor(PooledActor):
    """An actor with an evaluator, and a model."""

    def __init__(self, evaluator: Evaluator, storage: Storage) -> None:
        torch.set_num_threads(1)
        self.evaluator, self.storage = evaluator, storage
        self._subject: Sequence[Any] = ()
        self._drawer: Drawer | None = None

    def of(self, subject: Sequence[Any], method: str, arguments: tuple[Any, ...]) -> Any:
        """Return the result of a method of the `Drawer` of a subject, by its reference in Ray's object store."""
        if self._subject != subject:
            self._drawer = None  # its networks leave the device first
            model, prompts = unpacked(self.fetch(subject[0]))
            self._drawer = Drawer(model, prompts, self.evaluator, self.storage)
            self._subject = subject
        return getattr(self._drawer, method)(*arguments)


class Drawer:
    """Draws samples of one model and computes their features, in this process.

    Args:
        prompts: captions that are drawn from, with what judges them; None without prompts.
        storage: where samples are kept.
    """

    def __init__(self, model: Model, prompts: Prompts | None, evaluator: Evaluator, storage: Storage) -> None:
        self.judged, self.prompts, self.storage = JudgedModel.here(model, evaluator.encoder), prompts, storage
        judge = None if prompts is None else prompts.matcher
        self.match = None if judge is None else judge.encoder.to(self.judged.device)
        self.judges = (evaluator.digest[:16], *(() if judge is None else (judge.digest[:16],)))

    def draw(self, unit: Unit, plan: SamplePlan, believed: Mapping[str, str]) -> DrawnUnit:
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
        encoded = self.judged.encode(levels)
        rows = {"features": encoded.features.numpy(), "pixels": thumbnails(levels), "finite": finite}
        if encoded.probabilities is not None:
            rows["probabilities"] = encoded.probabilities.numpy()
        if self.match is not None:
            rows["vectors"] = self.match(levels).features.numpy()
        files |= {name: stored.write(unit.path(name), save(rows))}
        return DrawnUnit(rows, files, tuple(name for name in (unit.shard, name) if name in believed))

    def _images(
        self, unit: Unit, plan: SamplePlan, stored: Derived, believed: Mapping[str, str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], dict[str, str]]:
        """Return the samples of a unit, uint8 [N, H, W, C], which are finite, and their file's SHA-256 by its name.

        They are the stored ones, else new ones.
        """
        data = stored.read(unit.path(unit.shard), believed.get(unit.shard))
        if data is not None:
            return *unpack_samples(data, self.judged.model.spec.shape[0]), {unit.shard: believed[unit.shard]}
        images = self._generate(unit, plan.sampling, plan.batch_size)
        finite = images.isfinite().flatten(1).all(1).cpu().numpy()
        levels = to_uint8(images).cpu().numpy()
        data = pack_samples(levels, unit.labels, unit.first, finite)
        return levels, finite, {unit.shard: stored.write(unit.path(unit.shard), data)}

    def _generate(self, unit: Unit, sampling: Sampling, batch_size: int) -> Tensor:
        """Return new samples of a unit in [-1, 1], [N, C, H, W]."""
        image_ids = torch.arange(unit.first, unit.stop)
        return self.judged.images(self._condition(unit), image_ids, sampling, unit.seed, batch_size)

    def _condition(self, unit: Unit) -> Conditioning | None:
        """Return the classes and captions of a unit."""
        if unit.captions is None:
            return with_labels(None, unit.labels)
        assert self.prompts is not None
        return with_labels(self.prompts.condition(unit.captions), unit.labels)

    def evaluations(self, unit: Unit, sampling: Sampling) -> float:
        """Return how many network evaluations the first image of a unit takes."""
        cond = self._condition(unit)
        first = None if cond is None else cond[:1]
        return self.judged.evaluations(first, torch.tensor([unit.first]), sampling, unit.seed)

    def noise(self, count: int, seed: int) -> NDArray[np.float32]:
        """Return the features of images of noise, which no model should be as bad as."""
        shape = (count, *self.judged.model.spec.shape)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        return self.judged.encode(to_levels(images)).features.numpy()

    def likelihood(self, images: Tensor, cond: Conditioning | None, first: int, seed: int) -> Likelihood:
        """Return the likelihood of a batch of real images, of which the first has this number."""
        image_ids = torch.arange(first, first + len(images), device=self.judged.device)
        mine = self.judged.condition(cond, torch.arange(len(images)))
        return likelihood(self.judged.model, images.to(self.judged.device), mine, image_ids, seed)

    def bound(self, images: Tensor, cond: Conditioning | None, seed: int) -> Tensor:
        """Return the bound of each image, [N]."""
        return self.judged.bound(images, cond, torch.arange(len(images)), seed).cpu()
