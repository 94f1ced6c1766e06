"""The folder of the local stack: where it is, its lock, and the credentials in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.environment.credentials import write_private
from pipelines.environment.scratch import ScratchError, closed_folder
from pipelines.presentation.errors import PipelineError


def default_home() -> Path:
    """Return the folder in DDPM_HOME, or else `.ddpm` in the current folder."""
    return Path(os.environ.get("DDPM_HOME") or ".ddpm").resolve()


def ensure_credentials(home: Path) -> None:
    """Create the S3 server's identity, the AWS credentials file and Ray's token, unless they exist."""
    if not (home / "ray-token").exists():
        write_private(home / "ray-token", secrets.token_hex(32))
    if (home / "credentials").exists() and (home / "s3.json").exists():
        return
    key, secret = f"ddpm{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    profile = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    identity = {
        "name": "ddpm",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(home / "s3.json", json.dumps({"identities": [identity]}))
    write_private(home / "credentials", profile)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the lock of the folder, so that only one `up` or `down` runs at a time."""
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ray_folder(home: Path) -> Path:
    """Return the folder of a local stack's Ray sessions; its parent is created if needed.

    Ray makes its sessions writable by everybody and cannot share `/tmp/ray` between users: they lie in a folder that is
    closed to others. Its path is short, as that of a socket must be. Each stack has its own, because Ray gives a
    submitted job the address that the newest head has written there, even if it was submitted to another head.

    Raises:
        StackError: the folder is another user's.
    """
    base = Path(tempfile.gettempdir())
    try:
        closed = closed_folder(base if len(str(base)) <= 16 else Path("/tmp"))
    except ScratchError as error:
        raise StackError(str(error)) from error
    return closed / f"ray-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"


class StackError(PipelineError):
    """The local stack cannot be used: a service did not start, or its record is damaged."""
