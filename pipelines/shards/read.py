"""Read samples: from positions in shards to members, and from members to batches of pixels and labels."""

from __future__ import annotations

import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.presentation.errors import PipelineError
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Dataset, Member, ShardIndex, ShardInfo
from pipelines.shards.members import (
    IMAGE_MEMBERS,
    Embedding,
    FlawError,
    decode_label,
    decode_pixels,
    require_member,
    unpack_embedding,
)
from pipelines.shards.order import Located
from pipelines.shards.quarantine import Quarantine, kept_counts, kept_samples, kept_shards, read_quarantine
from pipelines.shards.source import ShardCorruptError
from pipelines.shards.working_set import WorkingSet
from pipelines.storage import Storage


@dataclass(frozen=True)
class Batch:
    """A batch of decoded samples.

    Attributes:
        ordinals: ordinals of the samples in the stream, int64 [B].
        images: pixels in [-1, 1], float32 [B, C, S, S].
        labels: class indices, int64 [B], -1 for samples of a source without labels; None for data without labels.
        text: token embeddings, float32 [B, L, D], padded with zeros; None where they were not requested.
        text_mask: True for tokens, False for padding, bool [B, L].
        pooled: embeddings of the whole texts, float32 [B, D].
        sources: of a mixture, the number of each sample's source, int64 [B].
    """

    ordinals: Tensor
    images: Tensor
    labels: Tensor | None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    sources: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ordinals)

    def __getitem__(self, span: slice | Tensor) -> Batch:
        """Return some of the samples, by a range, a mask or indices."""
        return self._each(lambda tensor: tensor[span])

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which it can be copied while a GPU computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        there = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in there.items() if tensor is not None})


