"""Reading of possibly damaged tars in one pass: every sample in order, its flaws, and the SHA-256 of all bytes.

Python's tarfile, and so WebDataset, takes a damaged header or a missing end for the end of the tar, and yields fewer
samples without an error. Here a tar ends only at its end-of-archive marker.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, cast

from pipelines.presentation.errors import PipelineError
from pipelines.shards.index import Member, ShardIndex, split_name
from pipelines.shards.members import KNOWN_MEMBERS, Examined, Flaw, SampleFormat, examine
from pipelines.shards.quarantine import Problem
from pipelines.storage import Storage

BLOCK_BYTES = 4 * 2**20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarFaultError(PipelineError):
    """The structure of a tar is damaged, or its members cannot be read in place.

    Attributes:
        kind: machine-readable kind of the fault.
        reason: description of the fault.
        fix: what to do about it.
        pending: sample that was being read, possibly incomplete; None before the first one.
    """

    def __init__(
        self, kind: str, reason: str, fix: str = "write or copy it again", pending: RawSample | None = None
    ) -> None:
        super().__init__(f"{reason}: {fix}")
        self.kind, self.reason, self.fix, self.pending = kind, reason, fix, pending

    def problem(self, shard: str) -> Problem:
        """Return the fault as a problem of a whole shard."""
        return Problem(shard, None, None, self.kind, str(self))


class ObjectStream:
    """A stored object as a file for `TarFile`: read forward once, in ranges of a few MiB, and hashed.

    Args:
        uri: address of the object.
        size: its size in bytes, from the listing.
        storage: the store.
        advance: called with the number of bytes of each read.
    """

    def __init__(self, uri: str, size: int, storage: Storage, advance: Callable[[int], None] = lambda n: None) -> None:
        self.uri, self.size, self.storage, self.advance = uri, size, storage, advance
        self._hash = hashlib.sha256()
        self._block = memoryview(b"")
        self._start = self._at = self._fetched = 0

    def tell(self) -> int:
        """Return the position in the object."""
        return self._at

    def peek(self) -> bytes:
        """Return the next few bytes without moving."""
        self._fill()
        return bytes(self._block[self._at - self._start :][:16])

    def seek(self, position: int) -> int:
        """Move forward; skipped bytes are hashed, too."""
        assert position >= self._at, f"{self.uri} is read forward only: {self._at} -> {position}"
        while self._at < position and self._fill():
            self._at = min(position, self._fetched)
        return self._at

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        return b"".join(self.parts(size))

    def parts(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes in pieces without copying, fewer at the end."""
        while size > 0 and self._fill():
            part = self._block[self._at - self._start :][:size]
            self._at += len(part)
            size -= len(part)
            yield part

    def drain(self) -> bool:
        """Read to the end, and return whether a byte other than zero was left."""
        anything = False
        while block := self.read(BLOCK_BYTES):
            anything = anything or block.count(0) != len(block)
        return anything

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes read so far; call `drain` before."""
        return self._hash.hexdigest()

    def _fill(self) -> bool:
        """Fetch the next block if none is left, and return whether there is a byte at the position."""
        if self._at < self._fetched:
            return True
        if self._fetched >= self.size:
            return False
        data = bytearray()
        self.storage.fetch(self.uri, self._fetched, min(self._fetched + BLOCK_BYTES, self.size), data.extend)
        self._start, self._block = self._fetched, memoryview(data)
        self._fetched += len(data)
        self._hash.update(data)
        self.advance(len(data))
        return True


class _StrictInfo(tarfile.TarInfo):
    """A tar header that raises `TarFaultError` where tarfile treats a damaged header as the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictInfo:
        """Read the next header."""
        stream = cast(ObjectStream, tarfile_.fileobj)
        at = stream.tell()
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            cut = "without the end-of-archive marker: cut at the border of a member, or its writer was not closed"
            raise TarFaultError("truncated", f"ends at byte {at:,} {cut}" if at else "is empty, 0 bytes") from error
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
            raise TarFaultError("truncated", f"ends inside a header that begins at byte {at:,}") from error
        except tarfile.HeaderError as error:
            raise TarFaultError("archive", f"has a damaged header at byte {at:,}, {error}") from error


