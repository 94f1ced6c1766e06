"""What a training was trained on, by what its checkpoints record: which samples came at which ordinals.

Nothing is logged while a training runs. The order of its samples is a function of the dataset, its quarantine, the seed
and two settings, all of which every checkpoint records, and the function is inverted here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddpm.noise import Purpose, uniform
from pipelines.checkpoints import ModelError, epoch_of
from pipelines.checkpoints.files import CheckpointState
from pipelines.config import timesteps_of
from pipelines.presentation.errors import ConfigError, PipelineError
from pipelines.provenance.find import Match
from pipelines.shards.erased import stream_before
from pipelines.shards.index import Dataset, DatasetError, MixtureSource
from pipelines.shards.joined import TRAIN
from pipelines.shards.mixture import MixtureOrder
from pipelines.shards.order import Ints, SampleOrder
from pipelines.shards.quarantine import Quarantine, kept_places, kept_shards
from pipelines.shards.stream import mixture_order, sample_order
from pipelines.storage import NotFoundError, Storage, join, layout


class UnknownOrderError(PipelineError):
    """The order in which a training has read its samples cannot be computed any more; says why."""


@dataclass(frozen=True)
class Occurrence:
    """A time that a training was given a sample.

    Attributes:
        ordinal: position in its stream, from 0; a checkpoint at `images_seen` has been trained on those below that.
        sample: index of the match.
        mirrored: whether it was given mirrored.
        label_dropped: whether its label and caption were left out.
        timestep: at which it was trained on, of 1..T; None where that depended on the losses before, or where the
            training draws no timesteps.
        source: of a mixture, the name of the source.
    """

    ordinal: int
    sample: int
    mirrored: bool
    label_dropped: bool
    timestep: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a training that is stored.

    Attributes:
        address: of its folder.
        images_seen: the ordinal at which it was taken.
        published: whether it is a published copy.
    """

    address: str
    images_seen: int
    published: bool