class ShardReader:
    """Random access to the samples of a split, from any thread.

    Args:
        dataset: the dataset.
        split: name of a split, such as "train".
        fetcher: fetches the bytes of members.
        quarantine: samples to leave out; the order of samples then needs `stream_digest(dataset, quarantine)`.
        text: whether batches have the text embeddings that were computed at ingest.
        memory_bytes: the pixels of a split that takes no more than this are kept once they are decoded, which spares
            the training step the wait for the interpreter; not where batches have text.

    Attributes:
        shards: the shards of the split, with the number of samples that are left in each.

    Raises:
        DatasetError: there is no such split, or the quarantine is of another dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        fetcher: ShardFetcher,
        quarantine: Quarantine | None = None,
        *,
        text: bool = False,
        memory_bytes: int = 0,
    ) -> None:
        self.dataset, self.split, self.fetcher, self.quarantine, self.text = dataset, split, fetcher, quarantine, text
        self.shards = kept_shards(dataset, split, quarantine)
        decoded = self.total * math.prod(dataset.shape)
        self._memory = _Memory(dataset, self.shards.samples) if decoded <= memory_bytes and not text else None
        self._selected: dict[str, ShardIndex] = {}
        counts = None if quarantine is None else kept_counts(dataset, split, quarantine)
        self._recorded = None if counts is None else np.flatnonzero(counts > 0)
        numbers = {source.name: number for number, source in enumerate(dataset.sources)}
        of_table = np.array([numbers[source.name] for source in self.shards.sources], dtype=np.int64)
        self._sources = of_table[self.shards.source_of] if self.shards.sources else None

    @property
    def total(self) -> int:
        """The number of samples that are left."""
        return int(self.shards.samples.sum())

    def close(self) -> None:
        """Stop the fetcher."""
        self.fetcher.close()

    def samples(self, located: Located) -> list[dict[str, Any]]:
        """Return samples as WebDataset does, with `__key__`, `__url__` and bytes by extension, and with `__ordinal__`.

        The `cls` of a sample of a mixture is its class there.

        Raises:
            ShardCorruptError: a shard is damaged.
            StorageError: the store cannot be reached, or has no such shard.
        """
        found: list[dict[str, Any]] = [{}] * len(located.shards)
        for group, contents in self._read(located, lambda index, at: [index.members(i) for i in at]):
            for place, i, members in zip(group.places, group.at, contents, strict=True):
                found[place] = {
                    "__key__": group.index.keys[i],
                    "__url__": group.shard.address(self.dataset.uri),
                    "__ordinal__": int(located.ordinals[place]),
                    **{name: bytes(data) for name, data in members.items()},
                }
                if group.shard.source is not None and "cls" in members:
                    try:
                        found[place]["cls"] = str(_label(group.shard, members)).encode()
                    except FlawError as error:
                        raise self._named(group, i, error) from error
        return found

    def batch(self, located: Located) -> Batch:
        """Read and decode samples.

        Raises:
            ShardCorruptError: a shard or one of its samples is damaged, or a sample lacks a member that others have.
            StorageError: the store cannot be reached, or has no such shard.
        """
        if self._memory is None:
            pixels, labels, embeddings = self._decode(located)
        else:
            pixels, labels, embeddings = *self._memory.get(located, lambda part: self._decode(part)[:2]), []
        return Batch(
            torch.from_numpy(located.ordinals),
            torch.from_numpy(pixels).float().div_(127.5).sub_(1),
            torch.from_numpy(labels) if self.dataset.classes else None,
            *(_padded(embeddings) if self.text else (None, None, None)),
            None if self._sources is None else torch.from_numpy(self._sources[located.shards]),
        )

    def _decode(self, located: Located) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[Embedding]]:
        """Read and decode samples; see `batch`.

        Returns:
            Pixels, uint8 [B, C, H, W]; labels, int64 [B], all 0 for data without any; and embeddings.
        """
        (channels, *sides), count = self.dataset.shape, len(located.shards)
        pixels = np.empty((count, *sides, channels), np.uint8)
        labels = np.zeros(count, np.int64)
        embeddings: list[Embedding] = [(None, None)] * count
        for group, contents in self._read(located, self._needed):
            for place, i, members in zip(group.places, group.at, contents, strict=True):
                try:
                    pixels[place] = decode_pixels(members, self.dataset.image_size, channels)
                    if self.dataset.classes:
                        labels[place] = _label(group.shard, members)
                    if self.text:
                        embeddings[place] = unpack_embedding(require_member(members, "emb.npy"))
                except FlawError as error:
                    raise self._named(group, i, error) from error
        # Channels are moved while a pixel is one byte, because that copies a quarter of the bytes.
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels, embeddings

    def _named(self, group: _Group, i: int, error: FlawError) -> ShardCorruptError:
        """Return the error of a member that is wrong with the name of its sample, sample i of a shard."""
        folder = group.shard.folder(self.dataset.uri)
        return ShardCorruptError(
            f"{folder}: sample {group.index.keys[i]} of {group.shard.name} {error}; "
            f"see all such samples with `ddpm check {folder}`"
        )

    def at(self, positions: NDArray[np.int64]) -> Batch:
        """Read and decode the samples at these positions in shard order, int64 [B]; ordinals are the positions."""
        return self.batch(self.located(positions))

    def located(self, positions: NDArray[np.int64]) -> Located:
        """Return where the samples at these positions in shard order are, int64 [B]; ordinals are the positions."""
        ends = np.cumsum(self.shards.samples)
        shards = np.searchsorted(ends, positions, side="right")
        return Located(positions, shards, positions - np.concatenate([[0], ends])[shards])

    def _needed(self, index: ShardIndex, at: list[int]) -> list[dict[str, Member]]:
        """Return the members of each sample that a batch needs: one image, the label, the embedding."""
        needed: list[dict[str, Member]] = [{} for _ in at]
        for name in (*IMAGE_MEMBERS, "cls", *(("emb.npy",) if self.text else ())):
            if name not in index.columns:
                continue
            for members, row in zip(needed, index.rows(name, at), strict=True):
                if row[0] >= 0 and not (members and name in IMAGE_MEMBERS):
                    members[name] = Member(*row)
        return needed

    def _kept(self, name: str, index: ShardIndex) -> ShardIndex:
        """Return the index of a shard without samples in quarantine; few shards have any, so the results are kept."""
        if self.quarantine is None or name not in self.quarantine.by_shard:
            return index
        if name not in self._selected:
            self._selected[name] = kept_samples(name, index, self.quarantine)
        return self._selected[name]

    def _read(
        self, located: Located, choose: Callable[[ShardIndex, list[int]], list[dict[str, Member]]]
    ) -> Iterator[tuple[_Group, list[dict[str, memoryview]]]]:
        """Yield the samples of a batch shard by shard, with the bytes of the chosen members of each."""
        by_shard: dict[int, list[int]] = defaultdict(list)
        for place, shard in enumerate(located.shards.tolist()):
            by_shard[shard].append(place)
        recorded = self.dataset.shards(self.split)
        infos = [recorded[shard if self._recorded is None else int(self._recorded[shard])] for shard in by_shard]
        groups = []
        for info, index, places in zip(infos, self.fetcher.indexes(infos), by_shard.values(), strict=True):
            kept = self._kept(info.name, index)
            groups.append(_Group(info, kept, places, located.indices[places].tolist()))
        chosen = [choose(group.index, group.at) for group in groups]
        wanted = [
            (group.shard, [member for members in samples for member in members.values()])
            for group, samples in zip(groups, chosen, strict=True)
        ]
        for group, samples, data in zip(groups, chosen, self.fetcher.read(wanted), strict=True):
            parts = iter(data)
            yield group, [{name: next(parts) for name in members} for members in samples]


@dataclass(frozen=True)
class _Group:
    """The samples of a batch that are in one shard: `places` in the batch, and indices `at` in the shard."""

    shard: ShardInfo
    index: ShardIndex
    places: list[int]
    at: list[int]


def _label(shard: ShardInfo, members: Mapping[str, Any]) -> int:
    """Return the class of a sample, in a mixture that of the mixture, or -1 where its source has none.

    Raises:
        FlawError: it has no label, or one that its source has no class for.
    """
    if shard.source is not None and not shard.source.labels:
        return -1
    label = decode_label(bytes(require_member(members, "cls")))
    if shard.source is None:
        return label
    if label >= len(shard.source.labels):
        raise FlawError("label", f"has the label {label}, and its dataset has {len(shard.source.labels)} classes")
    return shard.source.labels[label]


class _Memory:
    """Pixels and labels of a split, each from the first time that it is decoded on; for any number of threads."""

    def __init__(self, dataset: Dataset, counts: NDArray[np.int64]) -> None:
        ends = np.cumsum(counts)
        self.firsts = np.concatenate([[0], ends[:-1]])
        self.pixels = np.empty((ends[-1], *dataset.shape), np.uint8)
        self.labels = np.zeros(ends[-1], np.int64)
        self.known = np.zeros(ends[-1], bool)

    def get(
        self, located: Located, decode: Callable[[Located], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the pixels and labels of samples, and decode those that are new."""
        at = self.firsts[located.shards] + located.indices
        new = ~self.known[at]
        if new.any():
            part = Located(located.ordinals[new], located.shards[new], located.indices[new])
            self.pixels[at[new]], self.labels[at[new]] = decode(part)
            self.known[at[new]] = True  # after they are there, for other threads
        return self.pixels[at], self.labels[at]


