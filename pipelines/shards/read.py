"""Reading samples: from places in shards to members, and from members to batches of pixels and labels."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.shards.fetch import ShardCorruptError, ShardFetcher
from pipelines.shards.index import Dataset, Quarantine, ShardIndex, kept_samples, kept_shards
from pipelines.shards.members import FlawError, decode_image, decode_label
from pipelines.shards.order import Located
from pipelines.storage import join


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
    """Random access to the samples of a split, from any thread.

    Args:
        dataset: what there is.
        split: "train" or "test".
        fetcher: brings the bytes.
        quarantine: what to leave out; the order of samples then needs `stream_digest(dataset, quarantine)`.

    Attributes:
        shards: with the number of samples that are left in each.

    Raises:
        DatasetError: no such split, or a quarantine of another dataset.
    """

    def __init__(
        self, dataset: Dataset, split: str, fetcher: ShardFetcher, quarantine: Quarantine | None = None
    ) -> None:
        self.dataset, self.split, self.fetcher, self.quarantine = dataset, split, fetcher, quarantine
        self.shards = kept_shards(dataset, split, quarantine)
        self._recorded = {shard.name: shard for shard in dataset.shards(split)}
        self._index = lru_cache(maxsize=1024)(self._read_index)

    def close(self) -> None:
        """Stop what is read ahead."""
        self.fetcher.close()

    def members(self, located: Located) -> list[tuple[str, dict[str, bytes]]]:
        """(key, members by extension) of each sample; the spans of one shard are fetched together.

        Raises:
            ShardCorruptError: a shard is damaged.
            StorageError: the store cannot be reached, or has no such shard.
        """
        by_shard: dict[int, list[int]] = defaultdict(list)
        for place, shard in enumerate(located.shards.tolist()):
            by_shard[shard].append(place)
        found: list[tuple[str, dict[str, bytes]]] = [("", {})] * len(located.shards)
        for shard, places in by_shard.items():
            index = self._index(shard)
            at = located.indices[places].tolist()
            spans = [(m.offset, m.offset + m.size) for i in at for m in index.members[i].values()]
            parts = iter(self.fetcher.read(self._recorded[self.shards[shard].name], spans))
            for place, i in zip(places, at, strict=True):
                found[place] = index.keys[i], {extension: next(parts) for extension in index.members[i]}
        return found

    def samples(self, located: Located) -> list[dict[str, Any]]:
        """The samples as WebDataset has them: `__key__`, `__url__`, bytes by extension; and `__ordinal__`."""
        places = zip(self.members(located), located.shards.tolist(), located.ordinals.tolist(), strict=True)
        return [
            {
                "__key__": key,
                "__url__": join(self.dataset.uri, self.shards[shard].name),
                "__ordinal__": ordinal,
                **found,
            }
            for (key, found), shard, ordinal in places
        ]

    def batch(self, located: Located) -> Batch:
        """Read and decode samples.

        Raises:
            ShardCorruptError: a shard or one of its images is damaged.
            StorageError: the store cannot be reached, or has no such shard.
        """
        size, channels = self.dataset.image_size, self.dataset.channels
        pixels = np.empty((len(located.shards), size, size, channels), np.uint8)
        labels = []
        for place, (key, members) in enumerate(self.members(located)):
            try:
                pixels[place] = self._decode(members)
                if "cls" in members:
                    labels.append(decode_label(members["cls"]))
            except FlawError as error:
                raise ShardCorruptError(
                    f"{self.dataset.uri}: sample {key} of {self.shards[int(located.shards[place])].name} {error}; "
                    f"see all such samples with `ddpm check {self.dataset.uri}`"
                ) from error
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return Batch(
            torch.from_numpy(located.ordinals),
            images.float().div_(127.5).sub_(1).contiguous(),
            torch.tensor(labels) if labels else None,
        )

    def _decode(self, members: dict[str, bytes]) -> NDArray[np.uint8]:
        pixels = decode_image(members, self.dataset.channels)
        size = self.dataset.image_size
        if pixels.shape[:2] != (size, size):
            raise FlawError("shape", f"is {pixels.shape[0]}x{pixels.shape[1]}, dataset.json says {size}x{size}")
        return pixels

    def _read_index(self, shard: int) -> ShardIndex:
        name = self.shards[shard].name
        return kept_samples(name, self.fetcher.index(self._recorded[name]), self.quarantine)


def read_split(reader: ShardReader) -> Batch:
    """Every sample of a split in shard order, from shards that are whole and verified where there is a cache."""
    kept = {shard.name for shard in reader.shards}
    reader.fetcher.require([shard for shard in reader.dataset.shards(reader.split) if shard.name in kept])
    counts = [shard.samples for shard in reader.shards]
    shards = np.repeat(np.arange(len(counts)), counts)
    indices = np.concatenate([np.arange(count) for count in counts])
    return reader.batch(Located(np.arange(len(shards)), shards, indices))


def default_cache_dir() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm" / "shards"
