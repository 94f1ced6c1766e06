import errno
import io
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from pipelines.config import compose
from pipelines.storage import (
    NotFoundError,
    Storage,
    StorageError,
    TransientStorageError,
    is_local,
    join,
)
from pipelines.storage.local import LocalBackend
from pipelines.storage.retry import retry
from pipelines.storage.s3 import split_s3

STORAGE = Storage()


@pytest.fixture
def close(monkeypatch):
    """Return a function that keeps a folder from being listed, also by root."""
    scandir = os.scandir

    def closing(folder):
        def refusing(path="."):
            if os.fspath(path) == os.path.normpath(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)

    return closing


@pytest.mark.parametrize("closed", ["a", "."])
def test_a_folder_that_cannot_be_listed_is_named_and_nothing_left_out(tmp_path, close, closed):
    STORAGE.write(f"file://{tmp_path}/store/a/c", b"c")
    close(tmp_path / "store" / closed)
    with pytest.raises(StorageError, match=r"Permission denied.*the user of this process may not"):
        STORAGE.list(f"file://{tmp_path}/store")


def test_the_root_of_a_disk_is_listed_without_what_the_system_keeps_there(tmp_path, close):
    STORAGE.write(f"file://{tmp_path}/a/c", b"c")
    (tmp_path / "lost+found").mkdir()
    close(tmp_path / "lost+found")
    assert [entry.uri for entry in STORAGE.list(f"file://{tmp_path}")] == [f"file://{tmp_path}/a/c"]


def test_a_file_that_may_not_be_looked_at_is_named(tmp_path, monkeypatch):
    def refusing(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refusing)
    with pytest.raises(StorageError, match="Permission denied"):
        STORAGE.exists(f"file://{tmp_path}/x")


def test_a_failed_write_leaves_the_old_bytes_and_no_debris(tmp_path):
    uri = f"file://{tmp_path}/x"
    STORAGE.write(uri, b"old")
    with pytest.raises(StorageError):
        STORAGE.upload(tmp_path / "missing", uri)
    assert STORAGE.read(uri) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_addresses_are_checked():
    assert is_local("file:///a")
    assert split_s3("s3://b/c/d") == ("b", "c/d")
    assert join("s3://b/", "c", "d") == "s3://b/c/d"
    for wrong in ("http://x", "/tmp/x", "file://x"):
        with pytest.raises(StorageError, match="addresses are s3://BUCKET/KEY or file:///PATH"):
            is_local(wrong)
    with pytest.raises(StorageError, match="no bucket"):
        split_s3("s3:///x")
    with pytest.raises(NotFoundError, match="nothing is stored there"):
        STORAGE.read("file:///nowhere/at/all")


def test_an_unreachable_server_is_worth_another_try_and_says_which(tmp_path, monkeypatch, no_pauses_of_boto):
    monkeypatch.setattr("pipelines.storage.s3.MAX_ATTEMPTS", 1)
    (tmp_path / "keys").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    away = Storage("http://127.0.0.1:9", str(tmp_path / "keys"))
    with pytest.raises(TransientStorageError, match=r"127\.0\.0\.1:9"):
        away.read("s3://bucket/key", patience_s=0)


def test_a_server_that_stalls_is_worth_another_try(tmp_path, monkeypatch, no_pauses_of_boto):
    monkeypatch.setattr("pipelines.storage.s3.MAX_ATTEMPTS", 1)
    monkeypatch.setattr("pipelines.storage.s3.TIMEOUT_S", 0.2)
    (tmp_path / "keys").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        stalled = Storage(f"http://127.0.0.1:{silent.getsockname()[1]}", str(tmp_path / "keys"))
        with pytest.raises(TransientStorageError, match="Read timeout"):
            stalled.read("s3://bucket/key", patience_s=0)


def test_patience_outlasts_a_store_that_is_away_and_no_other_fault(caplog):
    answers = iter([TransientStorageError("away"), TransientStorageError("away"), None])
    asked = 0

    def call() -> str:
        nonlocal asked
        asked += 1
        if (error := next(answers)) is not None:
            raise error
        return "done"

    assert (retry(call), asked) == ("done", 3)
    assert [record.message for record in caplog.records] == ["away; trying again for up to 300 s"]
    asked, answers = 0, iter([StorageError("no such bucket"), None])
    with pytest.raises(StorageError, match="no such bucket"):
        retry(call)
    assert asked == 1
    answers = iter([TransientStorageError("away")] * 9)
    with pytest.raises(TransientStorageError):
        retry(call, patience_s=0.1)


def test_explicit_settings_beat_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-1")
    assert Storage.of(compose()) == Storage("http://env", None, "eu-1")
    explicit = compose(["storage.endpoint_url=http://explicit", "storage.region=us-2"])
    assert Storage.of(explicit) == Storage("http://explicit", None, "us-2")


def test_workers_are_told_paths_and_endpoints_only():
    assert Storage("http://e", "/c", "r").environment() == {
        "AWS_ENDPOINT_URL": "http://e",
        "AWS_SHARED_CREDENTIALS_FILE": "/c",
        "AWS_DEFAULT_REGION": "r",
    }


def test_a_full_disk_and_a_missing_permission_say_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match=r"No space left on device: free some, or set storage\.root"):
        STORAGE.upload(tmp_path / "file", f"file://{tmp_path}/store/x")
    assert not list((tmp_path / "store").iterdir())
    (tmp_path / "a-file").write_text("")
    with pytest.raises(StorageError, match="a-file/x"):
        STORAGE.write(f"file://{tmp_path}/a-file/x", b"")


def test_a_file_that_is_replaced_while_its_folder_is_listed_does_no_harm(tmp_path):
    """Every write has a temporary file beside its place for a moment."""
    uri, ending = f"file://{tmp_path}/store", threading.Event()

    def write() -> None:
        while not ending.is_set():
            STORAGE.write(f"{uri}/x", b"x")

    STORAGE.write(f"{uri}/x", b"x")
    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(500):
            assert f"{uri}/x" in {entry.uri for entry in STORAGE.list(uri)}
    finally:
        ending.set()
        for writer in writers:
            writer.join()


def test_a_deleted_folder_leaves_nothing_behind(tmp_path):
    for name in ("store/a/b/c", "store/d", "other/e"):
        STORAGE.write(f"file://{tmp_path}/{name}", b"x")
    for _ in range(2):
        STORAGE.delete_folder(f"file://{tmp_path}/store")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_stream_is_stored_whole_and_begun_again_for_every_try(tmp_path, monkeypatch):
    uri, data = f"file://{tmp_path}/a/b", os.urandom(3 * 2**20 + 1)
    started = []

    def start():
        started.append(io.BytesIO(data))
        return started[-1]

    STORAGE.upload_stream(start, uri)
    assert STORAGE.read(uri) == data
    upload = LocalBackend.upload_stream

    def breaks_once(self, stream, uri):
        if len(started) == 2:
            stream.read(100)
            raise TransientStorageError(f"{uri}: gone for a moment")
        upload(self, stream, uri)

    monkeypatch.setattr(LocalBackend, "upload_stream", breaks_once)
    STORAGE.upload_stream(start, uri)
    assert len(started) == 3
    assert STORAGE.read(uri) == data


def test_a_stream_that_breaks_leaves_the_old_bytes_and_no_debris(tmp_path):
    class Breaks(io.RawIOBase):
        def read(self, size=-1):
            raise OSError("torn")

    uri = f"file://{tmp_path}/x"
    STORAGE.write(uri, b"old")
    with pytest.raises(StorageError, match="torn"):
        STORAGE.upload_stream(Breaks, uri)
    assert STORAGE.read(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
