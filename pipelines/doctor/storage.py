"""Checks of storage: whether a training can write, read, list and delete, and whether conditional writes work."""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.config import Config
from pipelines.doctor.check import Check, failed, ok
from pipelines.doctor.services import closed_port, http_date, skew_check
from pipelines.environment.credentials import redact
from pipelines.storage import ConflictError, Storage, StorageError, join, layout

MULTIPART_BYTES = (8 << 20) + 1
"""One byte more than boto3 uploads in one part."""
RACERS, RACES = 4, 2
CONDITIONAL_FIX = (
    "a store that holds its conditions: AWS, MinIO, Ceph from Tentacle on, SeaweedFS from 4.08 on; "
    "without them two drivers of one run may overwrite each other's list of checkpoints"
)


def check_storage(config: Config) -> list[Check]:
    """Check the storage of a configuration, and its clock."""
    storage, root = Storage.of(config), config.storage.root
    if not root.startswith("s3://"):
        return storage_checks(storage, root)
    url = endpoint(storage)
    unreachable = closed_port(url)
    if unreachable:
        fix = "storage.endpoint_url=http://HOST:PORT (or AWS_ENDPOINT_URL), where the server runs"
        return [failed("storage", f"{root}: no S3 server at {redact(url)}: {unreachable}", fix)]
    skew = skew_check("S3", http_date(url), time.time())
    return [*storage_checks(storage, root), *skew]


def storage_checks(storage: Storage, root: str) -> list[Check]:
    """Check that objects can be written (in one part, in several, conditionally), read, listed and deleted."""
    folder = layout.probe_folder(root, f"doctor-{uuid.uuid4().hex}")
    small, large, raced = (join(folder, name) for name in ("small", "large", "raced"))

    def read_back() -> None:
        if storage.read(small, patience_s=0) != b"ddpm":
            raise StorageError(f"{small}: other bytes came back than were written")

    def list_back() -> None:
        if [entry.uri for entry in storage.list(folder, patience_s=0)] != [small]:
            raise StorageError(f"{folder}: the object that was written is not listed")

    def upload() -> None:
        with tempfile.NamedTemporaryFile(prefix="ddpm-doctor-") as file:
            file.truncate(MULTIPART_BYTES)
            storage.upload(Path(file.name), large, patience_s=0)

    def race_once() -> None:
        wrong = race(storage, raced)
        if wrong:
            raise StorageError(f"{root}: {wrong}")

    def delete() -> None:
        for uri in (small, large, raced):
            storage.delete(uri, patience_s=0)
        storage.delete_folder(folder, patience_s=0)
        if storage.exists(small, patience_s=0):
            raise StorageError(f"{small}: it is still there after it was deleted")

    probes: list[tuple[str, Callable[[], None]]] = [
        ("write", lambda: storage.write(small, b"ddpm", patience_s=0)),
        ("read", read_back),
        ("list", list_back),
        ("multipart", upload),
        ("conditional writes", race_once),
        ("delete", delete),
    ]
    done: list[str] = []
    checks: list[Check] = []
    for name, probe in probes:
        try:
            probe()
            done.append(name)
        except StorageError as error:
            found = redact(str(error)).replace(folder, root)
            fix = CONDITIONAL_FIX if name == "conditional writes" else storage_fix(str(error))
            checks.append(failed(f"storage {name}", found, fix))
            if name == "write":
                return checks  # the other checks need the object
    return [ok("storage", f"{root}: {', '.join(done)}"), *checks] if done else checks


def storage_fix(message: str) -> str:
    """Return the fix for an error of the storage, by its message."""
    if "connect" in message.lower() or "timeout" in message.lower() or "timed out" in message.lower():
        return "storage.endpoint_url=http://HOST:PORT (or AWS_ENDPOINT_URL), where the server runs"
    if any(word in message for word in ("credentials", "key", "permission")):
        return "storage.credentials_file=PATH (or AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE) of a user with those rights"
    return "storage.root=ADDRESS of a place that can be written"


def race(storage: Storage, uri: str) -> str | None:
    """Return what is wrong with the conditional writes of a storage; None if they work.

    Several threads write at the same time under the same condition, first that nothing is stored, then that a given
    version is stored: each time exactly one must succeed.
    """
    tag = None
    for _ in range(RACES):
        contents = [uuid.uuid4().hex.encode() for _ in range(RACERS)]
        won = _race_once(storage, uri, contents, tag)
        condition = "If-None-Match: *" if tag is None else "If-Match: ETAG"
        if len(won) != 1:
            return f"{len(won)} of {RACERS} writers at a time succeeded under {condition}"
        there, tag = storage.read_tagged(uri, patience_s=0)
        if there != won[0]:
            return f"the writer that succeeded under {condition} is not the one whose bytes are there"
    return None


def _race_once(storage: Storage, uri: str, contents: Sequence[bytes], tag: str | None) -> list[bytes]:
    """Write all contents at the same time under a condition, and return those that succeeded.

    Raises:
        StorageError: a write failed for another reason.
    """
    won: list[bytes] = []
    errors: list[StorageError] = []

    def write(data: bytes) -> None:
        try:
            storage.write_if(uri, data, tag, patience_s=5)  # a store may ask the slower ones to try again
            won.append(data)
        except ConflictError:
            pass  # another one was faster
        except StorageError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(data,), daemon=True) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return won


def endpoint(storage: Storage) -> str:
    """Return the address of the S3 server."""
    return storage.endpoint_url or f"https://s3.{storage.region or 'us-east-1'}.amazonaws.com"
