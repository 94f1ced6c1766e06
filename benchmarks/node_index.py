"""Benchmark of the index of a node: memory and first seconds of the ranks that read a dataset of many shards.

    python -m benchmarks.node_index [--quick] [--json]

A node's 8 ranks read 1,000 batches of 1,024 samples of a billion, in 100,000 shards, by `TrainingStream`. Shards and
sidecars are made when they are asked for: images are alike, and stand as far apart as photos of 100 KB would, so that
the shards in use do not fit into the cache, and samples are read by ranges. The ranks have the arrays of the
dataset in a file that they map, as Ray Train's workers have them in their node's object store.

- `read_s`: seconds in which the driver reads `dataset.json`; `job_mib`: size of what a worker is sent.
- `first_batch_s`: seconds until the last of the ranks has its first batch, from when all of them have imported what
  they need; they share the cores of this machine.
- `index_mib`: memory (PSS, in which what processes share counts once) of the ranks after the last batch, beyond that
  of ranks that have read as many batches of a dataset of 64 shards of 16 samples.
- `sidecars_read`: requests for sidecars of all ranks, which read from `shards_in_use` shards.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.shards.index import Dataset, Member, ShardIndex, ShardInfo, make_dataset, read_dataset
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import Storage, Throttling

BATCH = 1024
LANES = 64
WINDOW = 8
STRIDE = 102_400
"""Bytes from one sample of a shard to the next."""
SHARD_BYTES = 1 << 30


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("node_index", __doc__, quick="a tenth of shards and batches").parse_args(arguments)
    size: Size = options.size
    began = time.perf_counter()
    ranks, batches = size.of(8, 8, 2), size.of(1000, 100, 2)
    shards, samples = size.of(100_000, 10_000, 200), size.of(10_000, 10_000, 100)
    without = measure(MadeStorage(64, 16), ranks, batches)
    found = measure(MadeStorage(shards, samples), ranks, batches)
    result = {
        "benchmark": "node_index",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "ranks": ranks,
        "batches": batches,
        "batch_size": BATCH,
        "shards": shards,
        "samples": shards * samples,
        "shards_in_use": LANES * WINDOW,
        **found,
        "without_mib": without["node_mib"],
        "index_mib": found["node_mib"] - without["node_mib"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish(result, "node_index", options)


class MadeStorage(Storage):
    """A store of one dataset whose objects are made when they are read.

    Attributes:
        sidecars: number of sidecars that this process has read.
    """

    def __init__(self, shards: int, samples: int) -> None:
        super().__init__()
        values = {"shards": shards, "samples": samples, "sidecar": sidecar_text(samples), "sidecars": 0}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    shards: int
    samples: int
    sidecar: bytes
    sidecars: int

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, patience_s: float = 0) -> bytes:
        """Return `dataset.json`, or a sidecar."""
        if uri.endswith("dataset.json"):
            return dataset_text(self.shards, self.samples)
        object.__setattr__(self, "sidecars", self.sidecars + 1)
        return bytes(memoryview(self.sidecar))  # a copy, as from a store

    def fetch(self, uri: str, start: int, stop: int, sink: Callable[[bytes], object], *, patience_s: float = 0) -> int:
        """Pass the bytes of a sample to `sink`."""
        at = start % STRIDE - 512
        sink(sample()[at : at + stop - start])
        return 1

    def throttling(self) -> Throttling:
        """Return that nothing was throttled."""
        return Throttling()


def dataset_text(shards: int, samples: int) -> bytes:
    """Return `dataset.json`."""
    infos = (
        ShardInfo(f"train-{n:06d}.tar", samples, SHARD_BYTES, hashlib.sha256(f"{n}".encode()).hexdigest())
        for n in range(shards)
    )
    dataset = make_dataset(
        "made://dataset",
        splits={"train": tuple(infos)},
        classes=("one", "other"),
        channels=3,
        image_size=32,
        mean=(0.0, 0.0, 0.0),
        std=(0.5, 0.5, 0.5),
    )
    return dataset.to_json().encode()


@lru_cache
def sample() -> bytes:
    """Return the bytes of a sample in its tar: an image, and its label in the next block."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue().ljust(1024, b"\0") + b"1"


