"""Benchmark of the requests that a node sends to the store: whole shards for its cache, or ranges of single samples.

    python -m benchmarks.requests [--quick] [--json]

One node of 1, 2, 4 and 8 reads its pieces of the global batches, as fast as it can, from a store on this disk that
answers after 10 ms. Its cache holds what a node of four reads at a time. Each row has the requests for shards per 1,000
samples, and the bytes fetched for each byte of the samples read: where the cache has to hold the lanes of the whole run
(`lanes_of` "run"), and those of the node (`lanes_of` "node"). In rows with `joined` "adjacent", blocks of a shard that
a batch needs are one request only if they follow each other; with "near", also if up to 1 MiB lies between them.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.shards import fetch
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.index import Dataset
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.shards.working_set import NodePiece, working_set
from pipelines.storage import Storage

LANES, WINDOW, BATCH = 32, 2, 256
SHARD_SAMPLES, IMAGE_SIZE = 128, 64
ANSWER_S = 0.01
NODES = (1, 2, 4, 8)


class DistantStorage(Storage):
    """Files of this machine, as if each request took a while."""

    def stream(self, uri: str, start: int, stop: int, chunk: int = 1 << 20) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of a file after `ANSWER_S` seconds."""
        time.sleep(ANSWER_S)
        yield from super().stream(uri, start, stop, chunk)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("requests", __doc__, quick="a third of the shards").parse_args(arguments)
    size: Size = options.size
    with tempfile.TemporaryDirectory(prefix="requests-") as scratch:
        dataset = write(Path(scratch), size.of(6, 2, 1) * LANES)
        used = working_set(dataset, "train", LANES, WINDOW, piece_of(4))
        rows = [
            read(dataset, Path(scratch), nodes, lanes_of, joined, int(used.bytes))
            for nodes in NODES
            for lanes_of, joined in (("run", "adjacent"), ("node", "adjacent"), ("node", "near"))
        ]
    result = {
        "benchmark": "requests",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "lanes": LANES,
        "window": WINDOW,
        "batch_size": BATCH,
        "shards": len(dataset.shards("train")),
        "shard_bytes": dataset.shards("train")[0].bytes,
        "cache_bytes": int(used.bytes),
        "rows": rows,
    }
    publish(result, "requests", options)


def piece_of(nodes: int) -> NodePiece:
    """Return what the first of so many nodes reads, each with one rank."""
    return NodePiece.of(BATCH, range(1), nodes)


def read(dataset: Dataset, folder: Path, nodes: int, lanes_of: str, joined: str, cache_bytes: int) -> dict[str, Any]:
    """Return how many requests the first node sends in an epoch, of at most 4,096 of its samples."""
    cache = folder / f"cache-{nodes}-{lanes_of}-{joined}"
    settings = StreamSettings(LANES, WINDOW, 0, cache, cache_bytes)
    piece = piece_of(nodes) if lanes_of == "node" else None
    near_bytes, fetch.JOIN_BYTES = fetch.JOIN_BYTES, fetch.JOIN_BYTES if joined == "near" else 0
    try:
        reader, order = open_stream(dataset, "train", DistantStorage(), settings, piece=piece)
        stop = min(dataset.samples("train"), 4096 * nodes) // BATCH * BATCH
        stream = TrainingStream(reader, order, batch_size=BATCH, rank=0, world_size=nodes, stop=stop)
        began = time.perf_counter()
        samples = sum(len(batch) for batch in stream)
        seconds = time.perf_counter() - began
        stats = reader.fetcher.stats
        reader.close()
    finally:
        fetch.JOIN_BYTES = near_bytes
    shards = dataset.shards("train")
    sample_bytes = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    return {
        "nodes": nodes,
        "lanes_of": lanes_of,
        "joined": joined,
        "way": "ranges" if reader.fetcher.cache is None else "whole shards",
        "samples": samples,
        "requests_per_1000": round(1000 * stats.requests / samples, 1),
        "fetched": round(stats.bytes / (samples * sample_bytes), 3),
        "samples_per_s": round(samples / seconds),
    }


def write(folder: Path, count: int) -> Dataset:
    """Write shards of random images and index them."""
    random = np.random.default_rng(0)
    for shard in range(count):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for index in range(SHARD_SAMPLES):
                buffer = io.BytesIO()
                np.save(buffer, random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
                info = tarfile.TarInfo(f"{shard:06d}-{index:03d}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return index_tars(f"file://{folder}", Storage()).dataset


if __name__ == "__main__":
    main()
