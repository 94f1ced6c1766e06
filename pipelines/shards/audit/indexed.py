"""What an index finds in one tar: its entry in dataset.json, its problems, and counts over its samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.shards.audit.recorded import Advance, Tar
from pipelines.shards.audit.scan import ObjectStream, scan_shard
from pipelines.shards.index import ShardInfo
from pipelines.shards.members import Examined, SampleFormat
from pipelines.shards.quarantine import Problem
from pipelines.storage import Storage, join, layout


class Tally:
    """Counts over the flawless samples of a shard: pixels by value, and labels.

    All counts are integers, so sums do not depend on the order of shards.
    """

    def __init__(self) -> None:
        self.grey = np.zeros((1, 256), dtype=np.int64)
        self.colour = np.zeros((3, 256), dtype=np.int64)
        self.coloured = self.labelled = self.samples = 0
        self.top_label = -1

    def add(self, sample: Examined) -> None:
        """Count one sample."""
        assert sample.pixels is not None
        channels = sample.pixels.shape[-1]
        counts = self.grey if channels == 1 else self.colour
        for c in range(channels):
            counts[c] += np.bincount(sample.pixels[..., c].ravel(), minlength=256)
        self.samples += 1
        self.coloured += channels == 3
        self.labelled += sample.label is not None
        self.top_label = max(self.top_label, -1 if sample.label is None else sample.label)

    def include(self, part: Tally) -> None:
        """Add the counts of another shard."""
        self.grey += part.grey
        self.colour += part.colour
        self.coloured += part.coloured
        self.labelled += part.labelled
        self.samples += part.samples
        self.top_label = max(self.top_label, part.top_label)

    def to_plain(self) -> dict[str, Any]:
        """Return the counts as JSON types."""
        return {**vars(self), "grey": self.grey.tolist(), "colour": self.colour.tolist()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Tally:
        """Return the counts of a record.

        Raises:
            ValueError, KeyError or TypeError: it is damaged.
        """
        whole = cls()
        whole.grey += np.array(plain["grey"], dtype=np.int64)
        whole.colour += np.array(plain["colour"], dtype=np.int64)
        for name in ("coloured", "labelled", "samples", "top_label"):
            setattr(whole, name, int(plain[name]))
        return whole

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of pixels in [-1, 1] per channel; a grey image counts in every channel."""
        counts = self.grey if channels == 1 else self.colour + self.grey
        values = np.arange(256)
        mean, std = [], []
        for n, s, q in zip(
            counts.sum(1).tolist(), (counts @ values).tolist(), (counts @ values**2).tolist(), strict=True
        ):
            mean.append(round(s / n / 127.5 - 1, 6))
            std.append(round((n * q - s * s) ** 0.5 / n / 127.5, 6))
        return tuple(mean), tuple(std)


@dataclass(frozen=True)
class IndexedTar:
    """One shard, with its problems and counts.

    Attributes:
        info: what dataset.json says of it.
        problems: in order of sample.
        tally: counts over its flawless samples.
        sidecar_bytes: size of the sidecar that was written.
    """

    info: ShardInfo
    problems: tuple[Problem, ...]
    tally: Tally
    sidecar_bytes: int


@dataclass(frozen=True)
class IndexTar:
    """Scan a tar and write its sidecar, so that only the tars being scanned are in memory.

    Attributes:
        uri: folder of the dataset.
        storage: the store.
        form: the properties that every sample must have.
    """

    uri: str
    storage: Storage
    form: SampleFormat

    def inputs(self, tar: Tar) -> Any:
        """Return what decides the result besides the tar."""
        return asdict(self.form)

    def __call__(self, tar: Tar, advance: Advance) -> IndexedTar:
        """Return what is in the tar."""
        tally = Tally()
        stream = ObjectStream(tar.entry.uri, tar.entry.size, self.storage, advance)
        found = scan_shard(tar.name, stream, self.form, tally.add)
        sidecar = found.index.to_json().encode()
        self.storage.write(join(self.uri, layout.index_name(tar.name)), sidecar)
        info = ShardInfo(tar.name, len(found.index), found.bytes, found.sha256)
        return IndexedTar(info, found.problems, tally, len(sidecar))

    def to_plain(self, result: IndexedTar) -> Any:
        """Return a result as JSON types."""
        info, problems = result.info, [asdict(problem) for problem in result.problems]
        counts = {"samples": info.samples, "bytes": info.bytes, "sha256": info.sha256}
        return {**counts, "problems": problems, "tally": result.tally.to_plain(), "sidecar_bytes": result.sidecar_bytes}

    def from_plain(self, plain: Any, tar: Tar) -> IndexedTar:
        """Return the result of a record.

        Raises:
            ValueError, KeyError or TypeError: it is damaged, or its sidecar is not there any more.
        """
        if tar.sidecar is None or tar.sidecar.size != plain["sidecar_bytes"]:
            raise ValueError(f"{tar.name} has another sidecar than its record")
        info = ShardInfo(tar.name, plain["samples"], plain["bytes"], plain["sha256"])
        problems = tuple(Problem(**problem) for problem in plain["problems"])
        return IndexedTar(info, problems, Tally.from_plain(plain["tally"]), plain["sidecar_bytes"])
