"""The one door to stored bytes: S3 through boto3, folders through pathlib, the same calls for both.

Addresses are `s3://BUCKET/KEY` and `file:///PATH`. A `Storage` is a small frozen value that pickles; clients are made
per process. Secrets are never part of it: it holds the path of a credentials file, or nothing for AWS's own rules.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from pipelines.config import Config
from pipelines.errors import PipelineError

T = TypeVar("T")
MAX_ATTEMPTS = 8
PATIENCE_S = 300.0
_FATAL = {
    "NoSuchBucket": "the bucket does not exist: create it, or name another with storage.root=s3://BUCKET",
    "InvalidAccessKeyId": "the access key is unknown to this server: check the credentials file or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials file or AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials may not do this: grant read, write and list on the bucket",
    "403": "the credentials may not do this: grant read, write and list on the bucket",
}

_HINTS = {
    errno.ENOSPC: "free some, or set storage.root (and TMPDIR, where checkpoints are written first) to another disk",
    errno.EDQUOT: "free some, or set storage.root (and TMPDIR, where checkpoints are written first) to another disk",
    errno.EACCES: "the user of this process may not: change the folder's owner, or storage.root",
    errno.EROFS: "set storage.root to a disk that can be written",
}


class StorageError(PipelineError):
    """Stored bytes could not be read or written; says which address, why, and how to fix it."""


class NotFoundError(StorageError):
    """There is nothing at the address."""


class TransientStorageError(StorageError):
    """The server did not answer, or answered that it is busy: worth another try."""


@dataclass(frozen=True)
class Entry:
    """One stored object.

    Attributes:
        uri: its address.
        size: in bytes.
        tag: changes when the bytes do: the store's ETag, or a file's modification time in nanoseconds. The same bytes
            stored again may have another.
    """

    uri: str
    size: int
    tag: str


@dataclass(frozen=True)
class Storage:
    """Where S3 addresses are answered; None leaves a choice to AWS's own rules (environment, profile, role).

    Attributes:
        endpoint_url: of an S3 that is not AWS.
        credentials_file: AWS shared credentials file.
        region: signing region.
    """

    endpoint_url: str | None = None
    credentials_file: str | None = None
    region: str | None = None

    @classmethod
    def of(cls, config: Config) -> Storage:
        """The storage that a configuration names; the environment fills what it leaves open."""
        region = config.storage.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return cls(
            config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            config.storage.credentials_file or os.environ.get("AWS_SHARED_CREDENTIALS_FILE"),
            region,
        )

    def environment(self) -> dict[str, str]:
        """What processes that reach the same storage need in their environment: paths and endpoints, no secrets."""
        named = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_SHARED_CREDENTIALS_FILE": self.credentials_file,
            "AWS_DEFAULT_REGION": self.region,
        }
        return {key: value for key, value in named.items() if value}

    def read(self, uri: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) at an address; all of them by default."""
        if is_local(uri):
            with _reporting(uri), open(local_path(uri), "rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        bucket, key = split_s3(uri)
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with _reporting(uri):
            return _client(self).get_object(Bucket=bucket, Key=key, **span)["Body"].read()

    def stream(self, uri: str, start: int, stop: int, chunk: int = 1 << 20) -> Iterator[bytes]:
        """The bytes [start, stop) as they arrive; fewer where the object ends before.

        Raises:
            TransientStorageError: the connection broke; what was given out until then is good.
        """
        with _reporting(uri):
            if is_local(uri):
                with open(local_path(uri), "rb") as file:
                    file.seek(start)
                    while part := file.read(min(chunk, stop - file.tell())):
                        yield part
            else:
                bucket, key = split_s3(uri)
                body = _client(self).get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
                with closing(body):
                    yield from body.iter_chunks(chunk)

    def fetch(
        self, uri: str, start: int, stop: int, sink: Callable[[bytes], object], *, patience_s: float = PATIENCE_S
    ) -> int:
        """Hand the bytes [start, stop) to `sink` in order, going on where a connection broke; the number of requests.

        A store that is away for a minute costs a minute: requests are repeated with exponential backoff and jitter
        until one brings a byte or `patience_s` have passed without any.

        Raises:
            TransientStorageError: patience has run out.
            StorageError: what no patience mends, or an object that ends before `stop`.
        """
        at, requests = start, 0

        def request() -> None:
            nonlocal at, requests
            began = at
            requests += 1
            try:
                for part in self.stream(uri, at, stop):
                    sink(part)
                    at += len(part)
            except TransientStorageError:
                if at == began:
                    raise

        while at < stop:
            reached = at
            patiently(request, patience_s)
            if at == reached:
                raise StorageError(f"{uri} ends at byte {at}, {stop} were expected: it is cut short")
        return requests

    def write(self, uri: str, data: bytes) -> None:
        """Store bytes at an address, replacing what is there in one step."""
        with _reporting(uri):
            if is_local(uri):
                _atomically(local_path(uri), lambda temporary: temporary.write_bytes(data))
            else:
                bucket, key = split_s3(uri)
                _client(self).put_object(Bucket=bucket, Key=key, Body=data)

    def upload(self, path: Path, uri: str, *, patience_s: float = PATIENCE_S) -> None:
        """Store a file in one step; in parts where it is large. A store that is away for a minute costs a minute.

        Raises:
            TransientStorageError: patience has run out.
            StorageError: what no patience mends: no permission, a full disk, no such bucket.
        """

        def once() -> None:
            with _reporting(uri):
                if is_local(uri):
                    _atomically(local_path(uri), lambda temporary: shutil.copyfile(path, temporary))
                else:
                    bucket, key = split_s3(uri)
                    _client(self).upload_file(str(path), bucket, key)

        patiently(once, patience_s)

    def download(self, uri: str, path: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Fetch an object into a file; ranged and in parallel where it is large, and with patience.

        Raises:
            TransientStorageError: patience has run out.
            NotFoundError: nothing is stored there.
        """

        def once() -> None:
            with _reporting(uri):
                if is_local(uri):
                    shutil.copyfile(local_path(uri), path)
                else:
                    bucket, key = split_s3(uri)
                    _client(self).download_file(bucket, key, str(path))

        patiently(once, patience_s)

    def copy(self, source: str, target: str) -> None:
        """Store an object anew under another address; its bytes stay in S3 where both addresses are there."""
        if is_local(source):
            self.upload(local_path(source), target)
        elif is_local(target):
            with _reporting(source):
                _atomically(local_path(target), lambda temporary: self.download(source, temporary))
        else:
            bucket, key = split_s3(source)
            with _reporting(source):
                _client(self).copy({"Bucket": bucket, "Key": key}, *split_s3(target))

    def exists(self, uri: str) -> bool:
        """Whether an object is at the address."""
        if is_local(uri):
            return local_path(uri).is_file()
        from botocore.exceptions import ClientError

        bucket, key = split_s3(uri)
        with _reporting(uri):
            try:
                _client(self).head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
        return True

    def list(self, uri: str) -> list[Entry]:
        """Every object under a folder address, in order of address."""
        folder = uri.rstrip("/") + "/"
        if is_local(folder):
            files = sorted(p for p in local_path(folder).rglob("*") if p.is_file())
            return [Entry(f"file://{p}", (s := p.stat()).st_size, str(s.st_mtime_ns)) for p in files]
        bucket, prefix = split_s3(folder)
        with _reporting(uri):
            pages = _client(self).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            objects = [o for page in pages for o in page.get("Contents", [])]
        found = [Entry(f"s3://{bucket}/{o['Key']}", o["Size"], o.get("ETag", "").strip('"')) for o in objects]
        return sorted(found, key=lambda entry: entry.uri)

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with _reporting(uri):
            if is_local(uri):
                local_path(uri).unlink(missing_ok=True)
            else:
                bucket, key = split_s3(uri)
                _client(self).delete_object(Bucket=bucket, Key=key)

    def download_folder(self, uri: str, folder: Path) -> None:
        """Fetch every object under a folder address.

        Raises:
            NotFoundError: there is none.
        """
        entries = self.list(uri)
        if not entries:
            raise NotFoundError(f"{uri}: nothing is stored there")
        for entry in entries:
            path = folder / entry.uri[len(uri.rstrip("/")) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            self.download(entry.uri, path)

    def require(self, root: str) -> None:
        """Check, before anything starts, that a root can be listed and written.

        Raises:
            StorageError: no such bucket, wrong key, no permission or no server, with the fix.
        """
        probe = f"{root.rstrip('/')}/.ddpm-probe-{os.getpid()}"
        self.write(probe, b"")
        self.delete(probe)

    def arrow_uri(self, uri: str) -> str:
        """The address as pyarrow's filesystems (and so Ray) read it; it pickles with all its settings."""
        if is_local(uri):
            return str(local_path(uri))
        options = {}
        if self.endpoint_url:
            parts = urlsplit(self.endpoint_url)
            options = {"scheme": parts.scheme, "endpoint_override": parts.netloc}
        if self.region:
            options["region"] = self.region
        return f"{uri}?{urlencode(options)}" if options else uri


def patiently(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Repeat a call with exponential backoff and jitter while the store does not answer.

    Raises:
        TransientStorageError: it did not for `patience_s` seconds.
    """
    return Retrying(
        retry=retry_if_exception_type(TransientStorageError),
        wait=wait_exponential_jitter(multiplier=0.2, max=10),
        stop=stop_after_delay(patience_s),
        reraise=True,
    )(call)


def join(uri: str, *parts: str) -> str:
    """An address below another."""
    return "/".join([uri.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """Whether an address is a file's.

    Raises:
        StorageError: it is neither s3:// nor file:///.
    """
    if uri.startswith("file:///"):
        return True
    if uri.startswith("s3://"):
        return False
    raise StorageError(f"{uri}: addresses are s3://BUCKET/KEY or file:///PATH")


def local_path(uri: str) -> Path:
    """The path of a file:/// address."""
    return Path(uri.removeprefix("file://"))


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket in the address; write s3://BUCKET/KEY")
    return bucket, key


@lru_cache(maxsize=8)
def _client(storage: Storage) -> Any:
    """One thread-safe client per process and storage."""
    import boto3
    from botocore.config import Config as ClientConfig

    # botocore reads the file's place from the environment only when a session is made.
    session = boto3.session.Session()
    if storage.credentials_file:
        session._session.set_config_variable("credentials_file", storage.credentials_file)
    client_config = ClientConfig(
        retries={"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=32,
    )
    return session.client(
        "s3",
        endpoint_url=storage.endpoint_url,
        region_name=storage.region or "us-east-1",
        config=client_config,
    )


@contextmanager
def _reporting(uri: str) -> Iterator[None]:
    """Turn what boto3 and the file system raise into a `StorageError` that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{uri}: nothing is stored there") from error
    except OSError as error:
        hint = _HINTS.get(error.errno or 0)
        raise StorageError(f"{uri}: {error.strerror or error}{f': {hint}' if hint else ''}") from error
    except ClientError as error:
        code = str(error.response["Error"]["Code"])
        if code in ("404", "NoSuchKey", "NotFound"):
            raise NotFoundError(f"{uri}: nothing is stored there") from error
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind = TransientStorageError if status >= 500 or status == 429 else StorageError
        raise kind(f"{uri}: {_FATAL.get(code, error)}") from error
    except NoCredentialsError as error:
        raise StorageError(
            f"{uri}: no AWS credentials: set AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE or storage.credentials_file"
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        # Multipart helpers wrap the server's answer in a text that names its code.
        hint = next((fix for code, fix in _FATAL.items() if code in str(error)), None)
        if hint:
            raise StorageError(f"{uri}: {hint}") from error
        raise TransientStorageError(f"{uri}: {error}") from error


def _atomically(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
