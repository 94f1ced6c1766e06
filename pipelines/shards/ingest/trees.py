"""List what a local folder, a zip or a folder in a store holds, one file after another, each with what reads it."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.places import KINDS, File, check_there, closed, open_stored, shown, stamp_of, text
from pipelines.shards.ingest.readers import StoredFile, ZipMember
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.tables import METADATA
from pipelines.storage import SYSTEM_FOLDERS, Storage, is_local, local_path

WINDOWS = 0
"""Code of Windows and DOS programs as the creator of a zip entry."""
_ENTRY = struct.Struct("<4sBBBBHHHHLLLHHHHHLL")
_END, _END64 = struct.Struct("<4s4HLLH"), struct.Struct("<4sQ2H2L4Q")
"""An entry of the directory of a zip, before its name, and its ends (APPNOTE.TXT, 4.3.12, 4.3.16 and 4.3.14)."""
LONGEST_COMMENT, LOCATOR = 0xFFFF, 20
"""Bytes behind the end of the directory, and between that of zip64 and it."""
UTF8_NAME, ENCRYPTED = 0x800, 0x1
UNKNOWN = 0xFFFFFFFF
"""A number that stands in the zip64 field of an entry."""


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """A folder of a source, which may be empty.

    Attributes:
        name: path relative to the source's root.
    """

    name: str


@dataclass(frozen=True, slots=True)
class NoFile:
    """A name that holds no bytes that could be read: a link that leads nowhere, a pipe, a socket or a device."""

    name: str


Found = File | SourceFolder | NoFile | BadImage
"""What a listing yields; a `BadImage` is an entry of a zip that is not used."""


def find_all(uri: str, storage: Storage) -> Iterator[Found]:
    """Yield what a folder, a zip or a folder in a store holds, without hidden files and those of `SYSTEM_FOLDERS`.

    Raises:
        DatasetError: there is nothing, or it is neither a folder nor a zip.
    """
    check_there(uri)
    if uri.lower().endswith(".zip") and not (is_local(uri) and local_path(uri).is_dir()):
        found = _in_zip(uri, storage)
    elif is_local(uri):
        found = _in_folder(local_path(uri))
    else:
        found = _in_store(uri, storage)
    return (each for each in found if isinstance(each, BadImage) or not _hidden(each.name))


def _hidden(name: str) -> bool:
    """Return whether a file or one of its folders is hidden, or of a system's own."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in name.split("/"))


def _in_store(uri: str, storage: Storage) -> Iterator[Found]:
    empty = True
    for entry in storage.scan(uri):
        empty, name = False, entry.uri[len(uri) + 1 :]
        if name.endswith("/"):  # by such an object the consoles of S3 mark an empty folder
            yield SourceFolder(name.rstrip("/"))
        elif name:
            yield File(name, f"{entry.size} {entry.tag}", StoredFile(entry.uri))
    if empty:
        raise DatasetError(f"nothing is stored under {uri}/; {KINDS}")


