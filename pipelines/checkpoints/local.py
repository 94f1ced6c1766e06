"""Copies of a run's newest state in the memory of a node, which outlive the workers there.

A copy is a sharded checkpoint whose parts lie on several nodes: each node has those of its own ranks, and those that
the ranks of one other node have sent. Beside each part is a record with what a restart has to know of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines.checkpoints.catalog import Listed
from pipelines.checkpoints.errors import ModelError
from pipelines.checkpoints.files import CheckpointState
from pipelines.checkpoints.parts import PartsIndex
from pipelines.environment.limits import copies_folder
from pipelines.environment.scratch import closed_folder
from pipelines.storage import layout

logger = logging.getLogger(__name__)

LEFT_OVER_S = 24 * 3600.0
"""Seconds after which the copies of a run that wrote no more of them are deleted."""


@dataclass(frozen=True)
class LocalPart:
    """The record of a part of a copy.

    Attributes:
        listed: what the copy would be in the list of checkpoints.
        rank: of `ranks`, which has made the part.
        ranks: the number of ranks that trained, and of the copy's parts.
        size: of the part in bytes.
        index: what is where in it.
        state: of the training, without files.
        unsent: on rank 0, metrics that MLflow had not taken.
    """

    listed: Listed
    rank: int
    ranks: int
    size: int
    index: PartsIndex
    state: CheckpointState
    unsent: bytes | None = None

    def to_json(self) -> bytes:
        """Return the content of the record's file."""
        plain = {
            "listed": asdict(self.listed),
            "rank": self.rank,
            "ranks": self.ranks,
            "size": self.size,
            "index": self.index.to_json().decode(),
            "state": self.state.to_json(),
            "unsent": None if self.unsent is None else base64.b64encode(self.unsent).decode(),
        }
        return json.dumps(plain).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> LocalPart:
        """Return the record in the content of its file.

        Raises:
            ModelError: it is damaged.
        """
        try:
            plain = json.loads(text)
            return cls(
                Listed(**plain["listed"]),
                plain["rank"],
                plain["ranks"],
                plain["size"],
                PartsIndex.from_json(plain["index"].encode(), where),
                CheckpointState.from_json(plain["state"], where),
                None if plain["unsent"] is None else base64.b64decode(plain["unsent"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{where} is damaged ({error!r})") from error


def whole_state(parts: Collection[LocalPart], index: PartsIndex) -> CheckpointState:
    """Return the state of a copy, with the files that reading it asks for."""
    first = min(parts, key=lambda part: part.rank)
    files = {layout.part_file(part.rank): _sha256(part.index.to_json()) for part in parts}
    files[layout.PARTS_INDEX] = _sha256(index.to_json())
    if first.unsent is not None:
        files[layout.UNSENT] = _sha256(first.unsent)
    return replace(first.state, files=files)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class NodeFolder:
    """The copies of a run on this node.

    Args:
        run: address and ID of the run, which nothing else shares.
    """

    def __init__(self, *run: str) -> None:
        self._copies = closed_folder(copies_folder()) / "copies"
        self.path = self._copies / _sha256("\n".join(run).encode())[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        self._delete_leftovers()

    def node_id(self) -> str:
        """Return a text that the ranks on this node share, and no others."""
        file, own = self._copies / "node", self._copies / f"node-{uuid.uuid4().hex}"
        own.write_text(uuid.uuid4().hex)
        with suppress(FileExistsError):
            os.link(own, file)
        own.unlink()
        return file.read_text()

    def folder(self, name: str) -> Path:
        """Return the folder of a copy."""
        return self.path / name

    def write(self, name: str, file: str, buffers: Iterable[bytes | memoryview]) -> None:
        """Write a file of a copy, which is there whole or not at all.

        Raises:
            OSError: the node's memory is full.
        """
        self.folder(name).mkdir(exist_ok=True)
        unfinished = self.folder(name) / f"{file}.{uuid.uuid4().hex}"
        try:
            with unfinished.open("wb") as target:
                for buffer in buffers:
                    target.write(buffer)
            unfinished.rename(self.folder(name) / file)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def record(self, part: LocalPart) -> None:
        """Enter a part, whose file has been written.

        Raises:
            OSError: as for `write`.
        """
        self.write(part.listed.name, _record_file(part.rank), [part.to_json()])

    def parts(self) -> list[LocalPart]:
        """Return the records of all parts whose files are there, and as long as they were."""
        found = []
        for path in sorted(self.path.glob("*/*.record")):
            try:
                part = LocalPart.from_json(path.read_bytes(), str(path))
                if (path.parent / layout.part_file(part.rank)).stat().st_size == part.size:
                    found.append(part)
            except (ModelError, OSError) as error:
                logger.warning("a local copy is left out: %s", error)
        return found

    def keep_only(self, names: Collection[str]) -> None:
        """Delete all copies but these."""
        for folder in self.path.iterdir():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def delete(self) -> None:
        """Delete all copies of the run."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _delete_leftovers(self) -> None:
        """Delete the copies of runs that have not written any for long."""
        for folder in self._copies.iterdir():
            with suppress(OSError):  # deleted meanwhile
                newest = max((path.stat().st_mtime for path in [folder, *folder.rglob("*")]), default=0.0)
                if folder.is_dir() and folder != self.path and time.time() - newest > LEFT_OVER_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _record_file(rank: int) -> str:
    return f"{layout.part_file(rank)}.record"
