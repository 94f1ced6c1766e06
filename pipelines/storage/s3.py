"""A storage backend for S3 and servers with its protocol: `s3://BUCKET/KEY`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pipelines.storage.backend import Connection, Entry
from pipelines.storage.errors import ConflictError, StorageError
from pipelines.storage.s3_client import S3Client
from pipelines.storage.s3_errors import ABSENT

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

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object."""
        bucket, key = split_s3(uri)
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with self.client.calls(uri, "read") as client:
            data: bytes = client.get_object(Bucket=bucket, Key=key, **span)["Body"].read()
            return data

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of an object."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "read") as client:
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
            with closing(body):
                yield from body.iter_chunks(chunk)

    def write(self, uri: str, data: bytes) -> None:
        """Store an object."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "write") as client:
            client.put_object(Bucket=bucket, Key=key, Body=data)

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of an object and its ETag."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "read") as client:
            answer = client.get_object(Bucket=bucket, Key=key)
            return answer["Body"].read(), answer["ETag"].strip('"')

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Store bytes with `If-Match`, or with `If-None-Match: *` if nothing may be stored yet."""
        from botocore.exceptions import ClientError

        bucket, key = split_s3(uri)
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": f'"{tag}"'}
        with self.client.calls(uri, "write") as client:
            try:
                answer = client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
                return str(answer["ETag"]).strip('"')
            except ClientError as error:
                if error.response["Error"]["Code"] in _CONFLICTS or (tag and _is_absent(error)):
                    raise ConflictError(f"{uri}: another writer was faster") from error
                raise

    def upload_stream(self, stream: BinaryIO, uri: str) -> None:
        """Store what a stream gives, in parts, a few of which are in memory at a time."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "write") as client:
            client.upload_fileobj(stream, bucket, key)

    def upload(self, path: Path, uri: str) -> None:
        """Store a file, in parts where it is large."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "write") as client:
            client.upload_file(str(path), bucket, key)

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file, ranged and in parallel where it is large."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "read") as client:
            client.download_file(bucket, key, str(path))

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside S3."""
        bucket, key = split_s3(source)
        with self.client.calls(source, "write") as client:
            client.copy({"Bucket": bucket, "Key": key}, *split_s3(target))

    def exists(self, uri: str) -> bool:
        """Return whether an object is there."""
        from botocore.exceptions import ClientError

        bucket, key = split_s3(uri)
        with self.client.calls(uri, "read") as client:
            try:
                client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if _is_absent(error):
                    return False
                raise
        return True

    def list(self, uri: str) -> list[Entry]:
        """Return every object whose key starts with the folder's."""
        bucket, prefix = split_s3(uri.rstrip("/") + "/")
        with self.client.calls(uri, "read") as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            objects = [o for page in pages for o in page.get("Contents", [])]
        return [
            Entry(f"s3://{bucket}/{o['Key']}", o["Size"], o.get("ETag", "").strip('"'), o["LastModified"].timestamp())
            for o in objects
        ]

    def delete(self, uri: str) -> None:
        """Remove an object."""
        bucket, key = split_s3(uri)
        with self.client.calls(uri, "write") as client:
            client.delete_object(Bucket=bucket, Key=key)

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