def _in_folder(root: Path) -> Iterator[Found]:
    """Yield the files of a local folder; links to folders are followed, unless they lead back to where they are.

    Raises:
        DatasetError: a folder cannot be listed, or its files not be looked at.
    """
    coming: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (os.path.realpath(root),))]
    while coming:
        here, prefix, way = coming.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    name = prefix + text(entry.name)
                    if _is_folder(entry):
                        onward = None if _hidden(name) else _way_to(entry.name, here, way)
                        if onward is not None:
                            coming.append((entry.path, f"{name}/", onward))
                            yield SourceFolder(name)
                    elif stamp := stamp_of(Path(entry.path)):
                        yield File(name, stamp, StoredFile(f"file://{entry.path}"))
                    else:
                        yield NoFile(name)
        except OSError as error:
            raise closed(error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _way_to(name: str, here: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the way to a folder in another one; None for a link to a folder of the way or above, which has no end.

    Args:
        name: of the folder.
        here: path of the other one.
        way: to the other one: its real path, behind those of the folders whose links lead there.
    """
    path = os.path.join(here, name)
    if not os.path.islink(path):
        return (*way[:-1], os.path.join(way[-1], name))
    target = os.path.realpath(path)
    above = target.rstrip("/") + "/"
    return None if any(f"{real}/".startswith(above) for real in way) else (*way, target)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the directory of a zip; names have forward slashes, and those that begin with one go without it."""

    written: str
    name: str
    member: ZipMember

    @property
    def leads_out(self) -> bool:
        """Return whether unpacking the entry would leave the folder of the zip."""
        return ".." in self.written.split("/")


def _in_zip(uri: str, storage: Storage) -> Iterator[Found]:
    """Yield the entries of a zip as whatever unpacks it takes them; a second one of a name is yielded as well."""
    try:
        with open_stored(uri, storage) as file:
            top = _top_folder(entry for entry in _entries(uri, file) if not (entry.leads_out or _hidden(entry.name)))
            for entry in _entries(uri, file):
                member, name = entry.member, entry.name.removeprefix(top)
                if entry.leads_out:
                    yield BadImage(entry.written, "has .. in its name, by which entries leave the folder of a zip")
                elif name.endswith("/"):
                    yield SourceFolder(name.rstrip("/"))
                elif name:
                    yield File(name, f"{member.size} {member.crc:08x}", member)
    except zipfile.BadZipFile as error:
        raise DatasetError(f"{shown(uri)} is not a readable zip ({error}): make it again, or copy it whole") from error


def _entries(uri: str, file: io.BufferedReader) -> Iterator[_Entry]:
    """Yield the entries of the directory of a zip, of which `zipfile` holds all in memory.

    Raises:
        BadZipFile: it has no directory, or the directory is damaged.
    """
    begin, end, shift = _directory(file)
    file.seek(begin)
    while begin < end:
        head = file.read(_ENTRY.size)
        if len(head) < _ENTRY.size or head[:4] != b"PK\x01\x02":
            raise zipfile.BadZipFile("Bad magic number for central directory")
        _, _, system, _, _, flags, method, _, _, crc, packed, size, named, more, said, *_, offset = _ENTRY.unpack(head)
        raw, extra = file.read(named), file.read(more)
        file.seek(said, io.SEEK_CUR)
        begin += _ENTRY.size + named + more + said
        size, packed, offset = _zip64(extra, size, packed, offset)
        try:
            written = raw.decode("utf-8" if flags & UTF8_NAME else "cp437").partition("\0")[0]
        except UnicodeDecodeError as error:
            raise zipfile.BadZipFile(f"a name is not UTF-8: {raw!r}") from error
        if system == WINDOWS:
            written = written.replace("\\", "/")
        member = ZipMember(uri, offset + shift, packed, size, method, crc, bool(flags & ENCRYPTED))
        yield _Entry(written, written.lstrip("/"), member)


def _directory(file: io.BufferedReader) -> tuple[int, int, int]:
    """Return where the directory of a zip begins and ends, and how many bytes are in front of the zip.

    Raises:
        BadZipFile: there is none.
    """
    length = file.seek(0, io.SEEK_END)
    first = file.seek(max(0, length - LONGEST_COMMENT - _END.size - LOCATOR - _END64.size))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + _END.size:
        raise zipfile.BadZipFile("File is not a zip file")
    *_, size, offset, _ = _END.unpack_from(tail, at)
    if tail[at - LOCATOR : at].startswith(b"PK\x06\x07") and at >= LOCATOR + _END64.size:
        at -= LOCATOR + _END64.size
        if not tail.startswith(b"PK\x06\x06", at):
            raise zipfile.BadZipFile("Bad end of the zip64 directory")
        *_, size, offset = _END64.unpack_from(tail, at)
    begin = first + at - size
    if begin < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return begin, begin + size, begin - offset


def _zip64(extra: bytes, *numbers: int) -> list[int]:
    """Return the numbers of an entry, those that are too large for it from its zip64 field."""
    found, at = list(numbers), 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            large = [place for place, number in enumerate(numbers) if number == UNKNOWN]
            if size < 8 * len(large) or at + 4 + size > len(extra):
                raise zipfile.BadZipFile("Corrupt zip64 extra field")
            for place, value in zip(large, struct.unpack_from(f"<{len(large)}Q", extra, at + 4), strict=True):
                found[place] = value
        at += 4 + size
    return found


def _top_folder(entries: Iterator[_Entry]) -> str:
    """Return `photos/` for a zip whose files are all below photos/CLASS/ or beside photos/metadata.jsonl, else ""."""
    top, deep = None, False
    for entry in entries:
        if not entry.name:
            continue
        first, slash, below = entry.name.partition("/")
        if not slash or top not in (None, first):
            return ""
        top = first
        deep = deep or "/" in below or below in METADATA
    return f"{top}/" if deep else ""