def _padded(embeddings: list[Embedding]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (text, text_mask, pooled) of a batch, as in `Batch`."""
    pooled = [torch.from_numpy(p.astype(np.float32)) for p, _ in embeddings if p is not None]
    tokens = [torch.from_numpy(t.astype(np.float32)) for _, t in embeddings if t is not None]
    together = torch.stack(pooled) if pooled else None
    if not tokens:
        return None, None, together
    text = pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(t) for t in tokens])
    return text, torch.arange(text.shape[1])[None] < lengths[:, None], together


@contextmanager
def opened_split(
    dataset: Dataset, split: str, storage: Storage, cache_dir: str | None, cache_gib: float, *, text: bool = False
) -> Iterator[ShardReader]:
    """Open a split without the samples in quarantine, through the node's shard cache where it fits into that.

    Args:
        cache_dir: the node's shard cache; None for the default one.
        cache_gib: its size.
        text: whether batches have the text embeddings that were computed at ingest.
    """
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    one_by_one = WorkingSet.of([(1, dataset.shards(split))], 1, 1)
    fetcher = ShardFetcher.opened(dataset.uri, storage, folder, int(cache_gib * 2**30), one_by_one)
    with closing(ShardReader(dataset, split, fetcher, read_quarantine(dataset.uri, storage), text=text)) as reader:
        yield reader


def read_split(reader: ShardReader) -> Batch:
    """Read all samples of a split in shard order, after completing and verifying its shards in the cache, if any."""
    kept = set(reader.shards.names)
    reader.fetcher.require([shard for shard in reader.dataset.shards(reader.split) if shard.name in kept])
    return reader.at(np.arange(reader.total))


def split_batches(reader: ShardReader, batch_size: int) -> Iterator[Batch]:
    """Yield all samples of a split in shard order, in memory for one batch; ordinals count them from 0."""
    for first in range(0, reader.total, batch_size):
        yield reader.at(np.arange(first, min(first + batch_size, reader.total)))


def spread_positions(count: int, most: int) -> NDArray[np.int64]:
    """Return at most so many positions, spread evenly over `count`, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def default_cache_dir() -> Path:
    """Return the shard cache in the user's cache folder, or below TMPDIR where the user has none that can be written.

    Raises:
        CacheFolderError: the folder below TMPDIR is another user's.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user ID that no name belongs to
        base = None
    if base is None or not (named or _can_be_made(base)):
        base = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
        if base.is_symlink() or (base.exists() and base.stat().st_uid != os.getuid()):
            raise CacheFolderError(f"{base} is another user's: set XDG_CACHE_HOME, or data.cache_dir")
    return base / "ddpm" / "shards"


class CacheFolderError(PipelineError):
    """There is no folder for the shard cache."""


def _can_be_made(folder: Path) -> bool:
    """Return whether this user may write in a folder, or make it."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(place, os.W_OK | os.X_OK)
