"""Samples of a model, drawn by actors of a Ray cluster and kept as WebDataset shards.

What is drawn is decided by a `SamplePlan` alone: image i of a noise seed has the label and the noise of its number,
and is drawn in the batch that holds its number, so any number of actors gives the same images. Each batch is stored
when it is ready, and a repetition after an interruption draws only those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.generate import Sampling
from ddpm.model import Model
from pipelines.config import Config
from pipelines.evaluation.images import unpack_samples
from pipelines.evaluation.prompts import PromptRows, Prompts
from pipelines.evaluation.real import Real
from pipelines.evaluation.rows import Rows
from pipelines.presentation.progress import Notice
from pipelines.signing import Authority, Derived, SignatureError
from pipelines.storage import Storage, StorageError, join, layout

RECORD_EVERY_S = 1.0


@dataclass(frozen=True)
class SampleSpec:
    """How many samples of a model are drawn, from which seeds and in which batches.

    Attributes:
        n: samples of each noise seed; as many as the test split has, where None.
        seeds: seeds of the noise.
        batch_size: images that are drawn together.
        likelihood_images: test images whose likelihood is computed too; 0 for none.
        root: folder of all evaluations.
    """

    n: int | None
    seeds: tuple[int, ...]
    batch_size: int
    likelihood_images: int
    root: str

    @classmethod
    def of(cls, config: Config) -> SampleSpec:
        """Return what the configuration asks of an evaluation."""
        asked = config.evaluation
        return cls(
            n=asked.n,
            seeds=tuple(range(asked.seed, asked.seed + asked.seeds)),
            batch_size=asked.batch_size,
            likelihood_images=asked.likelihood_images,
            root=join(config.storage.root, layout.EVALUATIONS),
        )


@dataclass(frozen=True)
class SampledModel:
    """A model that draws samples with given settings.

    Attributes:
        model: with the guiding networks that its settings need.
        digest: of all that draws, under which its samples are kept.
        sampling: the settings that it is drawn with.
        prompts: captions that its samples are drawn from; None for a model that is not on text, or data without them.
    """

    model: Model
    digest: str
    sampling: Sampling
    prompts: Prompts | None = None

    def plan(self, request: SampleSpec, real: Real) -> SamplePlan:
        """Return which samples of it are asked for, to be compared with real images."""
        return SamplePlan(
            self.digest,
            self.sampling,
            request.n or real.test.count,
            request.seeds,
            real.train.class_counts if self.model.spec.classes else (),
            request.batch_size,
            request.root,
            None if self.prompts is None else self.prompts.plan,
        )


@dataclass(frozen=True)
class SamplePlan:
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

    @property
    def folder(self) -> str:
        """The folder of the samples: plans that differ in anything that decides an image have another one."""
        decisive = [self.model_digest, self.sampling.key(), self.n, self.class_counts, self.batch_size]
        decisive += [] if self.prompts is None else [self.prompts.digest]
        return join(self.root, hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:20])

    def stored(self, storage: Storage) -> Derived:
        """Return the folder of the samples with its record."""
        return Derived(storage, self.folder, layout.SAMPLES, f"{self.folder.rsplit('/', 1)[-1]}/{layout.SAMPLES}")

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
                units.append(Unit(seed, first, stop, of_unit[0], place * self.n + first, of_unit[1]))
        return units


@dataclass(frozen=True)
class Unit:
    """A batch of samples.

    Attributes:
        seed: of the noise.
        first, stop: numbers of its images.
        labels: of its images, int64 [stop - first]; None without classes.
        row: place of its first image among those of all seeds.
        captions: places of the captions of its images, int64 [stop - first]; None without prompts.
    """

    seed: int
    first: int
    stop: int
    labels: NDArray[np.int64] | None
    row: int
    captions: NDArray[np.int64] | None = None

    def path(self, name: str) -> str:
        """Return where a file of it lies, below the folder of the plan."""
        return f"seed-{self.seed}/{name}"

    @property
    def shard(self) -> str:
        """Name of the file of its images."""
        return f"samples-{self.first:09d}.tar"

    @property
    def name(self) -> str:
        """Its name among those of the plan."""
        return f"seed-{self.seed}/{self.first:09d}"

    def rows(self, judges: Sequence[str]) -> str:
        """Return the name of the file of what these evaluators say of its images, see `DrawnRows`."""
        return f"rows-{'-'.join(judges)}-{self.first:09d}.safetensors"


@dataclass(frozen=True)
class DrawnUnit:
    """The answer of an actor for one unit of work.

    Attributes:
        rows: of its samples, see `DrawnRows`.
        files: name of each stored file of it that was read or written -> its SHA-256.
        changed: names of the stored files that were not what was believed, and were made again.
    """

    rows: dict[str, NDArray[Any]]
    files: dict[str, str]
    changed: tuple[str, ...]


class SampleFiles:
    """The stored files of a plan's samples that are believed, in a signed record beside them.

    Scores rest on what is stored, so that nobody else may have written it.

    Args:
        authority: who signs, and who is believed; None to believe nothing that is stored, and to sign nothing.
        notice: called where what is stored is not believed.
    """

    def __init__(self, plan: SamplePlan, storage: Storage, authority: Authority | None, notice: Notice) -> None:
        self.plan, self.authority, self.notice = plan, authority, notice
        self.stored = plan.stored(storage)
        self._written, self._new = time.monotonic(), False
        try:
            self.digests = self._recorded()
        except SignatureError as error:
            notice(f"the samples in {plan.folder} are drawn again: who has drawn them is not known ({error})")
            self.digests = {}

    def _recorded(self) -> dict[str, dict[str, str]]:
        """Return unit -> name of a file -> its SHA-256.

        Raises:
            SignatureError: nobody who is believed has signed the record.
        """
        found = None if self.authority is None else self.stored.find(self.authority.trust)
        return {} if found is None else dict(found["units"])

    def of(self, unit: Unit) -> dict[str, str]:
        """Return name -> SHA-256 of the files of a unit."""
        return self.digests.get(unit.name, {})

    def add(self, unit: Unit, drawn: DrawnUnit) -> None:
        """Note the files of a unit, and write the record now and then."""
        for name in drawn.changed:
            self.notice(f"{join(self.plan.folder, unit.path(name))} was made again: it is gone, or not what was stored")
        self.add_files({unit.name: drawn.files})
        if time.monotonic() - self._written >= RECORD_EVERY_S:
            self.write()

    def add_files(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Note files by unit and name."""
        for unit, files in digests.items():
            known = self.digests.get(unit, {})
            self._new |= not files.items() <= known.items()
            self.digests[unit] = known | dict(files)

    def signed(self, authority: Authority) -> None:
        """Write the record of files that were drawn where nobody could sign it."""
        mine = SampleFiles(self.plan, self.stored.storage, authority, self.notice)
        mine.add_files(self.digests)
        mine.write()

    def write(self) -> None:
        """Write the record, with what others have added meanwhile, unless nothing is new."""
        self._written = time.monotonic()
        if self.authority is not None and self._new:
            with suppress(SignatureError):  # a record by somebody else gives way to this one
                for unit, files in self._recorded().items():
                    self.digests[unit] = files | self.digests.get(unit, {})
            self.stored.record({"units": self.digests}, self.authority.signer)
            self._new = False


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
class DrawnRows:
    """Rows of all samples of a plan, one noise seed after another, in files.

    Attributes:
        features: float32 [seeds * n, width].
        pixels: small copies of the samples, uint8 [seeds * n, C, h, w].
        finite: whether all numbers of a sample were finite before they were rounded, bool [seeds * n].
        probabilities: float32 [seeds * n, C]; None for an evaluator without classes.
        vectors: of the samples, as a matcher of captions gives them, float32 [seeds * n, J]; None without one.
    """

    features: Rows
    pixels: Rows
    finite: Rows
    probabilities: Rows | None = None
    vectors: Rows | None = None


def read_images(files: SampleFiles, channels: int, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return samples of the first noise seed by their numbers [N], uint8 [N, H, W, C], from their shards.

    Raises:
        StorageError: a shard is gone, or is not what was drawn.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    for unit in files.plan.units():
        inside = [int(number) for number in chosen if unit.first <= number < unit.stop]
        if unit.seed == files.plan.seeds[0] and inside:
            data = files.stored.read(unit.path(unit.shard), files.of(unit).get(unit.shard))
            if data is None:
                raise StorageError(
                    f"{join(files.plan.folder, unit.path(unit.shard))} is gone, or not what was drawn: delete "
                    f"{files.plan.folder}, and the samples are drawn again"
                )
            images, _ = unpack_samples(data, channels)
            found |= {number: images[number - unit.first] for number in inside}
    return np.stack([found[int(number)] for number in chosen])
