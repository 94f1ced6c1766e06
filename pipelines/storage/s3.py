"""S3 and what speaks its protocol as a storage backend: `s3://BUCKET/KEY`. The only importer of boto3, on first use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pipelines.storage.backend import Connection, Entry
from pipelines.storage.errors import StorageError, TransientStorageError, cut_short, not_found, reporting_os_errors

MAX_ATTEMPTS = 8
"""Tries that boto3 makes for one call before it reports a failure."""
TIMEOUT_S = 30.0
"""How long a server may send nothing."""
_FATAL = {
    "NoSuchBucket": "the bucket does not exist: create it, or name another with storage.root=s3://BUCKET",
    "InvalidAccessKeyId": "the access key is unknown to this server: check the credentials file or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials file or AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials may not do this: grant read, write and list on the bucket",
    "403": "the credentials may not do this: grant read, write and list on the bucket",
}
_ABSENT = ("404", "NoSuchKey", "NotFound")


class S3Backend:
    """Objects through boto3, which replaces them in one step and reads and writes large ones in parallel parts."""

    form: ClassVar[str] = "s3://BUCKET/KEY"

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return True: `split_s3` names what is missing."""
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

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object."""
        bucket, key = split_s3(uri)
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with _reporting(uri):
            data: bytes = self._client.get_object(Bucket=bucket, Key=key, **span)["Body"].read()
            return data

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of an object."""
        bucket, key = split_s3(uri)
        with _reporting(uri):
            body = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
            with closing(body):
                yield from body.iter_chunks(chunk)

    def write(self, uri: str, data: bytes) -> None:
        """Store an object."""
        bucket, key = split_s3(uri)
        with _reporting(uri):
            self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def upload(self, path: Path, uri: str) -> None:
        """Store a file, in parts where it is large."""
        bucket, key = split_s3(uri)
        with _reporting(uri):
            self._client.upload_file(str(path), bucket, key)

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file, ranged and in parallel where it is large."""
        bucket, key = split_s3(uri)
        with _reporting(uri):
            self._client.download_file(bucket, key, str(path))

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside S3."""
        bucket, key = split_s3(source)
        with _reporting(source):
            self._client.copy({"Bucket": bucket, "Key": key}, *split_s3(target))

    def exists(self, uri: str) -> bool:
        """Return whether an object is there."""
        from botocore.exceptions import ClientError

        bucket, key = split_s3(uri)
        with _reporting(uri):
            try:
                self._client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] in _ABSENT:
                    return False
                raise
        return True

    def list(self, uri: str) -> list[Entry]:
        """Return every object whose key begins with the folder's."""
        bucket, prefix = split_s3(uri.rstrip("/") + "/")
        with _reporting(uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            objects = [o for page in pages for o in page.get("Contents", [])]
        return [Entry(f"s3://{bucket}/{o['Key']}", o["Size"], o.get("ETag", "").strip('"')) for o in objects]

    def delete(self, uri: str) -> None:
        """Remove an object."""
        bucket, key = split_s3(uri)
        with _reporting(uri):
            self._client.delete_object(Bucket=bucket, Key=key)

    def remove_empty_folders(self, uri: str) -> None:
        """Do nothing: S3 stores no folders."""

    @property
    def _client(self) -> Any:
        return client(self.connection)


def split_s3(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket in the address; write s3://BUCKET/KEY")
    return bucket, key


@lru_cache(maxsize=8)
def client(connection: Connection) -> Any:
    """Return the boto3 client of a connection: one per process, which all threads may use."""
    import boto3
    from botocore.config import Config as ClientConfig

    # botocore reads the file's place from the environment only when a session is made.
    session = boto3.session.Session()
    if connection.credentials_file:
        session._session.set_config_variable("credentials_file", connection.credentials_file)
    client_config = ClientConfig(
        retries={"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
        connect_timeout=5,
        read_timeout=TIMEOUT_S,
        max_pool_connections=32,
    )
    return session.client(
        "s3",
        endpoint_url=connection.endpoint_url,
        region_name=connection.region or "us-east-1",
        config=client_config,
    )


@contextmanager
def _reporting(uri: str) -> Iterator[None]:
    """Turn what boto3 and the file system raise into a `StorageError` that says what to do."""
    with reporting_os_errors(uri), _reporting_answers(uri):
        yield


@contextmanager
def _reporting_answers(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into a `StorageError`. Its timeouts are of `OSError` as well: this comes first."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = str(error.response["Error"]["Code"])
        if code in _ABSENT:
            raise not_found(uri) from error
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "InvalidRange" or status == 416:
            raise cut_short(uri) from error
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
