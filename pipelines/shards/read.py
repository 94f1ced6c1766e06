"""Reading shards: a node-wide verified cache, memory maps, decoding in threads, batches ready ahead of need."""

from __future__ import annotations

import fcntl
import hashlib
import io
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential_jitter
from torch import Tensor

from pipelines.shards.index import Dataset, ShardIndex, ShardInfo, sidecar
from pipelines.shards.order import Located, SampleOrder
from pipelines.storage import Storage, TransientStorageError, join

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")


class ShardCorruptError(RuntimeError):
    """A shard whose bytes are not those that dataset.json records, twice in a row."""


class ShardCache:
    """Whole shards on local disk, by their SHA-256, shared by the processes of a node.

    A shard appears under its name only when it is complete and verified. Beyond `limit_bytes` the least recently
    opened are removed; whoever has one mapped keeps it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, uri: str, shard: ShardInfo, storage: Storage) -> Path:
        """The path of a verified local copy.

        Raises:
            ShardCorruptError: two downloads in a row had the wrong checksum.
        """
        path = self.folder / f"{shard.sha256}.tar"
        if not path.exists():
            with self._locked(shard.sha256):
                if not path.exists():
                    self._download(join(uri, shard.name), shard, storage, path)
                    self._evict(keep=path)
        os.utime(path)
        return path

    def _download(self, uri: str, shard: ShardInfo, storage: Storage, path: Path) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            for _ in range(2):
                _download_patiently(storage, uri, temporary)
                with temporary.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found == shard.sha256:
                    temporary.replace(path)
                    return
        finally:
            temporary.unlink(missing_ok=True)
        raise ShardCorruptError(
            f"{uri} has SHA-256 {found[:12]}, dataset.json says {shard.sha256[:12]}, on two downloads: "
            "the shard is damaged; write the dataset again with `ddpm ingest`"
        )

    def _evict(self, keep: Path) -> None:
        shards = sorted(self.folder.glob("*.tar"), key=lambda p: p.stat().st_mtime)
        excess = sum(p.stat().st_size for p in shards) - self.limit_bytes
        for path in shards:
            if excess <= 0:
                break
            if path != keep:
                excess -= path.stat().st_size
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@retry(
    retry=retry_if_exception_type(TransientStorageError),
    wait=wait_exponential_jitter(multiplier=0.5, max=10),
    stop=stop_after_delay(300),
    reraise=True,
)
def _download_patiently(storage: Storage, uri: str, path: Path) -> None:
    """An object store that is away for minutes costs minutes, not the run."""
    storage.download(uri, path)


@dataclass(frozen=True)
class Batch:
    """Decoded samples.

    Attributes:
        ordinals: their numbers in the stream, int64 [B].
        images: float32 in [-1, 1], [B, C, S, S].
        labels: int64 [B]; None for data without labels.
    """

    ordinals: Tensor
    images: Tensor
    labels: Tensor | None


class ShardReader:
    """Random access to the samples of a split, from any thread."""

    def __init__(self, dataset: Dataset, split: str, storage: Storage, cache: ShardCache) -> None:
        self.dataset, self.storage, self.cache = dataset, storage, cache
        self.shards = dataset.shards(split)
        self._open = lru_cache(maxsize=256)(self._open_shard)

    def members(self, shard: int, index: int) -> dict[str, bytes]:
        """The raw members of one sample, by extension."""
        sidecar_, mapped = self._open(shard)
        return {ext: mapped[m.offset : m.offset + m.size] for ext, m in sidecar_.members[index].items()}

    def batch(self, located: Located) -> Batch:
        """Read and decode samples.

        Raises:
            ShardCorruptError: a shard or one of its images is damaged.
        """
        images, labels = [], []
        for shard, index in zip(located.shards.tolist(), located.indices.tolist(), strict=True):
            members = self.members(shard, index)
            images.append(self._decode(members, shard, index))
            if "cls" in members:
                labels.append(int(members["cls"]))
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return Batch(
            torch.from_numpy(located.ordinals),
            stacked.float().div_(127.5).sub_(1).contiguous(),
            torch.tensor(labels) if labels else None,
        )

    def _decode(self, members: dict[str, bytes], shard: int, index: int) -> NDArray[np.uint8]:
        channels = self.dataset.channels
        where = f"sample {index} of {self.shards[shard].name}"
        encoded = next((members[ext] for ext in IMAGE_MEMBERS if ext in members), None)
        if encoded is None:
            raise ShardCorruptError(f"{where} has no image among its members {sorted(members)}")
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except OSError as error:
            raise ShardCorruptError(f"{where} cannot be decoded: {error}") from error
        size = self.dataset.image_size
        if pixels.shape[:2] != (size, size):
            raise ShardCorruptError(f"{where} is {pixels.shape[:2]}, dataset.json says {size}x{size}")
        return pixels.reshape(size, size, channels)

    def _open_shard(self, shard: int) -> tuple[ShardIndex, mmap.mmap]:
        info = self.shards[shard]
        path = self.cache.fetch(self.dataset.uri, info, self.storage)
        index = ShardIndex.from_json(self.storage.read(join(self.dataset.uri, sidecar(info.name))))
        if len(index.keys) != info.samples:
            raise ShardCorruptError(
                f"{sidecar(info.name)} lists {len(index.keys)} samples, dataset.json says {info.samples}"
            )
        with path.open("rb") as file:
            return index, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class TrainingStream:
    """Batches of one rank, in the order of `SampleOrder`, read ahead by threads.

    Attributes:
        waited_s: seconds that the consumer has spent waiting for data.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        start: int = 0,
        stop: int,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        self.reader, self.order = reader, order
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start, self.stop = start, stop
        self.threads, self.prefetch = threads, prefetch
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        """This rank's pieces of the global batches from `start` until `stop` samples have been given out."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            ahead: deque[Future[Batch]] = deque()
            starts = iter(range(self.start, self.stop, self.batch_size))
            try:
                while True:
                    while len(ahead) < self.prefetch and (first := next(starts, None)) is not None:
                        ahead.append(pool.submit(self._load, first))
                    if not ahead:
                        return
                    began = time.perf_counter()
                    batch = ahead.popleft().result()
                    self.waited_s += time.perf_counter() - began
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def _load(self, first: int) -> Batch:
        return self.reader.batch(self.order.piece(first, self.batch_size, self.rank, self.world_size))


def read_split(reader: ShardReader) -> Batch:
    """Every sample of a split in shard order."""
    counts = [shard.samples for shard in reader.shards]
    shards = np.repeat(np.arange(len(counts)), counts)
    indices = np.concatenate([np.arange(count) for count in counts])
    return reader.batch(Located(np.arange(len(shards)), shards, indices))


def default_cache_dir() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm" / "shards"
