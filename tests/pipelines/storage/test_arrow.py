"""The filesystem that Ray Train keeps its checkpoint list in: it does what pyarrow's do, and is fenced."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

from pipelines.storage import Fence, FencedError, Storage, StorageError
from pipelines.storage.arrow import open_filesystem

STORAGE = Storage()


def write(filesystem, path: str, data: bytes) -> None:
    with filesystem.open_output_stream(path) as file:
        file.write(data)


def listing(filesystem, folder: str, *, recursive: bool) -> set[tuple[str, FileType, int | None]]:
    infos = filesystem.get_file_info(FileSelector(folder, recursive=recursive))
    return {(info.path, info.type, info.size) for info in infos}


@pytest.mark.parametrize("recursive", [True, False])
def test_it_shows_what_pyarrows_own_filesystem_shows(tmp_path: Path, recursive):
    ours, folder = open_filesystem(STORAGE, f"file://{tmp_path}/run")
    for name in ("list.json", "a/state.json", "a/b/c"):
        write(ours, f"{folder}/{name}", name.encode())
    theirs = LocalFileSystem()
    assert listing(ours, folder, recursive=recursive) == listing(theirs, folder, recursive=recursive)
    for path in (f"{folder}/list.json", f"{folder}/a", f"{folder}/nothing"):
        assert ours.get_file_info(path).type == theirs.get_file_info(path).type
    with ours.open_input_stream(f"{folder}/a/b/c") as file:
        assert file.read() == b"a/b/c"
    with pytest.raises(FileNotFoundError):
        ours.open_input_file(f"{folder}/nothing")
    copy_files(f"{folder}/a", str(tmp_path / "copy"), source_filesystem=ours)
    assert (tmp_path / "copy" / "b" / "c").read_bytes() == b"a/b/c"
    ours.delete_dir(f"{folder}/a")
    assert listing(theirs, folder, recursive=True) == {(f"{folder}/list.json", FileType.File, 9)}


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path):
    filesystem, folder = open_filesystem(STORAGE, f"file://{tmp_path}")
    write(filesystem, f"{folder}/list.json", b"old")
    stream = filesystem.open_output_stream(f"{folder}/list.json")
    stream.write(b"new, but not yet whole")
    assert (tmp_path / "list.json").read_bytes() == b"old"
    stream.close()
    assert (tmp_path / "list.json").read_bytes() == b"new, but not yet whole"


def test_it_travels_and_stays_equal_to_itself():
    storage = Storage("http://h:1", "/keys", "r")
    filesystem, path = open_filesystem(storage, "s3://bucket/runs", Fence(storage, "s3://bucket/runs/x/driver", "t"))
    assert path == "bucket/runs"
    assert pickle.loads(pickle.dumps(filesystem)) == filesystem
    assert filesystem != open_filesystem(storage, "s3://bucket/runs")[0]


def test_a_driver_that_has_been_replaced_writes_and_deletes_nothing(tmp_path: Path):
    old, new = (Fence(STORAGE, f"file://{tmp_path}/driver", token) for token in ("old", "new"))
    old.take()
    filesystem, folder = open_filesystem(STORAGE, f"file://{tmp_path}", old)
    write(filesystem, f"{folder}/list.json", b"old")
    new.take()
    with pytest.raises(FencedError, match="another driver has taken over"):
        old.check()
    for attempt in (
        lambda: filesystem.open_output_stream(f"{folder}/list.json").close(),
        lambda: filesystem.delete_file(f"{folder}/list.json"),
        lambda: filesystem.delete_dir(folder),
    ):
        with pytest.raises(StorageError, match="another driver"):
            attempt()
    assert (tmp_path / "list.json").read_bytes() == b"old"
    new.check()
