"""One shard of an ingest: its images, and the task that writes it on any machine.

A shard holds the images `first`, `first + 1`, … of its split. It is finished when its tar, its sidecar and its record
`ingest-progress/SHARD.json` are at the destination; the record has the checksums of both and the digest of the inputs.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import webdataset

from pipelines.environment.scratch import temporary_folder
from pipelines.shards.index import index_tar
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.encode import CaptionEncoder, ImageFormat, encode_image, pack_embeddings
from pipelines.shards.ingest.manifest import Manifest, SourceImage
from pipelines.shards.ingest.readers import UnreadableError, is_remote
from pipelines.shards.ingest.report import BadImage, PixelSums, ShardRecord
from pipelines.storage import NotFoundError, Storage, file_sha256, join, layout

LAYOUT_VERSION = 2  # of the members of a sample; with another version every shard is written again
PROBED = 32  # images from which the size of a sample is estimated
CAPTIONS_AT_ONCE = 64  # captions in one call of the text encoder
READS_AHEAD = 16  # images that are fetched from S3 ahead
TIMED = 8  # images from which the time of one is estimated
TAR_END = 6144  # two empty blocks, and on average half a record of 20 blocks
# Modification time of every member: fixed, because equal inputs must give equal digests, and an int, because a float
# adds a pax header of 1 KiB to every member.
MTIME = 0
WRITE_S = 7e-4
"""Seconds to compare an image with the others and to add it to a shard, beside those to read, decode and encode it."""

Tick = Callable[[int], None]
"""Called with a number of images that were just finished."""

# Tokenizers are not safe to use in two threads at a time.
_encoding = threading.Lock()


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, with the images `first`, `first + 1`, … of its split.

    Attributes:
        name: file name of the tar.
        key: digest of all inputs and settings that decide the bytes of the shard.
    """

    name: str
    first: int
    images: tuple[SourceImage, ...]
    key: str

    @property
    def split(self) -> str:
        """Return the split that the shard belongs to."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class IngestSettings:
    """The settings that all shards of an ingest share, pickled once for all tasks."""

    uri: str
    storage: Storage
    form: ImageFormat
    classes: tuple[str, ...]
    captioned: bool
    text_encoder: CaptionEncoder | None
    encoder_id: str | None
    filters: Filters = field(default_factory=Filters)

    def described(self) -> dict[str, Any]:
        """Return the settings as the report shows them."""
        known = self.encoder_id and self.encoder_id.partition(" ")[0]
        named: dict[str, Any] = {"text_encoder": getattr(self.text_encoder, "name", known)}
        if digest := getattr(self.text_encoder, "digest", None):
            named["text_encoder_digest"] = digest
        changed = {name: value for name, value in asdict(self.filters).items() if value != getattr(Filters, name)}
        return {**asdict(self.form), **named, **changed}

    def key(self, first: int, images: Sequence[SourceImage]) -> str:
        """Return the digest of all inputs and settings that decide the bytes of a shard."""
        inputs = [(i.origin, i.stamp, i.label, self.class_name(i), i.caption) for i in images]
        versions = [LAYOUT_VERSION, PIL.__version__]
        content = [versions, asdict(self.form), self.captioned, self.encoder_id, first, inputs]
        if self.filters.min_side or self.filters.max_aspect:
            content.append([self.filters.min_side, self.filters.max_aspect])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def class_name(self, image: SourceImage) -> str | None:
        """Return the name of an image's class; None without labels."""
        return None if image.label is None else self.classes[image.label]


def plan_shards(images: Iterable[SourceImage], settings: IngestSettings, shard_samples: int) -> Iterator[ShardJob]:
    """Yield the shards of each split, divided by count, as soon as their images have come."""
    waiting: dict[str, list[SourceImage]] = {"train": [], "test": []}
    firsts = {"train": 0, "test": 0}

    def job(split: str) -> ShardJob:
        piece, first = tuple(waiting[split]), firsts[split]
        waiting[split], firsts[split] = [], first + len(piece)
        return ShardJob(f"{split}-{first // shard_samples:06d}.tar", first, piece, settings.key(first, piece))

    for image in images:
        waiting[image.split].append(image)
        if len(waiting[image.split]) == shard_samples:
            yield job(image.split)
    for split, left in waiting.items():
        if left:
            yield job(split)


def write_shard(job: ShardJob, settings: IngestSettings, tick: Tick = lambda count: None) -> tuple[ShardRecord, bool]:
    """Write one shard, its sidecar and its record, unless all three are there and match the record.

    Args:
        job: the shard.
        settings: settings of the ingest.
        tick: called with a number of images that were just finished.

    Returns:
        The record, and whether the shard was finished before.
    """
    storage, uri = settings.storage, settings.uri
    address = join(uri, layout.progress_name(job.name))
    recorded = ShardRecord.from_json(storage.find(address) or b"")
    with temporary_folder("ingest") as scratch:
        if recorded is not None and recorded.key == job.key and _is_whole(recorded, settings, scratch):
            tick(len(job.images))
            return recorded, True
        # From here on shards of an earlier dataset are overwritten, so that its description is no longer true.
        storage.delete(join(uri, layout.DATASET))
        tally = _Tally(PixelSums(0, (), ()))
        pattern, number = str(scratch / f"{job.split}-%06d.tar"), int(job.name[-10:-4])
        with webdataset.ShardWriter(
            pattern, maxcount=len(job.images) + 1, maxsize=float("inf"), start_shard=number, mtime=MTIME, verbose=0
        ) as writer:
            for sample in _samples(job, settings, tally, tick):
                writer.write(sample)
        tar = scratch / job.name
        index = index_tar(tar).to_json().encode()
        record = tally.record(job, tar, index)
        if record.samples:
            storage.upload(tar, join(uri, job.name))
            storage.write(join(uri, layout.index_name(job.name)), index)
        storage.write(address, record.to_json().encode())
    return record, False