@dataclass(frozen=True)
class Training:
    """A training, by what its newest checkpoint records.

    Attributes:
        run: name of the run.
        run_id: of its MLflow run; None in a run of an early release.
        identity: the settings that decide its losses, flat.
        lineage: the origin that is recorded with the model.
        stream_digests: digests of its data, of the oldest checkpoint that is stored first; several where the data were
            changed.
        kept: its checkpoints.
    """

    run: str
    run_id: str | None
    identity: Mapping[str, Any]
    lineage: Mapping[str, Any]
    stream_digests: tuple[str, ...]
    kept: tuple[Kept, ...]

    @classmethod
    def read(cls, run: str, folders: Sequence[str], storage: Storage) -> Training | None:
        """Return the training of a run; None where none of its checkpoints can be read.

        Args:
            folders: addresses of its checkpoints and of their published copies.
        """
        found = []
        for address in folders:
            try:
                state = CheckpointState.from_json(storage.read(join(address, layout.TRAINING_STATE)), address)
            except (ModelError, NotFoundError):  # of another release, or deleted meanwhile
                continue
            parent, _, name = address.rpartition("/")
            epoch = epoch_of(layout.CHECKPOINT_PREFIX + name.removeprefix(layout.CHECKPOINT_PREFIX))
            kept = Kept(address, state.images_seen, published=parent.endswith(f"/{layout.PUBLISHED}"))
            found.append((epoch, state.images_seen, kept.published, kept, state))
        if not found:
            return None
        found.sort(key=lambda each: each[:3])
        *_, last, newest = found[-1]
        lineage = json.loads(storage.read(join(last.address, layout.MODEL))).get("lineage") or {}
        digests = dict.fromkeys(state.stream_digest for *_, state in found)
        kept_all = tuple(kept for *_, kept, _ in found)
        return cls(run, lineage.get("run_id"), newest.identity, lineage, tuple(digests), kept_all)

    @property
    def images_seen(self) -> int:
        """The ordinal up to which it has been trained, by its newest checkpoint."""
        return max(each.images_seen for each in self.kept)

    @property
    def data(self) -> list[str]:
        """Addresses of the datasets that it is trained on."""
        return [source.uri for source in self.sources] or [str(self.lineage["dataset_uri"])]

    @cached_property
    def sources(self) -> tuple[MixtureSource, ...]:
        """The sources of a mixture; empty for one dataset."""
        return tuple(
            MixtureSource(
                each["name"],
                each["uri"],
                each["stream_digest"],
                {int(first): weight for first, weight in each["weights"].items()},
                (),
            )
            for each in self.lineage.get("sources", ())
        )

    def occurrences(self, matches: Sequence[Match], storage: Storage) -> list[Occurrence]:
        """Return every time that the training was given one of these samples, in order.

        Args:
            matches: samples of its datasets; those of splits other than "train" are never given.

        Raises:
            UnknownOrderError: the data are not what they were, or were changed within the training.
            DatasetError: a dataset is damaged.
        """
        if len(self.stream_digests) > 1:
            raise UnknownOrderError(
                f"the data of run '{self.run}' were changed while it was trained (data.allow_changed=true), and no "
                "checkpoint says at which image"
            )
        order, parts = self._opened(storage)
        first, found = 0, []
        for number, (dataset, quarantine) in enumerate(parts):
            names = {name: at for at, name in enumerate(dataset.shards(TRAIN).names)}
            own = [at for at, match in enumerate(matches) if match.uri == dataset.uri and match.split == TRAIN]
            shards = np.array([names[matches[at].shard] for at in own], dtype=np.int64)
            indices = np.array([matches[at].index for at in own], dtype=np.int64)
            left, kept, places = kept_places(dataset, TRAIN, quarantine, shards, indices)
            which, ordinals = order.occurrences(kept + first, places, self.images_seen)
            source = self.sources[number].name if self.sources else None
            found += self._described(ordinals, [own[left[at]] for at in which], source)
            first += len(kept_shards(dataset, TRAIN, quarantine))
        return sorted(found, key=lambda each: each.ordinal)

    def _opened(self, storage: Storage) -> tuple[SampleOrder | MixtureOrder, list[tuple[Dataset, Quarantine | None]]]:
        lanes, window, seed = (int(self.identity[name]) for name in ("data.lanes", "data.window", "seed"))
        if not self.sources:
            dataset, quarantine = self._part(str(self.lineage["dataset_uri"]), self.stream_digests[0], storage)
            order = sample_order(dataset, TRAIN, quarantine, lanes=lanes, window=window, seed=seed)
            return order, [(dataset, quarantine)]
        parts = [self._part(source.uri, source.digest, storage) for source in self.sources]
        counts = [kept_shards(dataset, TRAIN, quarantine).samples for dataset, quarantine in parts]
        return mixture_order(self.sources, counts, lanes=lanes, window=window, seed=seed), parts

    def _part(self, uri: str, digest: str, storage: Storage) -> tuple[Dataset, Quarantine | None]:
        try:
            found = stream_before(uri, digest, storage)
        except (DatasetError, NotFoundError) as error:
            raise UnknownOrderError(f"run '{self.run}' was trained on {uri}, which cannot be read: {error}") from error
        if found is not None:
            return found
        raise UnknownOrderError(
            f"run '{self.run}' was trained on data with the digest {digest[:12]}, and {uri} has another one now, with "
            f"every quarantine that is kept in {layout.QUARANTINES}/: the dataset was written again, or a release that "
            "kept no quarantine has changed it"
        )

    def _described(self, ordinals: Ints, samples: Sequence[int], source: str | None) -> list[Occurrence]:
        """Return with what samples were given: functions of the seed and the ordinal."""
        n, seed = torch.from_numpy(ordinals), int(self.identity["seed"])
        flips = uniform(seed, n, Purpose.FLIP)[:, 0] < 0.5
        drops = uniform(seed, n, Purpose.LABEL_DROP)[:, 0] < float(self.identity["objective.label_drop"])
        mirrored = flips if self.identity["data.flip"] else torch.zeros_like(flips)
        timesteps = None
        with suppress(ConfigError):  # settings that this release does not have
            sampler = timesteps_of(self.identity)
            timesteps = None if sampler is None or sampler.learns else sampler.sample(n)[0].tolist()
        each = zip(ordinals, samples, mirrored, drops, timesteps or [None] * len(n), strict=True)
        return [
            Occurrence(int(ordinal), int(sample), bool(flip), bool(drop), timestep, source)
            for ordinal, sample, flip, drop, timestep in each
        ]


def times_before(occurrences: Sequence[Occurrence], images_seen: int) -> int:
    """Return how often a model at so many images had been given any of the samples."""
    return sum(each.ordinal < images_seen for each in occurrences)


def read_trainings(root: str, storage: Storage) -> list[Training]:
    """Return the trainings whose checkpoints lie below a root, in order of their names."""
    below, end = join(root, layout.RUNS), f"/{layout.TRAINING_STATE}"
    folders: dict[str, list[str]] = {}
    for entry in storage.scan(below):
        if entry.uri.endswith(end):
            folders.setdefault(entry.uri[len(below) + 1 :].partition("/")[0], []).append(entry.uri.removesuffix(end))
    found = (Training.read(run, folders[run], storage) for run in sorted(folders))
    return [training for training in found if training is not None]
