"""The boto3 client of a connection, which is recreated when its credentials have expired or changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.environment.loopback import is_loopback
from pipelines.storage.backend import Connection
from pipelines.storage.errors import StorageError, TransientStorageError, reporting_os_errors
from pipelines.storage.s3_errors import CredentialsRefusedError, ExpiredCredentialsError, sort_error

Action = Literal["read", "write"]
MAX_ATTEMPTS = 8
"""Tries that boto3 makes for one call before it reports a failure."""
TIMEOUT_S = 30.0
"""Seconds for which a server may send nothing."""
FALLBACK_REGION = "us-east-1"
"""Region of a server other than AWS if none is configured: signatures need one."""


@dataclass(frozen=True)
class _Made:
    """A client, and the state of the credentials that it was made from.

    Attributes:
        temporary: whether its credentials expire.
        stamps: state of the credential files.
    """

    client: Any
    temporary: bool
    stamps: tuple[object, ...]


class S3Client:
    """The boto3 client of a connection, shared by all threads of a process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._worked: set[tuple[str, Action]] = set()

    @contextmanager
    def calls(self, uri: str, action: Action) -> Iterator[Any]:
        """Yield the client for calls about an address; turn their errors into a `StorageError` with the fix.

        Credentials that have expired, or that are refused and have changed since the client was made, are tried again
        with a new client. So are calls that are refused but were allowed for this bucket before: policies and keys
        change during a training, and a store may take a while to apply them.
        """
        made: _Made | None = None
        allowed = (uri.removeprefix("s3://").split("/")[0], action)
        with reporting_os_errors(uri):
            try:
                made = self._current()
                yield made.client
                self._worked.add(allowed)
            except StorageError:
                raise
            except Exception as error:
                found = sort_error(uri, error, temporary_credentials=made is not None and made.temporary)
                if found is None:
                    raise
                if made is not None and isinstance(found, ExpiredCredentialsError):
                    self._discard(made)
                elif made is not None and isinstance(found, CredentialsRefusedError):
                    if self._stamps() != made.stamps:
                        self._discard(made)
                        found = TransientStorageError(f"{found} (their file has changed meanwhile and is read again)")
                    elif allowed in self._worked:
                        found = TransientStorageError(f"{found} (this process could {action} there before)")
                raise found from error

    def _current(self) -> _Made:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _discard(self, made: _Made) -> None:
        """Make the next call create a client, unless another thread has done so already."""
        with self._lock:
            if self._made is made:
                self._made = None

    def _make(self) -> _Made:
        import boto3
        from botocore.config import Config as ClientConfig

        stamps = self._stamps()  # before the files are read
        session = boto3.session.Session()
        if self.connection.credentials_file:
            # botocore reads the path of the file from the environment only when a session is created.
            session._session.set_config_variable("credentials_file", self.connection.credentials_file)
        endpoint = self.connection.endpoint_url
        region = self.connection.region or session.region_name or (FALLBACK_REGION if endpoint else None)
        settings = ClientConfig(
            retries={"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
            connect_timeout=5,
            read_timeout=TIMEOUT_S,
            max_pool_connections=32,
            proxies={} if endpoint and is_loopback(endpoint) else None,
        )
        try:
            client = session.client("s3", endpoint_url=endpoint, region_name=region, config=settings)
        except ValueError as error:
            raise StorageError(f"storage.endpoint_url = {endpoint}: {error}; write http://HOST:PORT") from error
        credentials = session.get_credentials()
        return _Made(client, bool(credentials and credentials.token), stamps)

    def _stamps(self) -> tuple[object, ...]:
        """Return a value that changes when the credential files do."""
        home = Path.home() / ".aws"
        files = (
            self.connection.credentials_file or os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
            os.environ.get("AWS_CONFIG_FILE") or home / "config",
            os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"),
            os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        )
        return tuple(_stamp(Path(file).expanduser()) for file in files if file)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