def identify(encoder: CaptionEncoder) -> str:
    """Return the name of a text encoder with a digest of an embedding; where it changes, shards are written again."""
    name = str(getattr(encoder, "name", getattr(encoder, "__qualname__", type(encoder).__qualname__)))
    answer = pack_embeddings(encoder(["a photograph of a dog"]))[0]
    return f"{name.replace(' ', '_')} {hashlib.sha256(answer).hexdigest()}"


def samples_for(shard_bytes: int, images: Manifest, settings: IngestSettings) -> int:
    """Return how many samples make a tar of about this size, estimated from the first images that can be read."""
    probe = ShardJob("train-000000.tar", 0, images.first(PROBED), key="")
    tally = _Tally(PixelSums(0, (), ()))
    with webdataset.TarWriter(io.BytesIO(), mtime=MTIME) as writer:
        for sample in _samples(probe, settings, tally, lambda count: None):
            writer.write(sample)
        written, size = tally.per_class.total(), writer.tarstream.offset
    return max(1, (shard_bytes - TAR_END) * written // size) if written else max(1, len(images))


def seconds_of_image(images: Manifest, storage: Storage, form: ImageFormat) -> float:
    """Return the seconds that one process takes for one image of an ingest, by the first ones."""
    began, count = time.monotonic(), 0
    for image in images.first(TIMED):
        try:
            encode_image(image.read(storage), form)
            count += 1
        except UnreadableError:
            continue
    return WRITE_S + (time.monotonic() - began) / max(count, 1)


def _is_whole(record: ShardRecord, settings: IngestSettings, scratch: Path) -> bool:
    if not record.samples:
        return True
    copy = scratch / "copy"
    try:
        index = settings.storage.read(join(settings.uri, layout.index_name(record.name)))
        if hashlib.sha256(index).hexdigest() != record.index_sha256:
            return False
        settings.storage.download(join(settings.uri, record.name), copy)
        return file_sha256(copy) == record.sha256
    except NotFoundError:
        return False
    finally:
        copy.unlink(missing_ok=True)


@dataclass
class _Tally:
    """The counts of a shard's record, while the shard is being written."""

    pixels: PixelSums
    per_class: Counter[int] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    bad: list[BadImage] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)

    def record(self, job: ShardJob, tar: Path, index: bytes) -> ShardRecord:
        """Return the record of the written shard."""
        samples = self.per_class.total()
        return ShardRecord(
            name=job.name,
            key=job.key,
            samples=samples,
            size=tar.stat().st_size,
            sha256=file_sha256(tar),
            index_sha256=hashlib.sha256(index).hexdigest(),
            pixels=self.pixels,
            per_class=dict(sorted(self.per_class.items())),
            changes=dict(sorted(self.changes.items())),
            bad=tuple(self.bad),
            filtered=dict(sorted(self.filtered.items())),
        )


def _samples(job: ShardJob, settings: IngestSettings, tally: _Tally, tick: Tick) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard for the WebDataset writer, with embeddings of several captions at a time."""
    plain = _plain_samples(job, settings, tally, tick)
    if settings.text_encoder is None:
        yield from plain
        return
    while chunk := list(islice(plain, CAPTIONS_AT_ONCE)):
        with _encoding:
            packed = pack_embeddings(settings.text_encoder([sample["txt"].decode() for sample in chunk]))
        for sample, data in zip(chunk, packed, strict=True):
            yield sample | {"emb.npy": data}


def _plain_samples(job: ShardJob, settings: IngestSettings, tally: _Tally, tick: Tick) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard without embeddings, and count them; images that cannot be read are left out."""
    for number, (image, read) in enumerate(_reads(job.images, settings.storage), job.first):
        try:
            encoded = encode_image(read(), settings.form)
        except UnreadableError as error:
            tally.bad.append(BadImage(image.origin, str(error)))
            tick(1)
            continue
        if (filtered := settings.filters.by_size(encoded.size)) is not None:
            tally.filtered[filtered] += 1
            tick(1)
            continue
        tally.per_class[image.label or 0] += 1
        tally.changes.update(encoded.changes)
        tally.pixels += PixelSums.of(encoded.pixels)
        metadata = {"origin": image.origin}
        sample: dict[str, Any] = {"__key__": f"{job.split}-{number:08d}", settings.form.encoding: encoded.data}
        if image.label is not None:
            sample["cls"] = str(image.label).encode()
            metadata["class"] = settings.classes[image.label]
        if settings.captioned:
            sample["txt"] = (image.caption or "").encode()
        yield sample | {"json": json.dumps(metadata).encode()}
        tick(1)


def _reads(images: Sequence[SourceImage], storage: Storage) -> Iterator[tuple[SourceImage, Callable[[], bytes]]]:
    """Yield each image with a function that returns its bytes; images on S3 are fetched ahead."""
    ahead: deque[tuple[SourceImage, Future[bytes] | None]] = deque()
    waiting = iter(images)
    try:
        while True:
            for image in islice(waiting, READS_AHEAD - len(ahead)):
                remote = is_remote(image.read)
                ahead.append((image, _readers().submit(image.read, storage) if remote else None))
            if not ahead:
                return
            image, future = ahead.popleft()
            yield image, future.result if future else partial(image.read, storage)
    finally:
        for _, future in ahead:
            if future:
                future.cancel()


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    """Return the threads that read from S3 for all shards of this process, as many as the client keeps connections."""
    return ThreadPoolExecutor(32, thread_name_prefix="ingest-read")
