"""Folders on storage, with all that is in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipelines.storage import Entry, Storage, join


@dataclass(frozen=True)
class Folder:
    """A folder on storage, with every object below it."""

    address: str
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def size(self) -> int:
        """Bytes of all that is in it."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> float | None:
        """When anything in it was last written, in seconds since the epoch; None where that is not sure."""
        times = [entry.modified for entry in self.entries]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None

    def within(self, seconds: float, now: float) -> bool:
        """Return whether something was written in the last so many seconds, as far as one knows."""
        return self.modified is None or now - self.modified < seconds


def folders(entries: Iterable[Entry], parent: str) -> list[Folder]:
    """Return the folders directly below an address, in order of name, each with all that is in it."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.uri.startswith(f"{parent}/"):
            name, below, _ = entry.uri[len(parent) + 1 :].partition("/")
            if below:
                found.setdefault(name, []).append(entry)
    return [Folder(join(parent, name), tuple(found[name])) for name in sorted(found)]


def folders_at(storage: Storage, address: str) -> list[Folder]:
    """Return the folders directly below an address, as they are on storage now."""
    return folders(storage.list(address), address)
