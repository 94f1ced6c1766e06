"""Benchmark of shuffling data stored by class: this project, WebDataset's documented pipeline and a full shuffle.

    python -m benchmarks.shuffle [--quick] [--json]

Only orders are compared; nothing is read or decoded. The samples are sorted by class, which is the worst case. Three
epochs of each order are measured in batches of 256:

- `neighbour_correlation`: Spearman's rank correlation of the storage positions of successive samples; 1 for storage
  order, 0 for a full shuffle. `largest_correlation` is the largest for distances of 1 to 256 samples.
- `class_distance`: total variation distance between the classes of a batch and of the dataset, mean over batches; a
  full shuffle is the optimum, up to chance. `classes_per_batch` is the number of distinct classes.
- `chi_square`: Pearson's chi-square of a batch's classes per degree of freedom; 1 for a full shuffle.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import webdataset
from numpy.typing import NDArray

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.config import DataConfig, compose
from pipelines.shards.order import SampleOrder

BATCH = 256
EPOCHS = 3
LAGS = 256
READERS = 16
Ints = NDArray[np.int64]
Order = Callable[[int], Ints]
"""Number of an epoch -> storage positions in the order in which they are read."""


@dataclass(frozen=True)
class Stored:
    """A dataset in shards of equal size, sorted by class."""

    shards: int
    shard_samples: int
    classes: int

    @property
    def title(self) -> str:
        """Its name in a table."""
        return f"{self.classes:,} classes, {self.shards:,} shards of {self.shard_samples:,}"

    @property
    def total(self) -> int:
        """The number of samples."""
        return self.shards * self.shard_samples

    def labels(self, positions: Ints) -> Ints:
        """Return the class of the sample at each storage position."""
        return positions * self.classes // self.total


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("shuffle", __doc__, quick="one epoch of the smaller data").parse_args(arguments)
    size, few = options.size, Stored(100, 1000, 10)
    kinds = size.of([few, Stored(1280, 1000, 1000)], [few], [Stored(20, 100, 10)])
    began = time.perf_counter()
    rows = [
        {"data": stored.title, "system": system, **measure(order, stored, size.of(EPOCHS, 1, 1))}
        for stored in kinds
        for system, order in orders(stored).items()
    ]
    result = {
        "benchmark": "shuffle",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "webdataset": version("webdataset")},
        "batch_size": BATCH,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }
    publish(result, "shuffle", options)


def orders(stored: Stored) -> dict[str, Order]:
    """Return the orders to compare, by name."""
    fields = DataConfig.model_fields
    folder = compose(["data=folder", "model=unet_small", "data.num_classes=1"]).data
    shapes = sorted({(fields["lanes"].default, fields["window"].default), (folder.lanes, folder.window)})
    return {
        "storage order": lambda epoch: np.arange(stored.total),
        "full shuffle": lambda epoch: np.random.default_rng(epoch).permutation(stored.total),
        **{f"ours, {lanes} lanes, window {window}": lanes_order(stored, lanes, window) for lanes, window in shapes},
        "WebDataset, 1 reader": partial(buffered, stored, 1),
        f"WebDataset, {READERS} readers": partial(buffered, stored, READERS),
    }


def lanes_order(stored: Stored, lanes: int, window: int) -> Order:
    """Return the order of this project's training stream."""
    order = SampleOrder([stored.shard_samples] * stored.shards, lanes=lanes, window=window, seed=0, digest="benchmark")

    def positions(epoch: int) -> Ints:
        found = order.locate(np.arange(epoch * stored.total, (epoch + 1) * stored.total))
        return found.shards * stored.shard_samples + found.indices

    return positions


def buffered(stored: Stored, readers: int, epoch: int) -> Ints:
    """Return the order of `WebDataset(urls, shardshuffle=100).shuffle(1000)`, computed with WebDataset's own stages.

    Each reader has its share of the shards. Readers alternate sample by sample, the best case for mixing.
    """
    streams = [
        _reader(stored, range(reader, stored.shards, readers), 1000 * epoch + reader) for reader in range(readers)
    ]
    turns = itertools.zip_longest(*streams)
    return np.fromiter((n for turn in turns for n in turn if n is not None), np.int64, stored.total)


def _reader(stored: Stored, shards: range, seed: int) -> Iterator[int]:
    size = stored.shard_samples
    names = webdataset.shuffle(100, seed=seed)(iter(shards))
    samples = itertools.chain.from_iterable(range(shard * size, (shard + 1) * size) for shard in names)
    return webdataset.shuffle(1000, seed=seed)(samples)


def measure(order: Order, stored: Stored, epochs: int) -> dict[str, float]:
    """Return the measures of an order over some epochs."""
    found = [order(epoch) for epoch in range(epochs)]
    for positions in found:
        assert len(np.unique(positions)) == stored.total
    correlations = np.mean([autocorrelation(positions) for positions in found], axis=0)
    batches = np.concatenate([p[: stored.total // BATCH * BATCH].reshape(-1, BATCH) for p in found])
    counts = np.stack([np.bincount(labels, minlength=stored.classes) for labels in stored.labels(batches)])
    expected = BATCH / stored.classes
    return {
        "neighbour_correlation": round(float(correlations[0]), 4),
        "largest_correlation": round(float(correlations.max()), 4),
        "class_distance": round(float(np.abs(counts - expected).sum(1).mean() / (2 * BATCH)), 4),
        "classes_per_batch": round(float((counts > 0).sum(1).mean()), 2),
        "chi_square": round(float(((counts - expected) ** 2 / expected).sum(1).mean() / (stored.classes - 1)), 2),
    }


def autocorrelation(positions: Ints) -> NDArray[np.float64]:
    """Return the rank autocorrelation at distances of 1 to LAGS samples; storage positions are ranks."""
    centred = positions - positions.mean()
    power = np.abs(np.fft.rfft(centred, 2 * len(centred))) ** 2
    products = np.fft.irfft(power)[: LAGS + 1]
    return products[1:] / products[0]


if __name__ == "__main__":
    main()