@dataclass
class RawSample:
    """Consecutive tar entries with one key.

    Attributes:
        members: extension -> position in the tar.
        contents: extension -> bytes, for known extensions.
        flaws: flaws of the entries themselves.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)


def read_samples(stream: ObjectStream) -> Iterator[RawSample]:
    """Yield the samples of a tar, grouped like WebDataset; only one is in memory at a time.

    Raises:
        TarFaultError: the tar is damaged; the samples before the damage have been yielded.
    """
    start = stream.peek()
    if found := next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None):
        raise TarFaultError(
            "compressed", f"is compressed ({found}), so no member can be read in place", "decompress it"
        )
    sample: RawSample | None = None
    entry = ""
    try:
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], stream), tarinfo=_StrictInfo)
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
            parts = split_name(info.name)
            if parts is not None and _is_data(info, parts[1]):
                key, extension = parts
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = RawSample(key)
                _add(sample, info, extension, stream)
            entry = f", after the entry {info.name!r}"
    except (TarFaultError, tarfile.TarError, ValueError, KeyError, IndexError, OverflowError) as error:
        fault = error if isinstance(error, TarFaultError) else _fault(error, stream)
        raise TarFaultError(fault.kind, fault.reason + entry, fault.fix, sample) from error
    if sample is not None:
        yield sample
    if stream.drain():
        raise TarFaultError(
            "archive", "goes on after its end-of-archive marker, where no reader looks", "do not concatenate tars"
        )


def _is_data(info: tarfile.TarInfo, extension: str) -> bool:
    """Return whether an entry is a regular file.

    Raises:
        TarFaultError: it has holes, or is a link in place of a known member.
    """
    if info.issparse():
        raise TarFaultError("sparse", f"stores {info.name!r} with holes", "write it without --sparse")
    if (info.islnk() or info.issym()) and extension in KNOWN_MEMBERS:
        how = "--hard-dereference" if info.islnk() else "--dereference"
        reason = f"has only a link to {info.linkname!r} as {info.name!r}, which readers skip"
        raise TarFaultError("link", reason, f"write it with `tar {how}`")
    return info.isreg()


def _fault(error: Exception, stream: ObjectStream) -> TarFaultError:
    if "unexpected end of data" in str(error):
        return TarFaultError("truncated", f"ends inside a member at byte {stream.tell():,}")
    return TarFaultError("archive", f"has a damaged header before byte {stream.tell():,}, {error}")


def _add(sample: RawSample, info: tarfile.TarInfo, extension: str, stream: ObjectStream) -> None:
    if extension in sample.members:
        sample.flaws.append(
            Flaw("duplicate", f"has the member {extension} twice, where WebDataset stops with an error")
        )
        return
    if info.offset_data + info.size > stream.size:
        stream.drain()
        raise tarfile.ReadError("unexpected end of data")
    crc32, kept = 0, []
    for part in stream.parts(info.size):
        crc32 = zlib.crc32(part, crc32)
        if extension in KNOWN_MEMBERS:
            kept.append(part)
    sample.members[extension] = Member(info.offset_data, info.size, crc32)
    if extension in KNOWN_MEMBERS:
        sample.contents[extension] = b"".join(kept)


@dataclass(frozen=True)
class ShardScan:
    """The result of one pass over a shard.

    Attributes:
        index: samples up to the first fault of the tar; the last one may then be incomplete and is not checked.
        bytes: size of the whole object.
        sha256: SHA-256 of the whole object.
        problems: problems in order of sample, those of the shard itself last.
    """

    index: ShardIndex
    bytes: int
    sha256: str
    problems: tuple[Problem, ...]


def scan_shard(
    name: str, stream: ObjectStream, form: SampleFormat, seen: Callable[[Examined], None] = lambda sample: None
) -> ShardScan:
    """Read a tar to its end, and check every sample.

    Args:
        name: name of the shard, for its problems.
        stream: the tar, at its start.
        form: the properties that every sample must have.
        seen: called with each sample that has no flaw.
    """
    places: dict[str, int] = {}
    members: list[dict[str, Member]] = []
    keys: list[str] = []
    problems: list[Problem] = []
    try:
        for number, sample in enumerate(read_samples(stream)):
            examined = examine(sample.contents, form, sample.members)
            flaws = [*sample.flaws, *examined.flaws]
            if (first := places.setdefault(sample.key, number)) != number:
                flaws.append(Flaw("duplicate", f"has the key of sample {first}: keys must be unique within a shard"))
            problems += [Problem(name, number, sample.key, flaw.kind, flaw.reason) for flaw in flaws]
            keys.append(sample.key)
            members.append(sample.members)
            if not flaws:
                seen(examined)
    except TarFaultError as error:
        problems.append(error.problem(name))
        if error.pending is not None and error.pending.members:
            keys.append(error.pending.key)
            members.append(error.pending.members)
    stream.drain()
    return ShardScan(ShardIndex.of(keys, members), stream.tell(), stream.sha256(), tuple(problems))
