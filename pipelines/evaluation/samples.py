"""Samples of a model, drawn by actors of a Ray cluster and kept as WebDataset shards.

What is drawn is decided by a `Plan` alone: image i of a noise seed has the label and the noise of its number, and is
drawn in the batch that holds its number, so any number of actors gives the same images. Each batch is stored when it is
ready, and a repetition after an interruption draws only those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from safetensors.numpy import load, save

from ddpm.generate import Sampling, to_uint8
from ddpm.model import Model
from pipelines.config import Config
from pipelines.display import Notice, Progress
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.images import pack_samples, thumbnail_size, thumbnails, to_levels, unpack_samples
from pipelines.evaluation.likelihoods import Likelihood, likelihood
from pipelines.evaluation.prompts import PromptRows, Prompts
from pipelines.evaluation.real import Real
from pipelines.evaluation.rows import Rows
from pipelines.ray_tasks import TaskError, fits
from pipelines.storage import NotFoundError, Storage, join

LOOK_EVERY_S = 5.0
RETRIES = 3
"""How often all actors may be lost, with their nodes, before an evaluation gives up."""


@dataclass(frozen=True)
class Request:
    """What is asked of samples: how many, with which settings, and with what they are drawn.

    Attributes:
        sampling: settings with which the samples are drawn.
        n: samples of each noise seed; as many as the test split has, where None.
        seeds: seeds of the noise.
        batch_size: images that are drawn together.
        likelihood_images: test images whose likelihood is computed too; 0 for none.
        actors: how many draw at a time; as many as the cluster has processors or GPUs, where None.
        use_gpu: whether each has a GPU.
        patience_s: seconds to wait for a node, and for an actor that does not answer.
        root: folder of all evaluations.
    """

    sampling: Sampling
    n: int | None
    seeds: tuple[int, ...]
    batch_size: int
    likelihood_images: int
    actors: int | None
    use_gpu: bool
    patience_s: float
    root: str

    @classmethod
    def of(cls, config: Config, settings: Sampling) -> Request:
        """Return what the configuration asks of an evaluation."""
        asked = config.evaluation
        return cls(
            sampling=settings,
            n=asked.n,
            seeds=tuple(range(asked.seed, asked.seed + asked.seeds)),
            batch_size=asked.batch_size,
            likelihood_images=asked.likelihood_images,
            actors=asked.actors,
            use_gpu=config.cluster.gpus_per_worker > 0,
            patience_s=config.cluster.patience_s,
            root=join(config.storage.root, "evaluations"),
        )


@dataclass(frozen=True)
class Plan:
    """Which samples are drawn, and where they are kept.

    Attributes:
        model_digest: of the weights.
        sampling: the settings.
        n: number of samples of each noise seed.
        seeds: seeds of the noise.
        class_counts: number of real images by class, whose proportions the labels have; empty without classes.
        batch_size: images that are drawn together.
        root: folder of all evaluations.
        prompts: captions that they are drawn from, with the classes of these where the model has some; None for none.
    """

    model_digest: str
    sampling: Sampling
    n: int
    seeds: tuple[int, ...]
    class_counts: tuple[int, ...]
    batch_size: int
    root: str
    prompts: PromptRows | None = None

    @classmethod
    def of(cls, model: Model, model_digest: str, request: Request, real: Real, prompts: Prompts | None) -> Plan:
        """Return which samples of a model are asked for, to be compared with real images."""
        return cls(
            model_digest,
            request.sampling,
            request.n or real.test.count,
            request.seeds,
            real.train.class_counts if model.spec.classes else (),
            request.batch_size,
            request.root,
            None if prompts is None else prompts.plan,
        )

    @property
    def folder(self) -> str:
        """The folder of the samples: plans that differ in anything that decides an image have another one."""
        decisive = [self.model_digest, self.sampling.key(), self.n, self.class_counts, self.batch_size]
        decisive += [] if self.prompts is None else [self.prompts.digest]
        return join(self.root, hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:20])

    def labels(self, seed: int) -> NDArray[np.int64] | None:
        """Return the label of each sample of a noise seed, int64 [n]; None without classes."""
        rows = self.rows(seed)
        if self.prompts is not None and self.prompts.labels is not None and rows is not None:
            return np.array(self.prompts.labels)[rows]
        return balanced_labels(self.n, self.class_counts, seed) if self.class_counts else None

    def rows(self, seed: int) -> NDArray[np.int64] | None:
        """Return the place of the caption of each sample of a noise seed, int64 [n]; None without prompts."""
        return None if self.prompts is None else self.prompts.rows(self.n, seed)

    def units(self) -> list[Unit]:
        """Return the batches of all noise seeds, in order."""
        units = []
        for place, seed in enumerate(self.seeds):
            labels, rows = self.labels(seed), self.rows(seed)
            for first in range(0, self.n, self.batch_size):
                stop = min(first + self.batch_size, self.n)
                of_unit = [None if every is None else every[first:stop] for every in (labels, rows)]
                folder, row = join(self.folder, f"seed-{seed}"), place * self.n + first
                units.append(Unit(folder, seed, first, stop, of_unit[0], row, of_unit[1]))
        return units


@dataclass(frozen=True)
class Unit:
    """A batch of samples.

    Attributes:
        folder: where it is stored.
        seed: of the noise.
        first, stop: numbers of its images.
        labels: of its images, int64 [stop - first]; None without classes.
        row: place of its first image among those of all seeds.
        captions: places of the captions of its images, int64 [stop - first]; None without prompts.
    """

    folder: str
    seed: int
    first: int
    stop: int
    labels: NDArray[np.int64] | None
    row: int
    captions: NDArray[np.int64] | None = None

    @property
    def shard(self) -> str:
        """Address of its images."""
        return join(self.folder, f"samples-{self.first:09d}.tar")


def balanced_labels(n: int, class_counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Return n labels with the proportions of `class_counts`, rounded by largest remainder, in a seeded order."""
    counts = np.asarray(class_counts, np.float64)
    exact = n * counts / counts.sum()
    whole = np.floor(exact).astype(np.int64)
    short = n - int(whole.sum())
    whole[np.argsort(-(exact - whole), kind="stable")[:short]] += 1
    ordered = np.repeat(np.arange(len(counts)), whole)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    return ordered[order]


