"""The checkpoints of a run: their names, the list of those that are kept, what to resume from, and what may be deleted.

`checkpoints.json` in a run's folder lists the newest checkpoints. It is only ever replaced conditionally, so two
writers lose nothing of each other, and it carries the epoch of the newest driver: a writer of an older one is refused.
Where it is lost, it is made again from the folders that are complete. Who removes an entry from it deletes the folder,
`state.json` first, so that a kill in between leaves an incomplete one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.checkpoints.errors import ModelError
from pipelines.checkpoints.files import CheckpointState, verify_checkpoint
from pipelines.config import Config
from pipelines.storage import Entry, Fence, NotFoundError, Storage, StorageError, fenced, join, layout

logger = logging.getLogger(__name__)
T = TypeVar("T")

LIST_VERSION = 1
GRACE_S = 3600.0
"""How long a checkpoint folder without use stays: whoever writes it may still be at it."""
_NAME = re.compile(layout.CHECKPOINT_PREFIX + r"(?P<images>\d+)-e(?P<epoch>\d+)-")


@dataclass(frozen=True, order=True)
class Listed:
    """A checkpoint in the list of a run; later ones are larger.

    Attributes:
        epoch: of the driver whose workers stored it.
        images_seen: where it continues.
        name: of its folder.
    """

    epoch: int
    images_seen: int
    name: str


@dataclass(frozen=True)
class CheckpointList:
    """The content of `checkpoints.json`.

    Attributes:
        epoch: of the newest driver that has written it.
        checkpoints: the ones that are kept, oldest first.
    """

    epoch: int
    checkpoints: tuple[Listed, ...] = ()

    def to_json(self) -> bytes:
        """Return the text of `checkpoints.json`, which differs every time."""
        plain = {"list_version": LIST_VERSION, **asdict(self), "written": uuid.uuid4().hex}
        return json.dumps(plain, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes | None) -> CheckpointList | None:
        """Return the list in the text of a `checkpoints.json`; None where it is missing or damaged."""
        try:
            plain = json.loads(text or b"")
            if plain["list_version"] != LIST_VERSION:
                return None
            return cls(int(plain["epoch"]), tuple(sorted(Listed(**entry) for entry in plain["checkpoints"])))
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Resumable:
    """The checkpoints in a run's folder that the run can go on from.

    Attributes:
        folder: its address.
        complete: the complete ones, newest first.
        problems: name -> what is wrong, for those with a `state.json` that are not, or that are listed and gone.
    """

    folder: str
    complete: list[tuple[Listed, CheckpointState]]
    problems: dict[str, str]

    def load_newest(self, load: Callable[[str, CheckpointState], T]) -> tuple[T | None, dict[str, str]]:
        """Load the newest checkpoint that is whole.

        Args:
            load: gets the address and the state of a checkpoint, and raises a `ModelError` or `NotFoundError` where
                not every byte of it is as it was written.

        Returns:
            (what `load` returns, None where the run has never had a checkpoint; what is wrong with newer ones, by
            name).

        Raises:
            ModelError: there were checkpoints, and none of them is whole.
        """
        damaged = dict(self.problems)
        for listed, state in self.complete:
            try:
                return load(join(self.folder, listed.name), state), damaged
            except (ModelError, NotFoundError) as error:
                damaged[listed.name] = str(error)
        if self.complete:
            raise _none_whole(self.folder, damaged)
        return None, {}


def run_folder(config: Config) -> str:
    """Return the folder of a run: its checkpoints and their list, published copies, and the goodput ledger."""
    return layout.run_folder(config.storage.root, config.name)


def checkpoint_name(images_seen: int, epoch: int) -> str:
    """Return a unique name for a checkpoint's folder."""
    return f"{layout.CHECKPOINT_PREFIX}{images_seen:012d}-e{epoch}-{uuid.uuid4().hex[:8]}"


def epoch_of(name: str) -> int:
    """Return the epoch in a folder's name; 0 for a release without epochs."""
    found = _NAME.match(name)
    return int(found["epoch"]) if found else 0


def complete_checkpoints(storage: Storage, folder: str) -> list[tuple[Listed, CheckpointState]]:
    """Return the complete checkpoints directly below an address and their states, newest first.

    One is complete if it has a `state.json` of a readable version and all files listed there, with the right sizes;
    folders of interrupted writes are skipped. Digests are checked by whoever reads the bytes. A checkpoint
    of a later driver is newer, whatever it has seen.
    """
    return _examine(storage, folder, _folders(storage.list(folder), folder)).complete


