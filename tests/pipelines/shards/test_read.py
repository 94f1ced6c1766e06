"""What a reader decodes, and the errors that name a sample it cannot read."""

import os
import tempfile
from pathlib import Path

import pytest

from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.read import CacheFolderError, default_cache_dir, read_split, spread_positions
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import Storage
from tests.pipelines.shards.tars import picture, reader, write_shard

STORAGE = Storage()


def test_every_kind_of_image_member_is_read_and_the_first_kind_wins(tmp_path):
    entries = [
        ("a.png", picture(1)),
        ("a.npy", picture(99, "npy")),
        ("b.webp", picture(2, "webp")),
        ("c.npy", picture(3, "npy")),
        ("d.png", picture(4, mode="L")),
    ]
    write_shard(tmp_path / "train.tar", entries)
    dataset = index_tars(f"file://{tmp_path}", STORAGE).dataset
    images = read_split(reader(dataset, tmp_path)).images
    assert ((images + 1) * 127.5).round().flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x89PNG", r"file:///.*: sample 001 of train-0.tar png cannot be decoded: it is no PNG.*`ddpm check file"),
        (picture(1)[:-30], r"sample 001 of train-0.tar png cannot be decoded"),
        (None, r"sample 001 of train-0.tar has no image"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_by_its_key(tmp_path, content, message):
    entries = [("000.png", picture(0)), ("001.txt", b"words")]
    write_shard(tmp_path / "train-0.tar", [*entries, ("001.png", content)] if content else entries)
    done = index_tars(f"file://{tmp_path}", STORAGE, quarantine=True)
    with pytest.raises(ShardCorruptError, match=message):
        read_split(reader(done.dataset, tmp_path))
    assert len(read_split(reader(done.dataset, tmp_path, done.quarantine)).images) == 1


@pytest.mark.parametrize("home", [None, "/proc/nobody"])
def test_a_user_without_a_home_has_the_cache_below_tmpdir(tmp_path, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 12345)  # which no name belongs to
    else:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert default_cache_dir() == tmp_path / f"cache-{os.getuid()}" / "ddpm" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/ddpm/shards")


def test_a_home_that_can_be_written_has_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ddpm" / "shards"


def test_a_cache_folder_that_another_user_has_made_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"cache-{os.getuid()}").symlink_to("/etc")
    with pytest.raises(CacheFolderError, match="is another user's: set XDG_CACHE_HOME"):
        default_cache_dir()


def test_positions_are_spread_over_all_with_the_first_and_the_last():
    assert spread_positions(5, 9).tolist() == [0, 1, 2, 3, 4]
    found = spread_positions(100, 24).tolist()
    assert len(set(found)) == 24
    assert (found[0], found[-1]) == (0, 99)