@dataclass(frozen=True)
class Drawn:
    """Rows of all samples, one noise seed after another, in files.

    Attributes:
        features: float32 [seeds * n, width].
        probabilities: float32 [seeds * n, C]; None for an evaluator without classes.
        pixels: small copies of the samples, uint8 [seeds * n, C, h, w].
        finite: whether all numbers of a sample were finite before they were rounded, bool [seeds * n].
        vectors: of the samples, as a matcher of captions gives them, float32 [seeds * n, J]; None without one.
    """

    features: Rows
    probabilities: Rows | None
    pixels: Rows
    finite: Rows
    vectors: Rows | None = None


class SamplingActors:
    """Actors that draw samples and compute likelihoods: model and evaluator are loaded once in each.

    Used as a context, at whose end they end.

    Args:
        request: says how many there are, and whether each has a GPU; those that the cluster has no room for begin when
            it has.
        units: parts of the work, of which there are not fewer than actors.
        prompts: captions that are drawn from, with what judges them; None without prompts.
    """

    def __init__(
        self,
        model: Model,
        evaluator: Evaluator,
        storage: Storage,
        request: Request,
        units: int,
        *,
        prompts: Prompts | None = None,
        notice: Notice,
    ) -> None:
        self.shared, self.storage = ray.put((model.to("cpu"), evaluator, prompts)), storage
        # A second thread answers while the first one draws.
        options = {"num_cpus": 1, "num_gpus": int(request.use_gpu), "max_concurrency": 2}
        self.kind = ray.remote(_SamplingActor).options(**options)
        self.needs = {"CPU": 1.0, **({"GPU": 1.0} if request.use_gpu else {})}
        self.count = min(request.actors or processors(use_gpu=request.use_gpu), units)
        self.notice, self.patience_s = notice, request.patience_s
        self.actors, self.idle, self.lost = list[Any](), list[Any](), 0
        self.starting: dict[Any, Any] = {}
        self.asked: dict[Any, tuple[Any, float]] = {}
        self.looked = time.monotonic()
        for _ in range(self.count):
            self._start()

    def __enter__(self) -> SamplingActors:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        """Start an actor, when the cluster has room for it."""
        actor = self.kind.remote(self.shared, self.storage)
        self.actors.append(actor)
        self.starting[actor.ready.remote()] = actor

    def _replace(self, error: RayActorError) -> None:
        """Start an actor in the place of one whose node or process is lost.

        Raises:
            RayActorError: too many were lost.
        """
        self.lost += 1
        if self.lost > RETRIES * self.count:
            raise error
        self._start()

    def _end_silent(self, busy: Iterable[Any]) -> None:
        """End those that have not answered for `patience_s`: what they were asked for then fails, and is done again.

        A process that was stopped, or a node that hangs, would be waited for without end: Ray notices only those that
        are gone.

        Args:
            busy: actors that have a call.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY_S:
            return
        self.looked, before, self.asked = now, self.asked, {}
        for actor in busy:
            question, since = before.get(actor) or (actor.ready.remote(), now)
            if ray.wait([question], timeout=0)[0]:
                question, since = actor.ready.remote(), now
            if now - since < self.patience_s:
                self.asked[actor] = question, since
                continue
            self.notice(
                f"an actor that draws samples has not answered for {now - since:.0f} s: its process or its node stands "
                "still; it is ended, and another does its work"
            )
            ray.kill(actor)

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (place in `calls`, result) of a method called with each of these arguments, as they finish.

        Only an actor that has started gets a call, so a cluster with room for one of them has it do all the work.

        Raises:
            TaskError: no node of the cluster can hold an actor.
        """
        waiting, running = deque(enumerate(calls)), dict[Any, tuple[int, Any]]()
        began, said, short_since = time.monotonic(), False, None
        while waiting or running:
            while waiting and self.idle:
                actor = self.idle.pop()
                place, arguments = waiting.popleft()
                running[getattr(actor, method).remote(*arguments)] = place, actor
            done, _ = ray.wait([*running, *self.starting], num_returns=1, timeout=LOOK_EVERY_S)
            for ref in done:
                call = running.pop(ref, None)
                actor = self.starting.pop(ref) if call is None else call[1]
                try:
                    result = ray.get(ref)
                except RayActorError as error:
                    if call is not None:
                        waiting.appendleft((call[0], calls[call[0]]))
                    self._replace(error)
                    continue
                self.idle.append(actor)
                if call is not None:
                    yield call[0], result
            self._end_silent([actor for _, actor in running.values()])
            if done or running or self.idle:
                short_since = None
                continue
            now = time.monotonic()
            if fits(self.needs):
                if not said and now - began >= 2 * LOOK_EVERY_S:
                    said = True
                    self.notice("it waits for its turn: all processors of the Ray cluster are in use")
                continue
            short_since = now if short_since is None else short_since
            if now - short_since >= self.patience_s:
                asked = " and ".join(f"{need:g} {name}" for name, need in self.needs.items())
                raise TaskError(
                    f"an evaluation needs {asked} on one node, and for {self.patience_s:.0f} s no node of the Ray "
                    "cluster has had that: add such a node, or lower cluster.gpus_per_worker"
                )


