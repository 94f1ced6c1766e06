"""Images that a dataset never gives again, whoever writes its index or its quarantine next (`ddpm forget`).

They are recorded below the dataset by their digests, never as pictures. A pass that writes `quarantine.json` looks for
them, so that they stay out when a dataset is checked, indexed or ingested again from a source that still has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from pipelines.shards.erased import ImageFile, erasures
from pipelines.shards.index import Dataset, DatasetError, Member, ShardIndex, ShardInfo
from pipelines.shards.members import IMAGE_MEMBERS
from pipelines.shards.quarantine import Problem, Quarantine, make_quarantine, parse_quarantine, store_quarantine
from pipelines.storage import NotFoundError, Storage, join, layout

FORGOTTEN = layout.FORGOTTEN
"""Kind of the problem with which a forgotten sample is in quarantine."""
AT_ONCE = 32


@dataclass(frozen=True)
class Forgetting:
    """A request to forget images of a dataset.

    Attributes:
        images: the images.
        at: when it was asked for, in UTC.
        reason: as it was given.
    """

    images: tuple[ImageFile, ...]
    at: str
    reason: str

    @property
    def id(self) -> str:
        """Digest of the images: equal requests are one."""
        return hashlib.sha256("".join(sorted(image.sha256 for image in self.images)).encode()).hexdigest()[:16]


def record_forgetting(forgetting: Forgetting, uri: str, storage: Storage) -> None:
    """Record a request below a dataset; one that is recorded already stays as it is."""

    def change(stored: bytes | None) -> bytes:
        return stored or json.dumps(asdict(forgetting), indent=1).encode()

    storage.update(join(uri, layout.forget_file(forgetting.id)), change)


def forgettings(uri: str, storage: Storage) -> list[Forgetting]:
    """Return the requests that are recorded below a dataset.

    Raises:
        DatasetError: a record is damaged: without it, nobody knows what must stay out.
    """
    found = []
    for entry in storage.list(join(uri, layout.FORGOTTEN)):
        try:
            plain = json.loads(storage.read(entry.uri))
            images = tuple(ImageFile(**image) for image in plain["images"])
            found.append(Forgetting(images, str(plain["at"]), str(plain["reason"])))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{entry.uri} is damaged ({error!r}), and says what must stay out of the dataset: bring it back"
            ) from error
    return sorted(found, key=lambda each: each.at)


def forgotten_samples(dataset: Dataset, storage: Storage) -> list[Problem]:
    """Return the samples of a dataset that must stay out, for its quarantine.

    Where nothing was ever forgotten, it asks the store once; else it reads every sidecar. What was erased is looked for
    by the blank in its place.

    Raises:
        DatasetError: a record is damaged.
    """
    asked = forgettings(dataset.uri, storage)
    if not asked:
        return []
    wanted = {(image.size, image.crc32): (image.sha256, each.at) for each in asked for image in each.images}
    for erasure in erasures(dataset.uri, storage):
        wanted |= {(each.blank.size, each.blank.crc32): (each.blank.sha256, erasure.at) for each in erasure.samples}
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]

    def look(shard: ShardInfo) -> list[Problem]:
        address = shard.address(dataset.uri)
        try:
            index = ShardIndex.from_json(storage.read(layout.index_name(address)))
        except (NotFoundError, DatasetError):  # a check says so, and nobody reads the shard
            return []
        found = []
        for i, member in _images_of(index, {size for size, _ in wanted}):
            sha256, at = wanted.get((member.size, member.crc32), ("", ""))
            if not sha256:
                continue
            data = storage.read(address, member.offset, member.offset + member.size)
            if hashlib.sha256(data).hexdigest() == sha256:
                found.append(Problem(shard.name, i, index.keys[i], FORGOTTEN, f"was forgotten on {at}"))
        return found

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="forgotten") as pool:
        return [problem for problems in pool.map(look, shards) for problem in problems]


def quarantine_forgotten(dataset: Dataset, storage: Storage) -> Quarantine | None:
    """Put what must stay out of a dataset into its quarantine, beside what others put there; return the quarantine.

    Returns:
        None where nothing was ever forgotten; then nothing is read or written.
    """
    samples = forgotten_samples(dataset, storage)
    if not samples:
        return None
    made: list[Quarantine] = []
    same = {dataset.digest}
    for each in erasures(dataset.uri, storage):
        if dataset.digest in (each.before, each.after):  # samples of these datasets lie where they lay
            same |= {each.before, each.after}

    def change(stored: bytes | None) -> bytes:
        present = None if stored is None else _of(dataset.uri, same, stored)
        made[:] = [make_quarantine(dataset, [*samples, *(() if present is None else present.excluded)])]
        return made[0].to_json().encode()

    storage.update(join(dataset.uri, layout.QUARANTINE), change)
    store_quarantine(made[0], dataset.uri, storage, only_copy=True)
    return made[0]


def _of(uri: str, digests: set[str], stored: bytes) -> Quarantine | None:
    """Return the quarantine in a text; None where it is damaged, or of a dataset with none of these digests."""
    try:
        found = parse_quarantine(stored, uri, layout.QUARANTINE)
    except DatasetError:
        return None
    return found if found.dataset_digest in digests else None


def _images_of(index: ShardIndex, sizes: set[int]) -> Iterable[tuple[int, Member]]:
    for name in IMAGE_MEMBERS:
        if name in index.columns:
            rows = np.array(index.rows(name), dtype=np.int64).reshape(-1, 3)
            for i in np.flatnonzero(np.isin(rows[:, 1], list(sizes)) & (rows[:, 0] >= 0)).tolist():
                yield i, Member(*rows[i].tolist())
