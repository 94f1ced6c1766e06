"""Actors of a Ray cluster that draw samples and compute likelihoods."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from safetensors.numpy import load, save

from ddpm.generate import to_uint8
from ddpm.model import Model
from pipelines.display import Notice, Progress
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.images import pack_samples, thumbnail_size, thumbnails, to_levels, unpack_samples
from pipelines.evaluation.likelihoods import Likelihood, likelihood
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import Drawn, DrawnUnit, Plan, Request, SampleFiles, Unit
from pipelines.ray_tasks import TaskError, fits
from pipelines.storage import NotFoundError, Storage, join

LOOK_EVERY_S = 5.0
RETRIES = 3
"""How often all actors may be lost, with their nodes, before an evaluation gives up."""


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
        self.judges = (self.evaluator.digest[:16], *(() if judge is None else (judge.digest[:16],)))
        self.model = model.to(self.device)
        self.encode = self.evaluator.encoder.to(self.device)
        self.storage = storage

    def ready(self) -> None:
        """Answer: the actor has started, and its process runs."""

    def draw(self, unit: Unit, plan: Plan, believed: Mapping[str, str]) -> DrawnUnit:
        """Return the rows of a batch of samples; what is stored, and believed, is not made again.

        Args:
            believed: name of a file -> its SHA-256.
        """
        name = unit.rows(self.judges)
        data = self._stored(unit, name, believed)
        if data is not None:
            return DrawnUnit(load(data), {name: believed[name]}, ())
        images, finite, files = self._images(unit, plan, believed)
        # Drawn and stored images may differ in the stride of a single channel, by which convolutions choose how to add.
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        encoded = self.encode(levels.to(self.device))
        rows = {"features": encoded.features.numpy(), "pixels": thumbnails(levels), "finite": finite}
        if encoded.probabilities is not None:
            rows["probabilities"] = encoded.probabilities.numpy()
        if self.match is not None:
            rows["vectors"] = self.match(levels.to(self.device)).features.numpy()
        data = save(rows)
        self.storage.write(join(unit.folder, name), data)
        files |= {name: hashlib.sha256(data).hexdigest()}
        return DrawnUnit(rows, files, tuple(name for name in (unit.shard, name) if name in believed))

    def _stored(self, unit: Unit, name: str, believed: Mapping[str, str]) -> bytes | None:
        """Return a stored file of a unit; None where it is not there, or not what is believed."""
        if name not in believed:
            return None
        try:
            data = self.storage.read(join(unit.folder, name))
        except NotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == believed[name] else None

    def _images(
        self, unit: Unit, plan: Plan, believed: Mapping[str, str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], dict[str, str]]:
        """Return the samples of a unit, uint8 [N, H, W, C], which are finite, and their file's SHA-256 by its name.

        They are the stored ones, else new ones.
        """
        data = self._stored(unit, unit.shard, believed)
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
        self.storage.write(join(unit.folder, unit.shard), data)
        return levels, finite, {unit.shard: hashlib.sha256(data).hexdigest()}

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
    actors: SamplingActors, files: SampleFiles, evaluator: Evaluator, model: Model, folder: Path, progress: Progress
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