def sidecar_text(samples: int) -> bytes:
    """Return the sidecar of a shard."""
    image, label = sample()[:1024].rstrip(b"\0"), sample()[1024:]
    members = [
        {
            "png": Member(n * STRIDE + 512, len(image), zlib.crc32(image)),
            "cls": Member(n * STRIDE + 512 + 1024, len(label), zlib.crc32(label)),
        }
        for n in range(samples)
    ]
    return ShardIndex.of([f"{n:012d}" for n in range(samples)], members).to_json().encode()


def measure(storage: MadeStorage, ranks: int, batches: int) -> dict[str, Any]:
    """Return what the ranks of a node need for so many batches."""
    began = time.perf_counter()
    dataset = read_dataset("made://dataset", storage)
    read_s = time.perf_counter() - began
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="node-index-") as folder:
        settings = StreamSettings(LANES, WINDOW, seed=0, cache_dir=Path(folder, "shards"), cache_bytes=8 << 30)
        settings.cache_dir.mkdir()
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
        arrays = [each.raw() for each in buffers]
        stored = Path(folder, "arrays")
        stored.write_bytes(b"".join(arrays))
        job = pickle.dumps((pickled, stored, [len(each) for each in arrays]))
        store = pickle.dumps((storage, settings, batches))
        pipes = [context.Pipe() for _ in range(ranks)]
        processes = [context.Process(target=read, args=(rank, ranks, there)) for rank, (_, there) in enumerate(pipes)]
        for process, (_, there) in zip(processes, pipes, strict=True):
            process.start()
            there.close()  # so that the end of a rank is noticed
        answers(pipes)  # they have imported what they need
        for here, _ in pipes:
            here.send_bytes(store)
        for here, _ in pipes:
            here.send_bytes(job)
        first = answers(pipes)
        sidecars = answers(pipes)
        memory = [pss_mib(process.pid) for process in processes]
        disk = sum(path.stat().st_size for path in settings.cache_dir.rglob("*") if path.is_file())
        for here, _ in pipes:
            here.send_bytes(b"end")
        for process in processes:
            process.join()
    return {
        "read_s": read_s,
        "job_mib": (len(job) + sum(map(len, arrays))) / 2**20,
        "first_batch_s": max(first),
        "node_mib": sum(memory),
        "sidecars_read": sum(sidecars),
        "disk_mib": disk / 2**20,
    }


def answers(pipes: list[tuple[Connection, Connection]]) -> list[Any]:
    """Return the next message of each rank."""
    return [here.recv() for here, _ in pipes]


def read(rank: int, ranks: int, pipe: Connection) -> None:
    """Read the batches of a rank."""
    pipe.send("ready")
    storage, settings, batches = pickle.loads(pipe.recv_bytes())
    sample()
    job = pipe.recv_bytes()
    began = time.perf_counter()
    pickled, stored, sizes = pickle.loads(job)
    arrays, ends = np.memmap(stored, np.uint8, "r"), np.cumsum([0, *sizes])
    dataset: Dataset = pickle.loads(pickled, buffers=[arrays[a:b] for a, b in itertools.pairwise(ends)])
    del job, arrays
    reader, order = open_stream(dataset, "train", storage, settings)
    stream = TrainingStream(reader, order, batch_size=BATCH, rank=rank, world_size=ranks, stop=batches * BATCH)
    for number, _ in enumerate(stream):
        if number == 0:
            pipe.send(time.perf_counter() - began)
    pipe.send(storage.sidecars)
    pipe.recv_bytes()  # while the parent looks at the memory
    reader.close()


def pss_mib(process: int | None) -> float:
    """Return the memory of a process in MiB; of what several processes share, each has its part."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 2**10


if __name__ == "__main__":
    main()
