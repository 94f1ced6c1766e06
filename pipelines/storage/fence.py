"""A fence around a run's folder: only the newest driver and its workers may write there.

Drivers of a run are numbered: each takes the next *epoch* by a conditional write, so no two have the same. Everything
that they store has the epoch in its address or is written conditionally; where that is impossible, as for MLflow
metrics, it is sent after `Fence.check`.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from pipelines.storage.errors import StorageError
from pipelines.storage.retry import PATIENCE_S
from pipelines.storage.store import Storage


class FencedError(StorageError):
    """Another driver has taken over this run: processes of the earlier one must not write any more."""


def fenced(uri: str) -> FencedError:
    """Return the error of a replaced driver at an address that it may no longer write."""
    return FencedError(
        f"{uri}: another driver has taken over this run, or the run was deleted; nothing more is written here"
    )


@dataclass(frozen=True)
class Fence:
    """Permission to write to a run, which belongs to the driver whose epoch and token are stored at the address.

    Attributes:
        uri: address of the record of the newest driver.
        epoch: number of the driver that this process belongs to, counted from 1.
        token: token of that driver.
    """

    storage: Storage
    uri: str
    epoch: int
    token: str

    @classmethod
    def take(cls, storage: Storage, uri: str, above: int = 0) -> Fence:
        """Make the caller the newest driver and return its fence.

        Args:
            above: lower bound of the epoch, in case the record was lost.
        """
        token = uuid.uuid4().hex

        def change(stored: bytes | None) -> bytes:
            before = _driver(stored)
            record = {**before, "epoch": max(before["epoch"], above) + 1, "token": token}
            return json.dumps(record).encode()

        record = json.loads(storage.update(uri, change))
        return cls(storage, uri, record["epoch"], token)

    def check(self, *, patience_s: float = PATIENCE_S) -> None:
        """Raise if this driver has been replaced.

        Raises:
            FencedError: another driver is recorded, or none: the run was deleted.
        """
        self._require(self.storage.find(self.uri, patience_s=patience_s))

    def note(self, **notes: str) -> dict[str, Any]:
        """Add notes to the record of this driver for the next one, and return the earlier record.

        Raises:
            FencedError: as `check` does.
        """
        before: dict[str, Any] = {}

        def change(stored: bytes | None) -> bytes:
            nonlocal before
            self._require(stored)
            before = _driver(stored)
            return json.dumps({**before, **notes, "written": uuid.uuid4().hex}).encode()

        self.storage.update(self.uri, change)
        return before

    def _require(self, stored: bytes | None) -> None:
        if _driver(stored).get("token") != self.token:
            raise fenced(self.uri)


def _driver(stored: bytes | None) -> dict[str, Any]:
    """Return the record of a driver; epoch 0 where there is none, or that of a release without epochs."""
    try:
        record = json.loads(stored or b"{}")
    except ValueError:
        record = {}
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else {"epoch": 0}
