"""Captions of a dataset: the width of their embeddings, and captions of some images with their embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.conditioning import Conditioning
from pipelines.shards.index import Dataset, DatasetError, ShardIndex
from pipelines.shards.members import FlawError, decode_label, require_member, unpack_embedding
from pipelines.shards.read import ShardReader
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import Storage, layout

LOOKED_AT = 10
"""Number of samples examined for the width of a dataset's embeddings, because the first ones may be damaged."""
PART = 256
"""Samples per read."""


@dataclass(frozen=True)
class Captions:
    """Captions of images, with the embeddings that an ingest has computed.

    Attributes:
        positions: positions of the images in the shard order of their split, int64 [N].
        texts: captions; for samples that have only embeddings, a text that distinguishes them.
        tokens: embeddings of the tokens of each caption, float32 [L, D].
        pooled: embeddings of the whole captions, float32 [N, D].
        labels: classes of the images, int64 [N]; None for data without labels.
    """

    positions: NDArray[np.int64]
    texts: tuple[str, ...]
    tokens: tuple[Tensor, ...]
    pooled: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.texts)

    @cached_property
    def different(self) -> tuple[Tensor, Tensor]:
        """Indices of the first caption of each distinct text, int64 [U], and the distinct text of every caption,
        [N]."""
        order = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        first = [self.texts.index(text) for text in order]
        return torch.tensor(first), torch.tensor([order[text] for text in self.texts])

    @property
    def digest(self) -> str:
        """SHA-256 over texts, embeddings and labels."""
        found = hashlib.sha256("\0".join(self.texts).encode())
        for tensor in (self.pooled, *self.tokens, *([] if self.labels is None else [self.labels])):
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    def shuffled(self, seed: int) -> Captions:
        """Return the captions in a seeded random order: the first few of a split may all be of one class."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return Captions(
            self.positions[order.numpy()],
            tuple(self.texts[place] for place in order.tolist()),
            tuple(self.tokens[place] for place in order.tolist()),
            self.pooled[order],
            None if self.labels is None else self.labels[order],
        )

    def condition(self, places: Tensor, *, labels: bool) -> Conditioning:
        """Return the condition of pictures that are drawn from these captions.

        Args:
            places: of the captions, int64 [B].
            labels: whether it has the classes of their images too.
        """
        cond = Conditioning.of_text([self.tokens[place] for place in places.tolist()], self.pooled[places])
        return replace(cond, label=self.labels[places]) if labels and self.labels is not None else cond


def read_captions(reader: ShardReader, positions: NDArray[np.int64], *, empty: bool = False) -> Captions:
    """Read the captions of the images at these positions of a split; the images are not decoded.

    Args:
        positions: in shard order, int64 [N].
        empty: whether images whose caption is the empty text are among them.

    Raises:
        ShardCorruptError: a sample has no embedding, or one that cannot be read.
    """
    kept, texts, tokens, pooled, labels = [], [], [], [], []
    for first in range(0, len(positions), PART):
        part = positions[first : first + PART]
        for position, sample in zip(part.tolist(), reader.samples(reader.located(part)), strict=True):
            try:
                text, whole, each = _caption(sample)
                label = decode_label(require_member(sample, "cls")) if reader.dataset.classes else None
            except FlawError as error:
                raise ShardCorruptError(f"{sample['__url__']}: sample {sample['__key__']} {error}") from error
            if text.strip() or empty:
                kept.append(position)
                texts.append(text)
                tokens.append(each)
                pooled.append(whole)
                labels.append(label)
    return Captions(
        np.array(kept, np.int64),
        tuple(texts),
        tuple(tokens),
        torch.stack(pooled) if pooled else torch.zeros(0, 0),
        torch.tensor(labels) if reader.dataset.classes else None,
    )


def caption_width(dataset: Dataset, split: str, storage: Storage) -> int | None:
    """Return the width of the caption embeddings of a split; None if its samples have none.

    Raises:
        DatasetError: they cannot be read, or a network cannot be conditioned on them.
    """
    shard = dataset.shards(split)[0]
    index = ShardIndex.from_json(storage.read(layout.index_name(shard.address(dataset.uri))))
    there = [row for row in index.rows("emb.npy") if row[0] >= 0] if "emb.npy" in index.columns else []
    problem: FlawError | None = None
    for offset, size, _ in there[:LOOKED_AT]:
        try:
            pooled, text = unpack_embedding(storage.read(shard.address(dataset.uri), offset, offset + size))
        except FlawError as error:
            problem = error
            continue
        widths = [None if each is None else each.shape[-1] for each in (pooled, text)]
        if None in widths or widths[0] != widths[1]:
            raise DatasetError(
                f"{dataset.uri}: the embeddings of captions have widths {widths[0]} (pooled) and {widths[1]} (text), "
                "and a network on text takes both, alike: ingest the data again with data.text_encoder"
            )
        return int(widths[0] or 0)
    if problem is not None:
        raise DatasetError(f"{dataset.uri}: {problem}")
    return None


def _caption(sample: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Return the text of a sample with the embeddings of the whole text [D] and of its tokens [L, D]."""
    data = require_member(sample, "emb.npy")
    pooled, text = unpack_embedding(data)
    if pooled is None or text is None:
        raise FlawError("embedding", "has an emb.npy without `pooled` or `text`")
    name = sample["txt"].decode(errors="replace") if "txt" in sample else hashlib.sha256(data).hexdigest()
    return name, torch.from_numpy(pooled.astype(np.float32)), torch.from_numpy(text.astype(np.float32))
