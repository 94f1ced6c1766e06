"""The training images that are nearest to a drawn sample, and whether it is taken for a copy of one.

The distance is that of `ddpm evaluate`, by the pixels of small copies. What counts is not the distance to the nearest
training image but that over the mean distance to the next ones, and how many real images that the model was not
trained on are as near.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.image_size import height_width
from ddpm.memorisation import relative_distance
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.evaluation.images import THUMBNAIL, thumbnails, to_levels
from pipelines.evaluation.plots import label_grid
from pipelines.presentation import html
from pipelines.presentation.blocks import Charts, Code, Gallery, Image, Section, Table, Text, Words
from pipelines.presentation.charts import Chart, Point, Series
from pipelines.presentation.errors import ConfigError
from pipelines.presentation.images import Picture
from pipelines.provenance.find import Match, Query
from pipelines.provenance.neighbours import AT_ONCE, NEIGHBOURS, Found, NearestTar, small_copies
from pipelines.provenance.prints import read_images
from pipelines.provenance.trained import UnknownOrderError, read_trainings, times_before
from pipelines.shards.audit.recorded import (
    ByteCounter,
    TarReading,
    read_sidecar,
    stored_shards,
)
from pipelines.shards.erased import erased_samples, stream_before
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.ingest.encode import ImageFormat, encode_image
from pipelines.shards.joined import TRAIN
from pipelines.shards.members import decode_pixels
from pipelines.shards.quarantine import Quarantine, read_quarantine
from pipelines.shards.read import opened_split, spread_positions
from pipelines.storage import Storage

TEST = "test"
HELD_OUT = 500
"""Test images that are compared in the same way."""
LEVEL = 0.01
"""A sample is taken for a copy where no larger share of test images is as near to a training image."""
LEAST = round(1 / LEVEL) - 1
"""Test images without which nothing can be said."""
PLACES = 5
"""Samples with the same picture that are named on the page."""


@dataclass(frozen=True, eq=False)
class NearImage:
    """A training image near a sample.

    Attributes:
        distance: root mean square difference of small copies in grey levels of 0..255.
        mirrored: whether the sample was mirrored before it was compared.
        samples: all samples of the training data that are this picture.
        times: how often the model had been given one of them; None where that is not known.
        pixels: as it is stored, uint8 [H, W, C].
    """

    distance: float
    mirrored: bool
    samples: tuple[Match, ...]
    times: int | None
    pixels: NDArray[np.uint8]

    @property
    def named(self) -> str:
        """The picture in words: its first sample."""
        first = self.samples[0]
        return f"{first.key} of {first.shard}"

    @property
    def counted(self) -> str:
        """How often the model had been given it, in words."""
        return "how often is not known" if self.times is None else f"given {self.times:,} time{'s' * (self.times != 1)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the image as JSON types, without its pixels."""
        names = ("uri", "shard", "index", "key")
        samples = [{name: getattr(each, name) for name in names} for each in self.samples]
        return {"distance": self.distance, "mirrored": self.mirrored, "times": self.times, "samples": samples}


