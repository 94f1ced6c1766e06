"""Which images of the train split train an evaluator, and which are left to be the reference that models are judged by.

A network's features of images that it was trained on differ from those of images that it has never seen. A model that
copies its training images would be rewarded for that, and every other one punished: so the two sets are disjoint where
the images are enough for both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.shards.index import Dataset
from pipelines.shards.order import feistel
from pipelines.shards.quarantine import Quarantine, kept_shards, read_quarantine
from pipelines.shards.read import Batch
from pipelines.storage import Storage

MAX_IMAGES = 50_000
"""Images that train an evaluator, whatever the size of the dataset."""
ENOUGH = 1_000
"""Train images from which on they are shared out; of fewer, all train the evaluator and are the reference as well."""


@dataclass(frozen=True)
class TrainShare:
    """Some images of a train split, drawn without replacement by a key: a pure function of the fields.

    Attributes:
        dataset_digest: digest of the dataset; the key.
        total: number of images in the train split, those in quarantine included.
        count: number of images in the share.
    """

    dataset_digest: str
    total: int
    count: int

    def trained(self, positions: Tensor) -> Tensor:
        """Return which images are in the share, bool [N], by their position in the split, int64 [N].

        Positions are those in shard order, and count the images in quarantine as well; see `split_positions`.
        """
        at = positions.numpy()
        key = hashlib.sha256(f"{self.dataset_digest}/evaluator".encode()).digest()
        drawn = feistel(at, np.full_like(at, self.total), int.from_bytes(key[:8], "little") & (2**63 - 1))
        return torch.from_numpy(drawn < self.count)

    def reference(self, positions: Tensor) -> Tensor:
        """Return which images belong to the reference, bool [N]: those not in the share; all where none would be left.

        Args:
            positions: as for `trained`.
        """
        return torch.ones(len(positions), dtype=torch.bool) if self.count == self.total else ~self.trained(positions)


def default_share(dataset: Dataset) -> TrainShare:
    """Return the share of a dataset that trains its evaluator: half of the train split, `MAX_IMAGES` at most."""
    total = dataset.samples("train")
    return TrainShare(dataset.digest, total, total if total < ENOUGH else min(total // 2, MAX_IMAGES))


def reference_mask(
    share: TrainShare | None, dataset: Dataset, quarantine: Quarantine | None, ordinals: Tensor
) -> Tensor:
    """Return which images of the train split belong to the reference, bool [N]; all where an evaluator has no share.

    Args:
        share: of the evaluator.
        dataset: that it judges.
        quarantine: of the reader.
        ordinals: of the images, as `split_batches` numbers them, int64 [N].
    """
    if share is None:
        return torch.ones(len(ordinals), dtype=torch.bool)
    return share.reference(split_positions(dataset, quarantine, ordinals))


def reference_part(share: TrainShare | None, dataset: Dataset, storage: Storage, train: Batch) -> Batch:
    """Return those images of a whole train split, as `read_split` reads it, that belong to the reference."""
    mask = reference_mask(share, dataset, read_quarantine(dataset.uri, storage), torch.arange(len(train)))
    return train[mask]


def split_positions(dataset: Dataset, quarantine: Quarantine | None, ordinals: Tensor) -> Tensor:
    """Return the positions in the whole train split of images that a reader numbers without those in quarantine.

    A quarantine that is written later must not change which images have trained the evaluator.

    Args:
        dataset: of the images.
        quarantine: of the reader.
        ordinals: of images in shard order, int64 [N].
    """
    if quarantine is None:
        return ordinals
    whole, kept = dataset.shards("train"), kept_shards(dataset, "train", quarantine)
    starts = dict(zip([s.name for s in whole], np.cumsum([0, *[s.samples for s in whole]]).tolist(), strict=False))
    ends = np.cumsum([shard.samples for shard in kept])
    at = ordinals.numpy()
    shards = np.searchsorted(ends, at, side="right")
    positions = np.empty_like(at)
    for number in np.unique(shards).tolist():
        shard, chosen = kept[number], shards == number
        index = at[chosen] - (ends[number] - shard.samples)
        excluded = np.array(sorted(quarantine.by_shard.get(shard.name) or ()), dtype=np.int64)
        # Before the i-th excluded sample there are excluded[i] - i others.
        index += np.searchsorted(excluded - np.arange(len(excluded)), index, side="right")
        positions[chosen] = starts[shard.name] + index
    return torch.from_numpy(positions)
