"""What the systems of the benchmark have in common, and this project's own streams."""

from __future__ import annotations

import configparser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import DataConfig
from pipelines.config.sections import SourceConfig
from pipelines.shards.index import Dataset, read_dataset
from pipelines.shards.joined import with_sources
from pipelines.shards.members import decode_pixels
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import Storage

BATCH = 256
BUFFER = 1_000
"""Samples of a shuffle buffer, and of a shard."""
SIZE = 32
SOURCES = 5
URI = "s3://ddpm/benchmarks/data"
BATCHES = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ReadSetup:
    """What a system is opened with.

    Attributes:
        storage: the S3 server.
        cache: a folder on this node's disk that it may keep shards in.
        cores: the CPU cores that it may use; with more than one, systems with loader processes get one for each.
    """

    storage: Storage
    cache: Path
    cores: int

    @property
    def workers(self) -> int:
        """The loader processes of a system that has some; 0 for none beside the main process."""
        return 0 if self.cores == 1 else self.cores

    def credentials(self) -> tuple[str, str]:
        """Return the key and the secret of the S3 server."""
        parser = configparser.ConfigParser()
        parser.read(self.storage.credentials_file or "")
        section = parser[parser.sections()[0]]
        return section["aws_access_key_id"], section["aws_secret_access_key"]


class System(Protocol):
    """A stream of batches, opened at its beginning or at a saved state.

    Attributes:
        package: whose version is named.
        module: what has to be imported.
    """

    package: ClassVar[str]
    module: ClassVar[str]

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write the samples of tars into a folder as the system needs them; nothing where it reads the tars."""
        ...

    def __init__(self, setup: ReadSetup, state: Any = None) -> None: ...

    def batches(self) -> BATCHES:
        """Yield uint8 images [B, 3, 32, 32], or float32 ones, and int64 labels [B]."""
        ...

    def state(self) -> Any:
        """Return what a checkpoint has to save to go on behind the last batch."""
        ...


def floats(images: Tensor) -> Tensor:
    """Return decoded images as a model takes them, float32 in [-1, 1]."""
    return images if images.is_floating_point() else images.float().div_(127.5).sub_(1)


def decode(image: bytes, label: bytes | int) -> tuple[NDArray[np.uint8], int]:
    """Return the pixels [32, 32, 3] and the class of a sample, with the decoder of this project."""
    return decode_pixels({"png": image}, SIZE, 3), int(label)


def collate(samples: Sequence[tuple[NDArray[np.uint8], int]]) -> tuple[Tensor, Tensor]:
    """Return samples as uint8 [B, 3, 32, 32] and int64 [B], the way that is fastest."""
    pixels = np.stack([pixels for pixels, _ in samples])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), torch.tensor([n for _, n in samples])


class OurStream:
    """This project's training stream, with its default lanes and windows, and a decoding thread for each core.

    Its state is the number of samples seen.
    """

    package: ClassVar[str] = "ddpm-pipelines"
    module: ClassVar[str] = "pipelines"

    def __init__(self, setup: ReadSetup, state: int | None = None) -> None:
        settings = StreamSettings(
            lanes=8, window=4, seed=0, cache_dir=setup.cache, cache_bytes=20 << 30, threads=setup.cores
        )
        dataset = self.dataset(setup.storage)
        reader, order = open_stream(dataset, "train", setup.storage, settings)
        self.seen, stop = state or 0, dataset.samples("train")
        self.stream = TrainingStream(
            reader, order, batch_size=BATCH, rank=0, world_size=1, start=self.seen, stop=stop, threads=setup.cores
        )

    def dataset(self, storage: Storage) -> Dataset:
        """Return what is read."""
        return read_dataset(URI, storage)

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write nothing: the shards are those of the ingest."""

    def batches(self) -> BATCHES:
        for batch in self.stream:
            self.seen += len(batch)
            assert batch.labels is not None
            yield batch.images, batch.labels

    def state(self) -> int:
        return self.seen


class OurMixture(OurStream):
    """The same of a mixture of five sources that have the same images together."""

    def dataset(self, storage: Storage) -> Dataset:
        sources = tuple(SourceConfig(name=f"part-{n}", uri=f"{URI}-part-{n}", weight=1) for n in range(SOURCES))
        data = DataConfig(uri=URI, image_size=SIZE, channels=3, num_classes=10, sources=sources)
        return with_sources(data, read_dataset(URI, storage), None, storage)[0]


OWN: dict[str, type[System]] = {"ours": OurStream, "ours_of_5_sources": OurMixture}
