"""Conditional writes: of several writers one succeeds, and nobody undoes what another has written."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from pipelines.storage import ConflictError, NotFoundError, Storage, TransientStorageError

STORAGE = Storage()


@pytest.fixture(params=["file", "local"])
def uri(request, tmp_path: Path) -> str:
    """Of a file by its own backend, and by fsspec's."""
    return f"{request.param}://{tmp_path}/list.json"


def test_bytes_are_stored_only_where_the_expected_ones_are(uri):
    with pytest.raises(ConflictError, match="another writer was faster"):
        STORAGE.write_if(uri, b"second", "some tag")
    tag = STORAGE.write_if(uri, b"first", None)
    assert STORAGE.read_tagged(uri) == (b"first", tag)
    with pytest.raises(ConflictError):
        STORAGE.write_if(uri, b"also first", None)
    newer = STORAGE.write_if(uri, b"second", tag)
    with pytest.raises(ConflictError):
        STORAGE.write_if(uri, b"third", tag)
    assert STORAGE.read_tagged(uri) == (b"second", newer)
    with pytest.raises(NotFoundError):
        STORAGE.read_tagged(uri + ".other")


def test_a_write_whose_answer_was_lost_is_known_to_have_succeeded(uri, monkeypatch):
    write_if, lost = type(STORAGE._backend(uri)).write_if, []

    def without_answer(self, uri, data, tag):
        found = write_if(self, uri, data, tag)
        if not lost:
            lost.append(uri)
            raise TransientStorageError("no answer")
        return found

    monkeypatch.setattr(type(STORAGE._backend(uri)), "write_if", without_answer)
    tag = STORAGE.write_if(uri, b"first", None)
    assert lost
    assert STORAGE.read_tagged(uri) == (b"first", tag)


def test_an_update_that_raises_stores_nothing(uri):
    STORAGE.write(uri, b"first")

    def refuse(stored: bytes | None) -> bytes:
        assert stored == b"first"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        STORAGE.update(uri, refuse)
    assert STORAGE.read(uri) == b"first"


def _append(uri: str, who: int, count: int) -> None:
    for number in range(count):

        def change(stored: bytes | None, number: int = number) -> bytes:
            return json.dumps([*json.loads(stored or b"[]"), [who, number]]).encode()

        Storage().update(uri, change)


def test_processes_that_update_a_file_at_once_lose_nothing_of_each_other(tmp_path):
    uri, context = f"file://{tmp_path}/list.json", multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(uri, who, 20)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries = json.loads(STORAGE.read(uri))
    assert sorted(entries) == [[who, number] for who in range(4) for number in range(20)]
    assert [e.uri for e in STORAGE.list(f"file://{tmp_path}")] == [uri]  # without the lock
    STORAGE.delete_folder(f"file://{tmp_path}")
    assert not tmp_path.exists()
