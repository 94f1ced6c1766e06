"""A storage backend for S3 and servers with its protocol: `s3://BUCKET/KEY`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from pipelines.environment.loopback import is_loopback
from pipelines.storage.backend import Connection, Entry
from pipelines.storage.errors import ConflictError, StorageError, TransientStorageError, os_errors_as_storage_errors
from pipelines.storage.rate import RequestRate
from pipelines.storage.s3_errors import (
    ABSENT,
    CredentialsRefusedError,
    ExpiredCredentialsError,
    is_throttled,
    sort_error,
)

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
    """The boto3 client of a connection, shared by all threads of a process.

    Attributes:
        reads: the rate of its requests for objects.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reads = RequestRate(connection.endpoint_url or "S3")
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
        with os_errors_as_storage_errors(uri):
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
        # boto3 repeats calls by itself: these events come with every request.
        client.meta.events.register("before-send.s3.GetObject", self._before_read)
        client.meta.events.register("response-received.s3.GetObject", self._after_read)
        credentials = session.get_credentials()
        return _Made(client, bool(credentials and credentials.token), stamps)

    def _before_read(self, **_: object) -> None:
        self.reads.wait()

    def _after_read(self, parsed_response: dict[str, Any] | None = None, **_: object) -> None:
        if parsed_response is not None:  # else there was no answer, which says nothing about rates
            self.reads.answered(too_many=is_throttled(parsed_response))

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


_CONFLICTS = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")


class S3Backend:
    """Objects through boto3, which replaces them in one step and reads and writes large ones in parallel parts."""

    form: ClassVar[str] = "s3://BUCKET/KEY"

    def __init__(self, connection: Connection) -> None:
        self.client = S3Client(connection)

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return True: `split_s3` reports missing parts."""
        return True

    @staticmethod
    def environment(connection: Connection) -> dict[str, str]:
        """Return the endpoint, the path of the credentials and the region, as far as they are set."""
        named = {
            "AWS_ENDPOINT_URL": connection.endpoint_url,
            "AWS_SHARED_CREDENTIALS_FILE": connection.credentials_file,
            "AWS_DEFAULT_REGION": connection.region,
        }
        return {key: value for key, value in named.items() if value}

    @contextmanager
    def _object(self, uri: str, action: Action) -> Iterator[tuple[Any, str, str]]:
        """Yield the client for calls about an object, its bucket and its key; see `S3Client.calls`."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, action) as client:
            yield client, bucket, key

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object."""
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with self._object(uri, "read") as (client, bucket, key):
            data: bytes = client.get_object(Bucket=bucket, Key=key, **span)["Body"].read()
            return data

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of an object."""
        with self._object(uri, "read") as (client, bucket, key):
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
            with closing(body):
                yield from body.iter_chunks(chunk)

    def write(self, uri: str, data: bytes) -> None:
        """Store an object."""
        with self._object(uri, "write") as (client, bucket, key):
            client.put_object(Bucket=bucket, Key=key, Body=data)

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of an object and its ETag."""
        with self._object(uri, "read") as (client, bucket, key):
            answer = client.get_object(Bucket=bucket, Key=key)
            return answer["Body"].read(), answer["ETag"].strip('"')

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Store bytes with `If-Match`, or with `If-None-Match: *` if nothing may be stored yet."""
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": f'"{tag}"'}
        with self._object(uri, "write") as (client, bucket, key):
            try:
                answer = client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
                return str(answer["ETag"]).strip('"')
            except ClientError as error:
                if error.response["Error"]["Code"] in _CONFLICTS or (tag and _is_absent(error)):
                    raise ConflictError(f"{uri}: another writer was faster") from error
                raise

    def upload_stream(self, stream: BinaryIO, uri: str) -> None:
        """Store what a stream gives, in parts, a few of which are in memory at a time."""
        with self._object(uri, "write") as (client, bucket, key):
            client.upload_fileobj(stream, bucket, key)

    def upload(self, path: Path, uri: str) -> None:
        """Store a file, in parts where it is large."""
        with self._object(uri, "write") as (client, bucket, key):
            client.upload_file(str(path), bucket, key)

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file, ranged and in parallel where it is large."""
        with self._object(uri, "read") as (client, bucket, key):
            client.download_file(bucket, key, str(path))

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside S3."""
        with self._object(source, "write") as (client, bucket, key):
            client.copy({"Bucket": bucket, "Key": key}, *split_s3(target))

    def exists(self, uri: str) -> bool:
        """Return whether an object is there."""
        from botocore.exceptions import ClientError

        with self._object(uri, "read") as (client, bucket, key):
            try:
                client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if _is_absent(error):
                    return False
                raise
        return True

    def page(self, uri: str, after: str | None) -> tuple[list[Entry], str | None]:
        """Return up to 1,000 objects whose keys start with the folder's, and the token of the next ones."""
        bucket, prefix = split_s3(uri.rstrip("/") + "/")
        more = {} if after is None else {"ContinuationToken": after}
        with self.client.calls(uri, "read") as client:
            page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more)
        entries = [
            Entry(f"s3://{bucket}/{o['Key']}", o["Size"], o.get("ETag", "").strip('"'), o["LastModified"].timestamp())
            for o in page.get("Contents", [])
        ]
        return entries, page.get("NextContinuationToken")

    def delete(self, uri: str) -> None:
        """Remove an object."""
        with self._object(uri, "write") as (client, bucket, key):
            client.delete_object(Bucket=bucket, Key=key)

    def keeps_versions(self, uri: str) -> bool | None:
        """Return whether the bucket keeps what is overwritten, as versioned buckets do; None if it does not say."""
        bucket, _ = split_s3(uri)
        try:
            with self.client.calls(uri, "read") as client:
                return "Status" in client.get_bucket_versioning(Bucket=bucket)
        except StorageError:
            return None

    def remove_empty_folders(self, uri: str) -> None:
        """Do nothing: S3 stores no folders."""


def _is_absent(error: Any) -> bool:
    return error.response["Error"]["Code"] in ABSENT


def split_s3(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket in the address; write s3://BUCKET/KEY")
    return bucket, key
