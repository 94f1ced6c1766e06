"""Benchmark of the driver of an ingest: its memory and seconds by the number of images of the source.

    python -m benchmarks.ingest [--quick] [--json]

- `listing`: a source in a store, whose listing is made up page by page, is listed into a manifest on this disk.
- `comparing`: that many made-up hashes of 63 bits are compared, a thousandth of them copies of others with up to six
  bits changed; `recall` is the share of the copies whose original was found.

Each row is a process of its own; `memory_mib` is the peak of its memory beyond that of the same work on 1,000 images.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.shards.ingest.alike import BITS
from pipelines.shards.ingest.neighbours import WIDTH, near_groups
from pipelines.shards.ingest.sources import open_source
from pipelines.storage import Entry, Storage

CLASSES = 1000
PIECE = 1024
COPIES = 1000
"""One of so many hashes is a copy of another one."""
LEAST = 1000


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("ingest", __doc__, quick="a hundredth of the images").parse_args(arguments)
    size: Size = options.size
    began = time.perf_counter()
    counts = size.of((10**5, 10**6, 10**7), (10**4, 10**5), (2 * LEAST,))
    result = {
        "benchmark": "ingest",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__},
        "listing": rows(list_images, counts),
        "comparing": rows(compare, counts[: size.of(2, 2, 1)]),
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish(result, "ingest", options)


def rows(work: Callable[[int], dict[str, float]], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each number of images."""
    least, *found = (_alone(work, count) for count in (LEAST, *counts))
    return [
        {"images": count, **row, "memory_mib": round(row["memory_mib"] - least["memory_mib"], 1)}
        for count, row in zip(counts, found, strict=True)
    ]


def _alone(work: Callable[[int], dict[str, float]], count: int) -> dict[str, float]:
    """Return what a process of its own measures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, work, count).result()


def measured(work: Callable[[int], dict[str, float]], count: int) -> dict[str, float]:
    """Return what the work measures, with its seconds and the peak of this process's memory."""
    began = time.perf_counter()
    found = work(count)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 1), "memory_mib": peak, **found}


@dataclass(frozen=True)
class MadeUp(Storage):
    """Lists made-up images of a bucket; everything else is on this disk."""

    images: int = 0

    def scan(self, uri: str, **patience: Any) -> Iterator[Entry]:
        """Yield an entry for each image."""
        if not uri.startswith("s3://"):
            yield from super().scan(uri, **patience)
            return
        for number in range(self.images):
            yield Entry(f"{uri}/class-{number % CLASSES:03d}/{number:012d}.jpg", 40_000, f"{number:032x}")


def list_images(count: int) -> dict[str, float]:
    """List a source of so many images."""
    with tempfile.TemporaryDirectory(prefix="ingest-") as scratch:
        source = open_source("s3://bucket/photos", MadeUp(images=count), f"file://{scratch}")
        assert len(source.images) == count
        size = sum(path.stat().st_size for path in Path(scratch).iterdir())
    return {"manifest_bytes_per_image": round(size / count, 1)}


def compare(count: int) -> dict[str, float]:
    """Find the near ones of so many hashes."""
    copied: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-") as scratch:
        found = sum(
            copied.get(position) in (group, *near)
            for position, (group, near) in near_groups(hashes(count, copied), BITS, Path(scratch))
        )
    return {"recall": found / len(copied)}


def hashes(count: int, copied: dict[int, int]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """Yield (positions, hashes) piece by piece; `copied` gets the position of each copy -> that of its original."""
    random = np.random.default_rng(0)
    for start in range(0, count, PIECE):
        values = random.integers(0, 1 << WIDTH, min(PIECE, count - start), dtype=np.uint64)
        for place in range(COPIES // 2, len(values), COPIES):
            bits = random.choice(WIDTH, random.integers(0, BITS + 1), replace=False)
            values[place] = values[0] ^ np.uint64(sum(1 << int(bit) for bit in bits))
            copied[start + place] = start
        yield np.arange(start, start + len(values)), values


if __name__ == "__main__":
    main()