@dataclass(frozen=True, eq=False)
class Nearest:
    """The training images nearest to a sample of a model.

    Attributes:
        model: the reference.
        images_seen: by its checkpoint.
        sample: SHA-256 of the file.
        pixels: of the sample in the size of the training data, uint8 [H, W, C].
        images: the nearest training images, nearest first; equal ones are one.
        relative: distance to the nearest over the mean distance to the others; None where there are no others.
        held_out: the same of test images, float64 [H].
        searched: training images that were looked at.
        notes: what could not be looked at.
    """

    model: str
    images_seen: int
    sample: str
    pixels: NDArray[np.uint8]
    images: tuple[NearImage, ...]
    relative: float | None
    held_out: NDArray[np.float64]
    searched: int
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def as_near(self) -> int:
        """Number of test images that are as near to a training image as the sample."""
        return 0 if self.relative is None else int((self.held_out <= self.relative).sum())

    @property
    def level(self) -> float:
        """Probability with which a real image that is not in the training data is as near to one as the sample."""
        return (self.as_near + 1) / (len(self.held_out) + 1)

    @property
    def copy(self) -> bool | None:
        """Whether the sample is taken for a copy of the nearest training image; None where that cannot be said."""
        return None if self.relative is None or len(self.held_out) < LEAST else self.level <= LEVEL

    def verdict(self) -> str:
        """Return the finding in words."""
        if self.relative is None:
            return "not known: there are fewer than two different training images"
        if self.copy is None:
            return f"not known: that needs {LEAST} test images, and there are {len(self.held_out):,}"
        near = f"{self.as_near:,} of {len(self.held_out):,} test images"
        if self.copy:
            return f"A COPY of {self.images[0].named}, {self.images[0].counted}: {near} are as near to a training image"
        return f"no copy: {near} are as near to a training image"

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON types."""
        return {
            "sample": self.sample,
            "model": self.model,
            "images_seen": self.images_seen,
            "copy": self.copy,
            "verdict": self.verdict(),
            "relative_distance": self.relative,
            "level": self.level,
            "test_images": len(self.held_out),
            "training_images": self.searched,
            "nearest": [each.to_dict() for each in self.images],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield what was found, in words."""
        yield self.verdict()
        for image in self.images:
            yield f"{image.samples[0].uri}: {image.named}{_others(image)}: {_how_near(image)}, {image.counted}"
        yield from self.notes

    def page(self) -> str:
        """Return the finding as an HTML page, the sample beside the training images."""
        subtitle: Words = ["of ", Code(self.model), f", which had been given {self.images_seen:,} images"]
        return html.page("Nearest training images", subtitle, list(_sections(self)), "Made by ddpm seen --of.")


def _others(image: NearImage) -> str:
    more = len(image.samples) - 1
    return f" and {more:,} other sample{'s' * (more != 1)} of the same picture" if more else ""


def _how_near(image: NearImage) -> str:
    return f"distance {image.distance:.1f}{' mirrored' if image.mirrored else ''}"


def _sections(found: Nearest) -> Iterator[Section]:
    tiles = [_shown(found.pixels, "The sample", "the sample")]
    tiles += [
        _shown(image.pixels, f"Training image {image.named}", f"{image.named}: {_how_near(image)}, {image.counted}")
        for image in found.images
    ]
    verdict = found.verdict()
    how = (
        f"The sample and the training images nearest to it, nearest first, among {found.searched:,}. The distance is "
        f"the root mean square difference in grey levels (0 to 255) of small copies of at most {THUMBNAIL} pixels, "
        "up to mirroring and a shift by a pixel."
    )
    yield Section(
        "nearest",
        "The sample and its nearest training images",
        [Text(f"{verdict[0].upper()}{verdict[1:]}."), Gallery(tiles)],
        how,
    )
    rows = [
        (
            _places(image),
            f"{image.distance:.2f}",
            "yes" if image.mirrored else "no",
            "not known" if image.times is None else f"{image.times:,}",
        )
        for image in found.images
    ]
    how = "How often the model had been given each picture, by the order of its samples, wherever it is in the data."
    head = ("sample", "distance", "mirrored", "times")
    yield Section("counts", "How often the model was given them", [Table(head, rows, frozenset({1, 3}))], how)
    if found.relative is not None and len(found.held_out) > 1:
        ordered = np.sort(found.held_out)
        share = (np.arange(len(ordered)) + 1) / len(ordered)
        curve = [Point(float(x), float(y)) for x, y in zip(ordered, share, strict=True)]
        here = [Point(found.relative, found.as_near / len(ordered))]
        series = [Series("test images", curve), Series("the sample", here, "marks")]
        x, y = "distance to the nearest over that to the next ones", "share of test images as near"
        how = (
            "For each image, its distance to the nearest training image over the mean distance to the next "
            f"{NEIGHBOURS - 1}. A sample is taken for a copy where at most {LEVEL:.0%} of real images that the model "
            "was not trained on are as near; so is one in a hundred honest samples. Ask of several."
        )
        chart = Chart("Relative distance", x, y, series)
        yield Section("test-images", "Is that unusually near?", [Charts([chart])], how)
    if found.notes:
        yield Section("notes", "What could not be looked at", [Text(note) for note in found.notes])


def _shown(pixels: NDArray[np.uint8], alt: str, caption: str) -> Image:
    return Picture.of_pixels(label_grid(pixels[None], 1)).shown(alt, caption)