def newest_checkpoint(config: Config) -> CheckpointState | None:
    """Return the state of the newest complete checkpoint of a run, None where it has never had one.

    Raises:
        ModelError: there were checkpoints, and none of them is complete.
    """
    found = resumable_checkpoints(Storage.of(config), run_folder(config))
    return found.complete[0][1] if found.complete else None


def newest_lineage(config: Config) -> dict[str, Any]:
    """Return the lineage that the newest complete checkpoint of a run has stored; empty where there is none."""
    storage = Storage.of(config)
    folder = run_folder(config)
    found = resumable_checkpoints(storage, folder).complete
    if not found:
        return {}
    stored = json.loads(storage.read(join(folder, found[0][0].name, layout.MODEL)))
    return dict(stored["lineage"])


def fetch_checkpoint(storage: Storage, address: str, target: Path) -> CheckpointState:
    """Download the files of a checkpoint that its `state.json` names, and no others, and return its state.

    Args:
        target: a folder, which is emptied first.

    Raises:
        ModelError, NotFoundError: it is not complete, or damaged.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    text = storage.read(join(address, layout.TRAINING_STATE))
    for name in CheckpointState.from_json(text, address).files:
        storage.download(join(address, name), target / name)
    (target / layout.TRAINING_STATE).write_bytes(text)
    try:
        return verify_checkpoint(target)
    except ModelError as error:
        raise ModelError(str(error).removeprefix(f"{target}/")) from error


def enter_checkpoint(
    storage: Storage, folder: str, listed: Listed, keep: int, damaged: Collection[str] = frozenset()
) -> None:
    """Add a stored checkpoint to the list of a run, and delete those that leave it.

    Args:
        keep: how many of the newest stay.
        damaged: names of checkpoints that could not be read: they leave the list, lest they take a whole one's place.

    Raises:
        FencedError: a newer driver has written the list.
    """
    dropped: list[Listed] = []

    def change(stored: bytes | None) -> bytes:
        before = _current(stored, storage, folder, listed)
        if before.epoch > listed.epoch:
            raise fenced(join(folder, layout.CHECKPOINT_LIST))
        entries = sorted({*before.checkpoints, listed})
        kept = [entry for entry in entries if entry.name not in damaged][-keep:]
        dropped[:] = [entry for entry in entries if entry not in kept]
        return CheckpointList(listed.epoch, tuple(kept)).to_json()

    storage.update(join(folder, layout.CHECKPOINT_LIST), change)
    for old in dropped:
        delete_checkpoint(storage, join(folder, old.name))


def take_over(storage: Storage, folder: str) -> Fence:
    """Make the caller the newest driver of a run, and return its fence.

    From here on no worker of an earlier driver can enter a checkpoint. What an earlier one had stored and not entered
    any more is entered.
    """
    folders = _folders(storage.list(folder), folder)
    known = CheckpointList.from_json(storage.find(join(folder, layout.CHECKPOINT_LIST)))
    above = max([known.epoch if known else 0, *(epoch_of(name) for name in folders)])
    fence = Fence.take(storage, join(folder, layout.DRIVER), above)

    def change(stored: bytes | None) -> bytes:
        before = _current(stored, storage, folder)
        if before.epoch > fence.epoch:
            raise fenced(fence.uri)
        newest = max(before.checkpoints, default=Listed(-1, -1, ""))
        later = [listed for listed, _ in complete_checkpoints(storage, folder) if listed > newest]
        return CheckpointList(fence.epoch, tuple(sorted({*before.checkpoints, *later}))).to_json()

    storage.update(join(folder, layout.CHECKPOINT_LIST), change)
    return fence


def sweep(storage: Storage, folder: str, epoch: int | None = None) -> list[str]:
    """Delete the remains of interrupted uploads and rotations in a run's folder, and return the folders' names.

    Deleted are incomplete checkpoints, and complete ones older than the oldest of the list, `GRACE_S` seconds after
    their last byte by the store's clock. No others, ever; none at all where there is no list.

    Args:
        epoch: of a driver whose workers have ended: their incomplete checkpoints need no grace.
    """
    entries = storage.list(folder)
    folders = _folders(entries, folder)
    current = CheckpointList.from_json(storage.find(join(folder, layout.CHECKPOINT_LIST)))
    if current is None or not current.checkpoints:
        return []
    now = max((e.modified for e in entries if e.modified is not None), default=0.0)
    complete = {listed.name: listed for listed, _ in _examine(storage, folder, folders).complete}
    kept = {listed.name for listed in current.checkpoints}
    deleted = []
    for name, files in folders.items():
        if name in kept or (name in complete and complete[name] >= current.checkpoints[0]):
            continue
        ended = name not in complete and epoch_of(name) == epoch
        at_rest = all(e.modified is not None and now - e.modified > GRACE_S for e in files)
        if ended or at_rest:
            delete_checkpoint(storage, join(folder, name))
            deleted.append(name)
    return sorted(deleted)


def _current(stored: bytes | None, storage: Storage, folder: str, new: Listed | None = None) -> CheckpointList:
    """Return the stored list, or one made of the complete folders where it is lost.

    Args:
        new: a checkpoint that was never in it.
    """
    found = CheckpointList.from_json(stored)
    if found is None:
        complete = sorted(listed for listed, _ in complete_checkpoints(storage, folder) if listed != new)
        found = CheckpointList(max((listed.epoch for listed in complete), default=0), tuple(complete))
        if complete:
            logger.warning(
                "%s is lost: made again from %d folders", join(folder, layout.CHECKPOINT_LIST), len(complete)
            )
    return found


def _folders(entries: Iterable[Entry], folder: str) -> dict[str, list[Entry]]:
    """Return the files of each checkpoint folder directly below an address, by the folder's name."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        parts = entry.uri[len(folder.rstrip("/")) + 1 :].split("/")
        if len(parts) == 2 and parts[0].startswith(layout.CHECKPOINT_PREFIX):
            found[parts[0]].append(entry)
    return found


