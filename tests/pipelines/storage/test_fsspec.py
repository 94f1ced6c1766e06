"""Storage through fsspec: on files, and on Google Cloud Storage as its emulator answers where that is installed."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from tenacity import wait_none

from pipelines.storage import (
    BACKENDS,
    NotFoundError,
    Storage,
    StorageError,
    TransientStorageError,
    is_local,
    join,
)
from tests.forked import FORKING
from tests.gcs import gcs_emulator

STORAGE = Storage()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an emulator that runs beside the tests."""
    with gcs_emulator() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield "gs://ddpm"


@pytest.fixture(params=["file", "local", "gs"])
def root(request, tmp_path: Path) -> str:
    """The address of an empty folder; file:/// is not of fsspec, and keeps the same promises."""
    if request.param != "gs":
        return f"{request.param}://{tmp_path}/store"
    return join(request.getfixturevalue("bucket"), uuid.uuid4().hex)


@contextmanager
def elsewhere(function: Callable[[str, Connection], None], uri: str) -> Iterator[tuple[BaseProcess, Connection]]:
    """Another process that uses storage, and what it says."""
    heard, said = FORKING.Pipe(duplex=False)
    arguments = (function, uri, said, os.environ.get("STORAGE_EMULATOR_HOST"))
    process = FORKING.Process(target=call_elsewhere, args=arguments)
    process.start()
    said.close()
    try:
        yield process, heard
    finally:
        process.kill()
        process.join()


def call_elsewhere(function: Callable[[str, Connection], None], uri: str, said: Connection, gcs: str | None) -> None:
    if gcs is not None:
        os.environ["STORAGE_EMULATOR_HOST"] = gcs
    function(uri, said)


def write_five(root: str, said: Connection) -> None:
    for i in range(5):
        STORAGE.write(f"{root}/{i}", bytes(i))


def read_one(root: str, said: Connection) -> None:
    said.send((STORAGE.read(f"{root}/3"), STORAGE.exists(f"{root}/9")))


def write_for_ever(uri: str, said: Connection) -> None:
    for number in itertools.count(1):
        STORAGE.write(uri, bytes([number % 256]) * (1 << 20))
        said.send(number)


def test_objects_round_trip_and_ranges_are_half_open(root):
    uri = join(root, "a/b.bin")
    assert not STORAGE.exists(uri)
    STORAGE.write(uri, b"0123456789")
    assert STORAGE.read(uri) == b"0123456789"
    assert STORAGE.read(uri, 3, 6) == b"345"
    assert STORAGE.read(uri, 0, 6) == b"012345"
    assert STORAGE.read(uri, 8) == b"89"
    assert STORAGE.read(uri, 8, 100) == b"89"
    assert STORAGE.exists(uri)
    assert not STORAGE.exists(join(root, "a"))
    got = bytearray()
    assert STORAGE.fetch(uri, 2, 9, got.extend) == 1
    assert got == b"2345678"
    with pytest.raises(StorageError, match="ends at byte 10, 20 were expected"):
        STORAGE.fetch(uri, 0, 20, got.extend)
    STORAGE.delete(uri)
    STORAGE.delete(uri)
    assert not STORAGE.exists(uri)
    for missing in (lambda: STORAGE.read(uri), lambda: STORAGE.copy(uri, uri + "2")):
        with pytest.raises(NotFoundError, match="nothing is stored there"):
            missing()


def test_folders_are_listed_in_order_and_go_whole(root, tmp_path):
    for name in ("b", "a/c", "a/d", "ab/e"):
        STORAGE.write(join(root, name), name.encode())
    listed = STORAGE.list(root)
    assert [entry.uri for entry in listed] == [join(root, name) for name in ("a/c", "a/d", "ab/e", "b")]
    assert [entry.size for entry in listed] == [3, 3, 4, 1]
    assert all(abs(entry.modified - time.time()) < 60 for entry in listed)
    time.sleep(0.01)
    STORAGE.write(join(root, "b"), b"B")
    assert STORAGE.list(root)[-1].tag != listed[-1].tag
    assert STORAGE.list(root)[0].tag == listed[0].tag
    assert STORAGE.list(join(root, "none")) == []
    STORAGE.download_folder(join(root, "a"), tmp_path / "copy")
    assert (tmp_path / "copy" / "d").read_bytes() == b"a/d"
    with pytest.raises(NotFoundError, match="nothing is stored there"):
        STORAGE.download_folder(join(root, "none"), tmp_path / "copy")
    STORAGE.delete_folder(join(root, "a"))
    assert [entry.uri for entry in STORAGE.list(root)] == [join(root, "ab/e"), join(root, "b")]