def _places(image: NearImage) -> Words:
    words: list[str | Code] = []
    for each in image.samples[:PLACES]:
        words += [", " if words else "", Code(f"{each.uri}/{each.shard}"), f" {each.key}"]
    more = len(image.samples) - PLACES
    return [*words, f" and {more:,} more"] if more > 0 else words


@dataclass(frozen=True, eq=False)
class _Part:
    """A dataset that a model was trained on, and which of its samples cannot be compared."""

    dataset: Dataset
    left_out: Mapping[str, Collection[int] | None]
    notes: tuple[str, ...]


def nearest(query: Query, resolved: Resolved, config: Config, reading: Callable[[], TarReading]) -> Nearest:
    """Find the training images that are nearest to a sample of a model.

    Args:
        query: the sample, a picture.
        resolved: the model.
        config: of the storage root, below which its checkpoints say in which order it read.
        reading: returns how tars are read.

    Raises:
        ConfigError: the query is no picture, or the model does not say what it was trained on.
        DatasetError: its data are gone or damaged.
        StorageError: the store does not answer.
    """
    if query.data is None:
        raise ConfigError(f"--of compares a picture, and {query.named} is none: give a file or an address")
    storage, spec = Storage.of(config), resolved.model.spec
    if "dataset_uri" not in spec.lineage:
        raise ConfigError(
            f"{resolved.reference} does not say what it was trained on: give a model of a run or of the registry"
        )
    parts = [_opened(uri, digest, storage) for uri, digest in _data_of(spec.lineage)]
    form = ImageFormat(parts[0].dataset.image_size, parts[0].dataset.channels)
    pixels = encode_image(query.data, form).pixels
    held_out = _test_images(str(spec.lineage["dataset_uri"]), form, config)
    images = np.concatenate([small_copies([pixels]), held_out])
    found = Found.nothing(len(images))
    for part in parts:
        left_out = part.left_out
        work = NearestTar(part.dataset.uri, storage, left_out, form.size, form.channels, images)
        for one in _search(part.dataset, work, storage, reading()):
            found += one
    if not found.count:
        raise DatasetError(f"{', '.join(part.dataset.uri for part in parts)}: none of the training images is there")
    k = int(np.isfinite(found.distance[0]).sum())
    relative = relative_distance(torch.from_numpy(found.distance[:, :k])).numpy() if k > 1 else None
    seen = int(spec.lineage.get("images_seen", 0))
    samples = _samples(found, k, storage, {part.dataset.uri: part.dataset for part in parts})
    times, unknown = _times([matches for matches, _ in samples], str(spec.lineage.get("run_id")), seen, config)
    began = spec.lineage.get("init_from")
    notes = [note for part in parts for note in part.notes] + unknown
    notes += [f"it began from {began}, whose training data were not compared"] if began else []
    shown = zip(found.distance[0, :k].tolist(), found.mirrored[0, :k].tolist(), samples, times, strict=True)
    return Nearest(
        model=resolved.reference,
        images_seen=seen,
        sample=query.named,
        pixels=pixels,
        images=tuple(NearImage(far, mirrored, there, count, of) for far, mirrored, (there, of), count in shown),
        relative=None if relative is None else float(relative[0]),
        held_out=np.zeros(0) if relative is None else relative[1:],
        searched=found.count,
        notes=tuple(notes),
    )