def _examine(storage: Storage, folder: str, folders: Mapping[str, list[Entry]]) -> Resumable:
    complete, problems = [], {}
    for name, files in folders.items():
        uri = join(folder, name)
        sizes = {entry.uri[len(uri) + 1 :]: entry.size for entry in files}
        if layout.TRAINING_STATE not in sizes:
            continue
        try:
            state = CheckpointState.from_json(storage.read(join(uri, layout.TRAINING_STATE)), uri)
        except NotFoundError:  # deleted meanwhile
            continue
        except ModelError as error:
            problems[name] = str(error)
            continue
        missing = [file for file, size in state.sizes.items() if sizes.get(file) != size]
        if missing:
            problems[name] = f"{', '.join(missing)} is missing or cut short"
        else:
            complete.append((Listed(epoch_of(name), state.images_seen, name), state))
    return Resumable(folder, sorted(complete, key=lambda pair: pair[0], reverse=True), problems)


def resumable_checkpoints(storage: Storage, folder: str) -> Resumable:
    """Return the checkpoints that a run can resume from; listed ones that are gone are among the problems.

    Raises:
        ModelError: there were checkpoints, and none is complete: the run must not start from the beginning by itself.
    """
    while True:
        # Whoever trains goes on meanwhile: what is entered after the list was read is not in it, and what has left the
        # list since then was deleted by right, so that all is read again.
        text = storage.find(join(folder, layout.CHECKPOINT_LIST))
        listed = CheckpointList.from_json(text)
        found = _examine(storage, folder, _folders(storage.list(folder), folder))
        there = {entry.name for entry, _ in found.complete} | found.problems.keys()
        gone = [entry.name for entry in (listed.checkpoints if listed else ()) if entry.name not in there]
        if not gone or storage.find(join(folder, layout.CHECKPOINT_LIST)) == text:
            break
    found.problems.update(dict.fromkeys(gone, f"{layout.TRAINING_STATE} is missing"))
    if found.problems and not found.complete:
        raise _none_whole(folder, found.problems)
    return found


def _none_whole(folder: str, problems: Mapping[str, str]) -> ModelError:
    named = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
    return ModelError(
        f"no checkpoint in {folder} is whole:\n  {named}\n"
        "Bring their files back, or use another name=…, or start again after `ddpm rm NAME`"
    )


def delete_checkpoint(storage: Storage, folder: str) -> None:
    """Delete a checkpoint folder, `state.json` first; what cannot be deleted now is left to the next sweep."""
    try:
        storage.delete(join(folder, layout.TRAINING_STATE))
        storage.delete_folder(folder)
    except StorageError as error:
        logger.warning("an old checkpoint stays for now: %s", error)