def test_files_go_up_and_down_and_across(root, tmp_path):
    data = os.urandom(3 << 20) + b"."  # the emulator of GCS drops a line break at the end of an upload
    (tmp_path / "file").write_bytes(data)
    STORAGE.upload(tmp_path / "file", join(root, "x"))
    STORAGE.copy(join(root, "x"), join(root, "deep/y"))
    STORAGE.copy(join(root, "deep/y"), f"file://{tmp_path}/here/z")
    STORAGE.copy(f"file://{tmp_path}/here/z", join(root, "x"))
    STORAGE.download(join(root, "x"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    STORAGE.upload_stream(lambda: io.BytesIO(data), join(root, "deep/y"))
    assert STORAGE.read(join(root, "deep/y")) == data
    assert len(STORAGE.list(root)) == 2
    with pytest.raises(StorageError):
        STORAGE.upload(tmp_path / "missing", join(root, "x"))
    assert STORAGE.read(join(root, "x"), 5, 9) == data[5:9]


@pytest.mark.parametrize("root", ["local", "gs"], indirect=True)
def test_another_process_sees_at_once_what_this_one_stores(root):
    assert STORAGE.list(root) == []
    with elsewhere(write_five, root) as (writer, _):
        writer.join(60)
        assert writer.exitcode == 0
    assert [entry.size for entry in STORAGE.list(root)] == [0, 1, 2, 3, 4]
    STORAGE.write(join(root, "3"), b"new")
    with elsewhere(read_one, root) as (_, heard):
        assert heard.poll(60)
        assert heard.recv() == (b"new", False)


@pytest.mark.parametrize("root", ["local", "gs"], indirect=True)
def test_a_writer_that_is_killed_leaves_the_old_bytes_or_the_new_ones(root):
    uri = join(root, "state")
    STORAGE.write(uri, b"\0" * (1 << 20))
    for _ in range(3):
        with elsewhere(write_for_ever, uri) as (writer, heard):
            for _ in range(3):
                heard.recv()
                data = STORAGE.read(uri)
                assert (len(data), len(set(data))) == (1 << 20, 1)
            assert writer.is_alive()
        data = STORAGE.read(uri)
        assert (len(data), len(set(data))) == (1 << 20, 1)


def test_a_folder_that_is_deleted_while_it_is_listed_does_not_make_the_list_short(tmp_path, monkeypatch):
    root = f"local://{tmp_path}/store"
    for name in ("a/x", "b/x", "c"):
        STORAGE.write(f"{root}/{name}", b"x")
    fs = type(fsspec.filesystem("local"))
    listed = fs.ls

    def ls(self, path, detail=False, **options):
        found = listed(self, path, detail, **options)
        shutil.rmtree(tmp_path / "store" / "a", ignore_errors=True)
        return found

    monkeypatch.setattr(fs, "ls", ls)
    assert [entry.uri.removeprefix(root) for entry in STORAGE.list(root)] == ["/b/x", "/c"]


def test_what_is_wrong_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/x"):
        STORAGE.write(f"local://{tmp_path}/file/x", b"")
    monkeypatch.setitem(BACKENDS, "nosuch", BACKENDS["gs"])
    with pytest.raises(StorageError, match="nosuch"):
        STORAGE.read("nosuch://x/y")
    with pytest.raises(StorageError, match="addresses are s3://BUCKET/KEY or file:///PATH or another URL"):
        STORAGE.read("gs://")
    assert not is_local(f"local://{tmp_path}")


def test_a_server_that_is_away_is_worth_another_try(monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda seconds: _soon())
    with pytest.raises(TransientStorageError, match=r"127\.0\.0\.1:9|Cannot connect"):
        STORAGE.read("gs://bucket/key", patience_s=0)


class AuthenticationException(Exception):  # noqa: N818 - paramiko's name
    """A wrong password."""


class PasswordRequiredException(AuthenticationException):
    """A key that needs a password."""


class NoValidConnectionsError(OSError):
    """A server that cannot be reached, as paramiko says it: without a number."""

    def __init__(self):
        super().__init__(None, "Unable to connect to port 22 on 10.0.0.1")


class HttpError(Exception):
    """What a server answered, as gcsfs says it."""

    def __init__(self, code):
        super().__init__(f"{code}")
        self.code = code


class Sftp(AbstractFileSystem):
    """A file system whose first connections fail or break, and whose instances are kept as fsspec keeps them."""

    protocol = "sftp"
    errors: ClassVar[list[Exception]] = []
    refusals: ClassVar[list[Exception | None]] = []
    made = 0

    def __init__(self, **options):
        super().__init__(**options)
        type(self).made += 1
        if self.refusals and (error := self.refusals.pop(0)):
            raise error

    def cat_file(self, path, start=None, end=None, **options):
        if self.errors:
            raise self.errors.pop(0)
        return b"bytes"


@pytest.fixture
def sftp(monkeypatch):
    monkeypatch.setattr("pipelines.storage.retry.BACKOFF", wait_none())
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "sftp", Sftp)
    monkeypatch.setattr(Sftp, "made", 0)
    Sftp.clear_instance_cache()
    return Sftp


def test_a_connection_that_broke_is_made_anew_for_as_long_as_the_server_is_away(sftp):
    sftp.errors[:] = [RuntimeError("Server connection dropped"), OSError("Socket is closed")]
    sftp.refusals[:] = [None, None, NoValidConnectionsError()]
    assert STORAGE.read("sftp://host/file") == b"bytes"
    assert sftp.made == 4


@pytest.mark.parametrize("error", [AuthenticationException("no"), PasswordRequiredException("no"), OSError("no")])
def test_a_wrong_password_and_what_a_server_forbids_are_final(sftp, error):
    sftp.errors[:] = [error]
    with pytest.raises(StorageError, match=r"no$") as refused:
        STORAGE.read("sftp://host/file")
    assert not isinstance(refused.value, TransientStorageError)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_a_server_that_answers_that_it_is_busy_keeps_its_connection(sftp, status):
    sftp.errors[:] = [HttpError(status)]
    assert STORAGE.read("sftp://host/file") == b"bytes"
    assert sftp.made == 1


async def _soon() -> None:
    pass


def test_workers_are_told_where_settings_are(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/keys.json")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "secret")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    assert Storage().environment() == {"GOOGLE_APPLICATION_CREDENTIALS": "/keys.json"}