class _SamplingActor:
    """An actor with a model and an evaluator."""

    def __init__(self, shared: tuple[Model, Evaluator, Prompts | None], storage: Storage) -> None:
        torch.set_num_threads(1)
        self.device = task_device()
        model, self.evaluator, self.prompts = shared
        judge = None if self.prompts is None else self.prompts.matcher
        self.match = None if judge is None else judge.encoder.to(self.device)
        self.judges = [self.evaluator.digest[:16], *([] if judge is None else [judge.digest[:16]])]
        self.model = model.to(self.device)
        self.encode = self.evaluator.encoder.to(self.device)
        self.storage = storage

    def ready(self) -> None:
        """Answer: the actor has started, and its process runs."""

    def draw(self, unit: Unit, plan: Plan) -> dict[str, NDArray[Any]]:
        """Return the rows of a batch of samples, see `Drawn`; what is stored is not made again."""
        named = f"rows-{'-'.join(self.judges)}-{unit.first:09d}.safetensors"
        try:
            return load(self.storage.read(join(unit.folder, named)))
        except NotFoundError:
            images, finite = self._images(unit, plan)
        # Drawn and stored images may differ in the stride of a single channel, by which convolutions choose how to add.
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        encoded = self.encode(levels.to(self.device))
        rows = {"features": encoded.features.numpy(), "pixels": thumbnails(levels), "finite": finite}
        if encoded.probabilities is not None:
            rows["probabilities"] = encoded.probabilities.numpy()
        if self.match is not None:
            rows["vectors"] = self.match(levels.to(self.device)).features.numpy()
        self.storage.write(join(unit.folder, named), save(rows))
        return rows

    def _images(self, unit: Unit, plan: Plan) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the samples of a unit, uint8 [N, H, W, C], and which are finite: the stored ones, else new ones."""
        try:
            return unpack_samples(self.storage.read(unit.shard), self.model.spec.shape[0])
        except NotFoundError:
            pass
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
        self.storage.write(unit.shard, pack_samples(levels, unit.labels, unit.first, finite))
        return levels, finite

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


def processors(*, use_gpu: bool) -> int:
    """Return how many processors or GPUs the Ray cluster has, in use or not."""
    return max(int(ray.cluster_resources().get("GPU" if use_gpu else "CPU", 1)), 1)


def draw(
    actors: SamplingActors, plan: Plan, evaluator: Evaluator, model: Model, folder: Path, progress: Progress
) -> Drawn:
    """Draw the samples of a plan, and return their rows in files below `folder`."""
    channels, height, width = model.spec.shape
    small = (channels, *thumbnail_size(height, width))
    units = plan.units()
    features = Rows(folder / "features", (evaluator.encoder.width,), np.float32)
    pixels = Rows(folder / "pixels", small, np.uint8)
    finite = Rows(folder / "finite", (), np.bool_)
    optional: dict[str, Rows] = {}
    done, total = 0, len(plan.seeds) * plan.n
    for place, rows in actors.map("draw", [(unit, plan) for unit in units]):
        unit = units[place]
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
    return Drawn(features, optional.get("probabilities"), pixels, finite, optional.get("vectors"))


def read_images(plan: Plan, storage: Storage, channels: int, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return samples of the first noise seed by their numbers [N], uint8 [N, H, W, C], from their shards."""
    found: dict[int, NDArray[np.uint8]] = {}
    for unit in plan.units():
        inside = [int(number) for number in chosen if unit.first <= number < unit.stop]
        if unit.seed == plan.seeds[0] and inside:
            images, _ = unpack_samples(storage.read(unit.shard), channels)
            found |= {number: images[number - unit.first] for number in inside}
    return np.stack([found[int(number)] for number in chosen])
