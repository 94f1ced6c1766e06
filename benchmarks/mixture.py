"""Benchmark of mixtures: what it costs to know which samples a rank reads, and to read from several sources.

    python -m benchmarks.mixture [--quick] [--json]

- `order`: a rank of 512 asks for its piece of a batch of 4,096 behind the first billion samples, of one dataset and of
  ten sources with a billion samples together; milliseconds per batch over 16 of the ranks, and for the first of all,
  which lays out an epoch of the sources that the piece is of. `prefix_error` is the largest distance of a source's
  count from its share over the first samples.
- `reading`: images per second of one rank from shards on this disk, of one dataset and of five sources with as many
  images together, turn by turn; `speedup_one_dataset` is that of the mixture by that of the one.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.config import DataConfig
from pipelines.config.sections import SourceConfig
from pipelines.shards.index import Dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.joined import with_sources
from pipelines.shards.mixture import MixtureOrder, Schedule, whole_weights
from pipelines.shards.order import SampleOrder
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import Storage

RANKS = 512
BATCH = 4096
WEIGHTS = (30, 20, 15, 10, 8, 6, 5, 3, 2, 1)
SHARD_SAMPLES = 1000
SOURCES = 5
READ_BATCH = 256


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("mixture", __doc__, quick="a tenth of the samples, fewer images").parse_args(arguments)
    size: Size = options.size
    began = time.perf_counter()
    samples = size.of(10**9, 10**8, 10**6)
    with tempfile.TemporaryDirectory(prefix="mixture-") as scratch:
        reading = read(Path(scratch), size.of(10_000, 4_000, 500), size.of(7, 5, 1))
    result = {
        "benchmark": "mixture",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "samples": samples,
        "ranks": RANKS,
        "batch_size": BATCH,
        "order": [cost(1, samples), cost(len(WEIGHTS), samples)],
        "prefix_error": prefix_error(size.of(10**6, 10**5, 10**3)),
        **reading,
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish(result, "mixture", options)


def cost(sources: int, samples: int) -> dict[str, Any]:
    """Return the milliseconds in which a rank finds its piece of a batch behind so many samples."""
    shards = samples // SHARD_SAMPLES // sources
    orders = [
        SampleOrder([SHARD_SAMPLES] * shards, lanes=64, window=8, seed=0, digest=str(number))
        for number in range(sources)
    ]
    order = orders[0] if sources == 1 else MixtureOrder(orders, Schedule({0: WEIGHTS[:sources]}))
    began = time.perf_counter()
    order.piece(samples, BATCH, 0, RANKS)
    first = time.perf_counter() - began
    order.batch(samples, BATCH)  # the epochs of all sources are laid out
    found = []
    for rank in range(0, RANKS, RANKS // 16):
        for start in range(samples, samples + 20 * BATCH, BATCH):
            began = time.perf_counter()
            order.piece(start, BATCH, rank, RANKS)
            found.append((time.perf_counter() - began) * 1e3)
    return {
        "sources": sources,
        "median_ms": statistics.median(found),
        "slowest_of_100_ms": sorted(found)[int(len(found) * 0.99)],
        "first_ms": first * 1e3,
    }


def prefix_error(samples: int) -> float:
    """Return by how many samples the count of a source differs from its share at most, over all shorter prefixes."""
    sources, _ = Schedule({0: WEIGHTS}).locate(np.arange(samples))
    shares = np.array(whole_weights(WEIGHTS)) / sum(whole_weights(WEIGHTS))
    held = np.cumsum(sources[:, None] == np.arange(len(WEIGHTS)), axis=0)
    return float(np.abs(held - np.arange(1, samples + 1)[:, None] * shares).max())


def read(scratch: Path, images: int, turns: int) -> dict[str, Any]:
    """Return the images per second that one rank reads of one dataset, and of a mixture of as many images."""
    storage = Storage()
    alone = write(scratch / "one", images, storage)
    parts = [write(scratch / f"part-{number}", images // SOURCES, storage) for number in range(SOURCES)]
    sources = tuple(SourceConfig(name=f"part-{n}", uri=part.uri, weight=n + 1) for n, part in enumerate(parts))
    data = DataConfig(uri=parts[0].uri, image_size=32, channels=3, num_classes=10, sources=sources)
    mixed, _ = with_sources(data, parts[0], None, storage)
    rates: dict[str, list[float]] = {"one dataset": [], f"{SOURCES} sources": []}
    for turn in range(turns + 1):
        for name, dataset in zip(rates, (alone, mixed), strict=True):
            rate = pass_over(dataset, images, storage, scratch / "cache")
            rates[name] += [rate] if turn else []  # the first one fills the cache
    medians = {name: statistics.median(each) for name, each in rates.items()}
    one, several = medians.values()
    return {
        "images": images,
        "reading": [{"system": name, "images_per_s": rate} for name, rate in medians.items()],
        "speedup_one_dataset": several / one,
    }


def write(folder: Path, images: int, storage: Storage) -> Dataset:
    """Write smooth random images of ten classes as a dataset."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / "images" / str(label)).mkdir(parents=True)
    for i in range(images):
        pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
        pixels.save(folder / "images" / str(i % 10) / f"{i:07d}.png")
    uri = f"file://{folder}/shards"
    return ingest(str(folder / "images"), uri, storage, image_size=32, channels=3, shard_samples=100).dataset


def pass_over(dataset: Dataset, images: int, storage: Storage, cache: Path) -> float:
    """Return the images per second of one rank that reads so many of a dataset's stream."""
    settings = StreamSettings(lanes=8, window=4, seed=0, cache_dir=cache, cache_bytes=1 << 30)
    reader, order = open_stream(dataset, "train", storage, settings)
    stream = TrainingStream(reader, order, batch_size=READ_BATCH, rank=0, world_size=1, stop=images)
    began = time.perf_counter()
    count = sum(len(batch) for batch in stream)
    rate = count / (time.perf_counter() - began)
    reader.close()
    return rate


if __name__ == "__main__":
    main()
