"""A fence around a run's folder: only the newest driver and its workers may write there."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.storage.errors import StorageError
from pipelines.storage.store import Storage


class FencedError(StorageError):
    """Another driver has taken over this run: what is left of the earlier one must not write any more."""


@dataclass(frozen=True)
class Fence:
    """Who may write to a run: whoever's token is at the address.

    Attributes:
        uri: where the token of the newest driver is.
        token: of the driver that this process belongs to.
    """

    storage: Storage
    uri: str
    token: str

    def take(self) -> None:
        """Make this token the one that counts."""
        self.storage.write(self.uri, self.token.encode())

    def check(self) -> None:
        """Refuse to go on for a driver that has been replaced.

        Raises:
            FencedError: another token is at the address.
        """
        if self.storage.read(self.uri).decode() != self.token:
            raise FencedError(f"{self.uri}: another driver has taken over this run; nothing more is written here")
