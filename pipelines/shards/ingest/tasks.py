"""One shard of an ingest: what is to be in it, and the task that writes it, on whatever machine.

A shard holds the images `first`, `first + 1`, … of its split. It is finished when its tar, its sidecar and its record
`ingest-progress/SHARD.json` are at the destination; the record has the checksums of both and the digest of the inputs.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import webdataset

from pipelines.shards.index import index_tar, sidecar
from pipelines.shards.ingest.encode import CaptionEncoder, ImageFormat, encode_image, pack_embeddings
from pipelines.shards.ingest.report import BadImage, PixelSums, ShardRecord
from pipelines.shards.ingest.sources import SourceImage
from pipelines.shards.ingest.trees import UnreadableError, is_remote
from pipelines.storage import NotFoundError, Storage, join

LAYOUT_VERSION = 2  # of the members that a shard is made of; another one makes every shard again
PROBED = 32
CAPTIONS_AT_ONCE = 64
READS_AHEAD = 16
TAR_END = 6144  # two empty blocks, and on average half a record of 20 blocks
# Fixed, because the writer would stamp the current time and equal inputs would not give equal digests. An int, because
# a float has the tar carry a pax header of 1 KiB for every member.
MTIME = 0
PROGRESS = "ingest-progress"

Tick = Callable[[int], None]

# A text encoder's tokenizer may not be used by two threads at a time.
_encoding = threading.Lock()


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the images `first`, `first + 1`, … of its split.

    Attributes:
        recorded: the shard's record where an earlier ingest has left one of the same key.
    """

    name: str
    first: int
    images: tuple[SourceImage, ...]
    key: str
    recorded: ShardRecord | None = None

    @property
    def split(self) -> str:
        """The split that the shard belongs to."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Settings:
    """What all shards of an ingest have in common; pickled once for all tasks."""

    uri: str
    storage: Storage
    form: ImageFormat
    classes: tuple[str, ...]
    captioned: bool
    text_encoder: CaptionEncoder | None
    encoder_id: str | None

    def described(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self.form), "text_encoder": self.encoder_id and self.encoder_id.partition(" ")[0]}

    def key(self, first: int, images: Sequence[SourceImage]) -> str:
        """Digest of all that decides a shard's bytes."""
        inputs = [(i.origin, i.stamp, i.label, self.class_name(i), i.caption) for i in images]
        versions = [LAYOUT_VERSION, PIL.__version__]
        content = [versions, asdict(self.form), self.captioned, self.encoder_id, first, inputs]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def class_name(self, image: SourceImage) -> str | None:
        """The name of an image's class; None without labels."""
        return None if image.label is None else self.classes[image.label]


def plan_shards(
    images: Sequence[SourceImage],
    settings: Settings,
    shard_samples: int,
    recorded: dict[str, ShardRecord] | None = None,
) -> list[ShardJob]:
    """Cut each split into shards by count; a record of an earlier ingest counts where its key is the same."""
    jobs = []
    for split in ("train", "test"):
        mine = tuple(image for image in images if image.split == split)
        for number, first in enumerate(range(0, len(mine), shard_samples)):
            name, piece = f"{split}-{number:06d}.tar", mine[first : first + shard_samples]
            key = settings.key(first, piece)
            record = (recorded or {}).get(name)
            jobs.append(ShardJob(name, first, piece, key, record if record and record.key == key else None))
    return jobs


def write_shard(job: ShardJob, settings: Settings, tick: Tick = lambda count: None) -> tuple[ShardRecord, bool]:
    """Write one shard, its sidecar and its record, unless all three are there and whole; whether they were.

    Args:
        job: the shard.
        settings: of the ingest.
        tick: called with a number of images that are done.
    """
    storage, uri = settings.storage, settings.uri
    with tempfile.TemporaryDirectory(prefix="ddpm-ingest-") as scratch:
        if job.recorded is not None and _is_whole(job.recorded, settings, Path(scratch)):
            tick(len(job.images))
            return job.recorded, True
        tally = _Tally(PixelSums(0, (), ()))
        pattern, number = str(Path(scratch) / f"{job.split}-%06d.tar"), int(job.name[-10:-4])
        with webdataset.ShardWriter(
            pattern, maxcount=len(job.images) + 1, maxsize=float("inf"), start_shard=number, mtime=MTIME, verbose=0
        ) as writer:
            for sample in _samples(job, settings, tally, tick):
                writer.write(sample)
        tar = Path(scratch) / job.name
        index = index_tar(tar).to_json().encode()
        record = tally.record(job, tar, index)
        if record.samples:
            storage.upload(tar, join(uri, job.name))
            storage.write(join(uri, sidecar(job.name)), index)
        storage.write(join(uri, record_name(job.name)), record.to_json().encode())
    return record, False