def _data_of(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (address, digest of the stream) of each dataset that a model was trained on."""
    sources = [(str(each["uri"]), str(each["stream_digest"])) for each in lineage.get("sources") or ()]
    return sources or [(str(lineage["dataset_uri"]), str(lineage.get("stream_digest", "")))]


def _opened(uri: str, digest: str, storage: Storage) -> _Part:
    """Return a dataset as a model was trained on it, as far as it is there."""
    found = stream_before(uri, digest, storage)
    notes = [] if found else [f"{uri} has changed since it was trained on: its images are compared as they are now"]
    dataset, quarantine = found or (read_dataset(uri, storage), read_quarantine(uri, storage))
    left_out: dict[str, Collection[int] | None] = dict(_out(quarantine))
    names = set(dataset.shards(TRAIN).names)
    gone = [place for place in erased_samples(dataset, storage) if place[0] in names]
    for shard, i in gone:
        already = left_out.get(shard, ())
        left_out[shard] = None if already is None else {*already, i}
    if gone:
        notes.append(f"{len(gone):,} image{'s' * (len(gone) != 1)} of {uri} cannot be compared: erased since")
    return _Part(dataset, left_out, tuple(notes))


def _out(quarantine: Quarantine | None) -> Iterator[tuple[str, frozenset[int] | None]]:
    for shard, samples in ({} if quarantine is None else quarantine.by_shard).items():
        yield shard, None if samples is None else frozenset(samples)


def _test_images(uri: str, form: ImageFormat, config: Config) -> NDArray[np.uint8]:
    """Return small copies of test images of a dataset, uint8 [H, C, h, w]; none where it has no test split."""
    storage = Storage.of(config)
    dataset = read_dataset(uri, storage)
    if TEST not in dataset.splits or (dataset.image_size, dataset.channels) != (form.size, form.channels):
        return small_copies([np.zeros((*height_width(form.size), form.channels), np.uint8)])[:0]
    with opened_split(dataset, TEST, storage, config.data.cache_dir, config.data.cache_gib) as reader:
        chosen = spread_positions(reader.total, HELD_OUT)
        parts = [chosen[first : first + AT_ONCE] for first in range(0, len(chosen), AT_ONCE)]
        return np.concatenate([thumbnails(to_levels(reader.at(part).images)) for part in parts])


def _search(dataset: Dataset, work: NearestTar, storage: Storage, reading: TarReading) -> Iterator[Found]:
    """Yield what is found in each shard of the train split."""
    _, tars = stored_shards(dataset, [TRAIN], storage)
    total = sum(tar.entry.size for tar in tars)
    counter = ByteCounter(total, reading.progress)
    reading.notice(f"{len(tars):,} tar{'s' * (len(tars) != 1)}, {total / 2**20:,.1f} MiB, {reading.runner.where}")
    for _, found in reading.runner(work, tars, counter.add):
        yield found


def _samples(
    found: Found, k: int, storage: Storage, datasets: Mapping[str, Dataset]
) -> list[tuple[tuple[Match, ...], NDArray[np.uint8]]]:
    """Return for each picture near the first image its samples, and its pixels [H, W, C]."""
    return [_picture(sorted(found.places[int(digest)]), storage, datasets) for digest in found.digest[0, :k]]


def _picture(
    places: Sequence[tuple[str, str, int]], storage: Storage, datasets: Mapping[str, Dataset]
) -> tuple[tuple[Match, ...], NDArray[np.uint8]]:
    matches, pixels = list[Match](), None
    for (uri, name), group in groupby(places, key=itemgetter(0, 1)):
        dataset, indices = datasets[uri], [i for _, _, i in group]
        shard = next(each for each in dataset.shards(TRAIN) if each.name == name)
        index = read_sidecar(shard, uri, storage)
        matches += [Match(uri, TRAIN, name, i, index.keys[i], "near") for i in indices]
        if pixels is None:
            ((_, member, data),) = read_images(index.select(indices[:1]), shard.address(uri), storage)
            pixels = decode_pixels({member: data}, dataset.image_size, dataset.channels)
    assert pixels is not None
    return tuple(matches), pixels


def _times(
    pictures: Sequence[Sequence[Match]], run_id: str, images_seen: int, config: Config
) -> tuple[list[int | None], list[str]]:
    """Return how often a model had been given each picture, and why that is not known."""
    trainings = [each for each in read_trainings(config.storage.root, Storage.of(config)) if each.run_id == run_id]
    if not trainings:
        note = "no checkpoint of its training is stored, so it is not known how often it was given these images"
        return [None] * len(pictures), [note]
    matches = [match for picture in pictures for match in picture]
    owner = [number for number, picture in enumerate(pictures) for _ in picture]
    try:
        occurrences = trainings[0].occurrences(matches, Storage.of(config))
    except UnknownOrderError as error:
        return [None] * len(pictures), [f"how often it was given these images is not known: {error}"]
    return [
        times_before([each for each in occurrences if owner[each.sample] == number], images_seen)
        for number in range(len(pictures))
    ], []
