"""One pass over a tar that may be damaged: every sample in order, its flaws, and the SHA-256 of all bytes.

Python's tarfile, and so WebDataset, takes a damaged header or a missing end for the end of the tar and yields fewer
samples without a word. Here only the end-of-archive marker is an end.
"""

from __future__ import annotations

import hashlib
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, TypeVar, cast

from pipelines.display import Progress
from pipelines.errors import PipelineError
from pipelines.shards.index import Member, ShardIndex, split_name
from pipelines.shards.members import KNOWN_MEMBERS, Examined, Flaw, Form, examine
from pipelines.shards.quarantine import Problem
from pipelines.storage import Storage

BLOCK_BYTES = 4 * 2**20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

T = TypeVar("T")
R = TypeVar("R")


class TarFaultError(PipelineError):
    """A tar whose structure is damaged, or that we cannot read in place: what it is, and what to do about it.

    Attributes:
        pending: the sample at that place, of which there may have been more.
    """

    def __init__(
        self, kind: str, reason: str, fix: str = "write or copy it again", pending: RawSample | None = None
    ) -> None:
        super().__init__(f"{reason}: {fix}")
        self.kind, self.reason, self.fix, self.pending = kind, reason, fix, pending

    def problem(self, shard: str) -> Problem:
        """As one of the whole shard."""
        return Problem(shard, None, None, self.kind, str(self))


class ObjectStream:
    """A stored object, read forward once by ranged reads of a few MiB, hashed on the way: the file of a `TarFile`.

    Args:
        uri: its address.
        size: its bytes, as the listing says.
        storage: where it lies.
        advance: told the bytes of each read.
    """

    def __init__(self, uri: str, size: int, storage: Storage, advance: Callable[[int], None] = lambda n: None) -> None:
        self.uri, self.size, self.storage, self.advance = uri, size, storage, advance
        self._hash = hashlib.sha256()
        self._block = memoryview(b"")
        self._start = self._at = self._fetched = 0

    def tell(self) -> int:
        """Position in the object."""
        return self._at

    def peek(self) -> bytes:
        """The next few bytes."""
        self._fill()
        return bytes(self._block[self._at - self._start :][:16])

    def seek(self, position: int) -> int:
        """Go forward; bytes that are passed over are hashed too."""
        assert position >= self._at, f"{self.uri} is read forward only: {self._at} -> {position}"
        while self._at < position and self._fill():
            self._at = min(position, self._fetched)
        return self._at

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        return b"".join(self.parts(size))

    def parts(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes as they lie in memory, fewer at the end."""
        while size > 0 and self._fill():
            part = self._block[self._at - self._start :][:size]
            self._at += len(part)
            size -= len(part)
            yield part

    def drain(self) -> bool:
        """Read to the end; whether a byte other than zero was left."""
        anything = False
        while block := self.read(BLOCK_BYTES):
            anything = anything or block.count(0) != len(block)
        return anything

    def sha256(self) -> str:
        """Of all bytes; `drain` first."""
        return self._hash.hexdigest()

    def _fill(self) -> bool:
        """Have at least one byte at the position, unless the end is reached."""
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
    """A header; whatever is none, and no end-of-archive marker either, is an error and not an end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictInfo:
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
    """Neighbouring tar entries with one key: where they lie, the bytes of the kinds we know, and flaws of the tar."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)


def read_samples(stream: ObjectStream) -> Iterator[RawSample]:
    """The samples of a tar as WebDataset groups them, one in memory at a time.

    Raises:
        TarFaultError: at the place where the tar is damaged; the samples before it have been given out.
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
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
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
    """Whether an entry has bytes of its own; links and holes where we need bytes are refused."""
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
    """What one pass over a shard found.

    Attributes:
        index: its samples up to the first fault of the tar; the last may lack members then, and was not looked at.
        bytes: of the whole object.
        sha256: of the whole object.
        problems: in order of sample; those of the shard itself last.
    """

    index: ShardIndex
    bytes: int
    sha256: str
    problems: tuple[Problem, ...]


def scan_shard(
    name: str, stream: ObjectStream, form: Form, seen: Callable[[Examined], None] = lambda sample: None
) -> ShardScan:
    """Read a tar to its end and look at every sample.

    Args:
        name: of the shard, for its problems.
        stream: its bytes, at the start.
        form: what samples must be like.
        seen: told each sample that has no flaw.
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


def in_threads(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """The results in order; the first error ends it, and what has not begun is not begun."""
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class ByteCounter:
    """Progress in MiB, fed by several threads."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self.total, self.done, self.progress = total_bytes, 0, progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more bytes have been read."""
        with self._lock:
            self.done += count
            whole = -(-self.total // 2**20)
            self.progress(whole if self.done >= self.total else self.done // 2**20, whole)