def identify(encoder: CaptionEncoder) -> str:
    """Name of a text encoder with a digest of what it answers: another one makes every shard again."""
    name = str(getattr(encoder, "name", getattr(encoder, "__qualname__", type(encoder).__qualname__)))
    answer = pack_embeddings(encoder(["a photograph of a dog"]))[0]
    return f"{name.replace(' ', '_')} {hashlib.sha256(answer).hexdigest()}"


def samples_for(shard_bytes: int, images: Sequence[SourceImage], settings: Settings) -> int:
    """Samples whose tar has about so many bytes, by the first images that can be read."""
    probe = ShardJob("train-000000.tar", 0, tuple(images[:PROBED]), key="")
    tally = _Tally(PixelSums(0, (), ()))
    with webdataset.TarWriter(io.BytesIO(), mtime=MTIME) as writer:
        for sample in _samples(probe, settings, tally, lambda count: None):
            writer.write(sample)
        written, size = tally.per_class.total(), writer.tarstream.offset
    return max(1, (shard_bytes - TAR_END) * written // size) if written else max(1, len(images))


def record_name(shard: str) -> str:
    """Where the record of a finished shard lies, below the dataset."""
    return f"{PROGRESS}/{shard.removesuffix('.tar')}.json"


def _is_whole(record: ShardRecord, settings: Settings, scratch: Path) -> bool:
    """Whether tar and sidecar are at the destination with the recorded checksums."""
    if not record.samples:
        return True
    copy = scratch / "copy"
    try:
        index = settings.storage.read(join(settings.uri, sidecar(record.name)))
        if hashlib.sha256(index).hexdigest() != record.index_sha256:
            return False
        settings.storage.download(join(settings.uri, record.name), copy)
        return _sha256(copy) == record.sha256
    except NotFoundError:
        return False
    finally:
        copy.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class _Tally:
    """What a shard's record counts, while the shard is being written."""

    pixels: PixelSums
    per_class: Counter[int] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    bad: list[BadImage] = field(default_factory=list)

    def record(self, job: ShardJob, tar: Path, index: bytes) -> ShardRecord:
        samples = self.per_class.total()
        return ShardRecord(
            name=job.name,
            key=job.key,
            samples=samples,
            size=tar.stat().st_size,
            sha256=_sha256(tar),
            index_sha256=hashlib.sha256(index).hexdigest(),
            pixels=self.pixels,
            per_class=dict(sorted(self.per_class.items())),
            changes=dict(sorted(self.changes.items())),
            bad=tuple(self.bad),
        )


def _samples(job: ShardJob, settings: Settings, tally: _Tally, tick: Tick) -> Iterator[dict[str, Any]]:
    """The shard's samples as WebDataset writes them; embeddings are computed some captions at a time."""
    plain = _plain_samples(job, settings, tally, tick)
    if settings.text_encoder is None:
        yield from plain
        return
    while chunk := list(islice(plain, CAPTIONS_AT_ONCE)):
        with _encoding:
            packed = pack_embeddings(settings.text_encoder([sample["txt"].decode() for sample in chunk]))
        for sample, data in zip(chunk, packed, strict=True):
            yield sample | {"emb.npy": data}


def _plain_samples(job: ShardJob, settings: Settings, tally: _Tally, tick: Tick) -> Iterator[dict[str, Any]]:
    for number, (image, read) in enumerate(_reads(job.images, settings.storage), job.first):
        try:
            encoded = encode_image(read(), settings.form)
        except UnreadableError as error:
            tally.bad.append(BadImage(image.origin, str(error)))
            tick(1)
            continue
        tally.per_class[image.label or 0] += 1
        tally.changes.update(encoded.changes)
        tally.pixels += PixelSums.of(encoded.pixels)
        about = {"origin": image.origin}
        sample: dict[str, Any] = {"__key__": f"{job.split}-{number:08d}", settings.form.encoding: encoded.data}
        if image.label is not None:
            sample["cls"] = str(image.label).encode()
            about["class"] = settings.classes[image.label]
        if settings.captioned:
            sample["txt"] = (image.caption or "").encode()
        yield sample | {"json": json.dumps(about).encode()}
        tick(1)


def _reads(images: Sequence[SourceImage], storage: Storage) -> Iterator[tuple[SourceImage, Callable[[], bytes]]]:
    """Each image with a call that gives its bytes; those on S3 are under way before they are asked for."""
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
    """As many as the S3 client keeps connections, for all shards that this process writes."""
    return ThreadPoolExecutor(32, thread_name_prefix="ingest-read")
