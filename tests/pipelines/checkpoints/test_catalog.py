"""Which checkpoints of a run are kept, which one it resumes from, and what is deleted."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.checkpoints import (
    CheckpointList,
    Listed,
    ModelError,
    checkpoint_name,
    complete_checkpoints,
    enter_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    sweep,
    take_over,
)
from pipelines.checkpoints.catalog import GRACE_S
from pipelines.config import Config, compose
from pipelines.storage import Entry, FencedError, Storage
from tests.pipelines.checkpoints.tiny import a_checkpoint, fetch_newest

STORAGE = Storage()


class Run:
    """The folder of a run on this disk."""

    def __init__(self, root: Path) -> None:
        self.path, self.uri = root / "runs" / "run", f"file://{root}/runs/run"
        self.config: Config = compose(["+experiment=digits", "name=run", "storage=file", f"storage.root=file://{root}"])

    def store(self, images: int, epoch: int = 1) -> str:
        """Store a complete checkpoint without entering it, and return its name."""
        name = checkpoint_name(images, epoch)
        (self.path / name).mkdir(parents=True)
        save_checkpoint(self.path / name, a_checkpoint(images))
        return name

    def enter(self, images: int, epoch: int = 1, keep: int = 2, damaged: frozenset[str] = frozenset()) -> str:
        name = self.store(images, epoch)
        enter_checkpoint(STORAGE, self.uri, Listed(epoch, images, name), keep, damaged)
        return name

    def listed(self) -> list[str]:
        found = CheckpointList.from_json((self.path / "checkpoints.json").read_bytes())
        assert found is not None
        return [entry.name for entry in found.checkpoints]

    def folders(self) -> set[str]:
        return {path.name for path in self.path.glob("checkpoint_*")}

    def newest(self) -> int | None:
        """Return the images seen of the checkpoint that a restart reads."""
        state, _ = fetch_newest(STORAGE, self.uri, self.path.parent / "fetched")
        if state is not None:
            assert load_checkpoint(self.path.parent / "fetched")[0] == state
        return state.images_seen if state else None

    def age(self, name: str, seconds: float) -> None:
        for path in (self.path / name).iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_checkpoint_with_a_file_that_was_cut_short_is_not_complete(tmp_path):
    run = Run(tmp_path)
    whole, cut = run.store(100), run.store(200)
    path = run.path / cut / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert [listed.name for listed, _ in complete_checkpoints(STORAGE, run.uri)] == [whole]


def test_the_newest_stay_and_the_others_are_deleted(run):
    assert run.newest() is None
    names = [run.enter(images) for images in (100, 200, 300)]
    assert run.listed() == names[1:]
    assert run.folders() == set(names[1:])
    assert run.newest() == 300


def test_a_lost_or_damaged_list_is_made_again_from_the_complete_folders(run):
    names = [run.enter(images) for images in (100, 200)]
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b'{"list_version": 1, "epo')):
        damage(run.path / "checkpoints.json")
        assert newest_checkpoint(run.config).images_seen == 200
        assert run.newest() == 200
        assert sweep(STORAGE, run.uri) == []  # without a list nothing is known to be old
        take_over(STORAGE, run.uri)
        assert run.listed() == names
    (run.path / "checkpoints.json").unlink()
    newer = run.enter(300, epoch=2)  # in the middle of a training
    assert run.listed() == [names[1], newer]
    assert run.folders() == {names[1], newer}


def test_without_any_one_file_of_the_newest_checkpoint_the_one_before_is_used(run):
    run.enter(100)
    newest = run.path / run.enter(200)
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        path.unlink()
        assert run.newest() == 100, path.name
        assert newest_checkpoint(run.config).images_seen == 100
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert run.newest() == 100, path.name
        path.write_bytes(data)
    assert run.newest() == 200


def test_a_kill_at_any_byte_of_an_upload_leaves_the_newest_whole_one(run, tmp_path):
    run.enter(100)
    (tmp_path / "whole").mkdir()
    save_checkpoint(tmp_path / "whole", a_checkpoint(200))
    order = ["model.json", "model.safetensors", "training.safetensors", "state.json"]
    written = [(name, (tmp_path / "whole" / name).read_bytes()) for name in order]
    new = run.path / checkpoint_name(200, 1)
    for number, (name, data) in enumerate(written):
        cuts = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1}
        cuts |= set(range(0, len(data), 97)) if name == "state.json" else set()
        for cut in cuts:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            for done, content in written[:number]:
                (new / done).write_bytes(content)
            (new / name).write_bytes(data[:cut])
            assert run.newest() == 100, (name, cut)
    shutil.copytree(tmp_path / "whole", new, dirs_exist_ok=True)
    assert run.newest() == 200  # whole, though the kill came before it was entered
    take_over(STORAGE, run.uri)
    assert run.listed()[-1] == new.name


def test_a_damaged_checkpoint_does_not_take_a_whole_ones_place(run):
    whole = run.enter(100)
    damaged = run.path / run.enter(200)
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # the size is right
    state, unreadable = fetch_newest(STORAGE, run.uri, run.path.parent / "fetched")
    assert (state.images_seen, unreadable) == (100, {damaged.name})
    newer = run.enter(200, damaged=unreadable)
    assert run.listed() == [whole, newer]
    assert run.folders() == {whole, newer}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(run):
    for images in (100, 200):
        shutil.rmtree(run.path / run.enter(images))
    with pytest.raises(ModelError, match=r"(?s)no checkpoint in .* is whole.*state\.json is missing.*start again"):
        run.newest()
    with pytest.raises(ModelError, match=r"state\.json is missing"):
        newest_checkpoint(run.config)
    other = run.store(300)
    path = run.path / other / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoint_version": 99}))
    with pytest.raises(ModelError, match="this release reads"):
        run.newest()
    (run.path / "checkpoints.json").unlink()
    with pytest.raises(ModelError, match="this release reads"):
        run.newest()
    run.store(50)
    assert run.newest() == 50


def test_a_first_upload_that_was_killed_is_no_checkpoint(run):
    name = run.store(100)
    (run.path / name / "state.json").unlink()
    assert run.newest() is None
    assert newest_checkpoint(run.config) is None


def nothing() -> None:
    """What happens at every listing but the first."""


class Meanwhile(Storage):
    """A storage in which something happens just before, or just after, its first listing of files."""

    def __init__(self, before: Callable[[], object] = nothing, after: Callable[[], object] = nothing) -> None:
        super().__init__()
        self.before, self.after = before, after

    def list(self, uri: str) -> list[Entry]:  # type: ignore[override]
        self.before()
        found = super().list(uri)
        self.after()
        self.before = self.after = nothing
        return found


def test_a_first_checkpoint_that_is_entered_while_a_run_is_looked_at_is_not_missed(run, monkeypatch):
    meanwhile = Meanwhile(after=lambda: run.enter(100))
    monkeypatch.setattr(Storage, "of", lambda config: meanwhile)
    assert newest_checkpoint(run.config) is None
    assert newest_checkpoint(run.config).images_seen == 100


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_that_give_way_while_a_run_is_looked_at_are_not_missed(run, caplog, monkeypatch, keep):
    def go_on() -> None:
        run.enter(300, keep=keep)
        run.enter(400, keep=keep)

    run.enter(100)
    run.enter(200)
    meanwhile = Meanwhile(before=go_on)
    monkeypatch.setattr(Storage, "of", lambda config: meanwhile)
    assert newest_checkpoint(run.config).images_seen == 400
    assert not caplog.records


def test_drivers_are_numbered_and_the_later_ones_checkpoints_are_newer(run):
    first, second = take_over(STORAGE, run.uri), take_over(STORAGE, run.uri)
    assert (first.epoch, second.epoch) == (1, 2)
    run.enter(100, epoch=2)
    run.store(500, epoch=1)  # the first driver's worker was far ahead, and is too late to enter it
    assert run.newest() == 100
    shutil.rmtree(run.path / next(iter(n for n in run.folders() if "-e2-" in n)))
    assert run.newest() == 500
    (run.path / "driver").unlink()
    (run.path / "checkpoints.json").unlink()
    run.store(7, epoch=6)
    assert take_over(STORAGE, run.uri).epoch == 7  # the names of the folders still know


def test_a_replaced_driver_can_neither_enter_nor_delete(run):
    take_over(STORAGE, run.uri)
    mine = [run.enter(images) for images in (100, 200)]
    new = take_over(STORAGE, run.uri)
    before = (run.path / "checkpoints.json").read_bytes()
    with pytest.raises(FencedError, match="another driver has taken over"):
        run.enter(300, epoch=1)
    assert (run.path / "checkpoints.json").read_bytes() == before
    assert set(mine) <= run.folders()
    new.check()


def test_two_workers_that_enter_at_once_lose_nothing_of_each_other(run):
    names = {images: run.store(images) for images in range(100, 900, 100)}
    threads = [
        threading.Thread(target=enter_checkpoint, args=(STORAGE, run.uri, Listed(1, images, name), 100))
        for images, name in names.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert run.listed() == [names[images] for images in sorted(names)]


def test_a_sweep_deletes_only_remains_that_nobody_writes_any_more(run):
    oldest, newest = run.enter(300, epoch=2), run.enter(500, epoch=2)
    superseded, unlisted_newer, between = run.store(200, epoch=1), run.store(600, epoch=2), run.store(400, epoch=2)
    half, half_of_now = run.store(100, epoch=1), run.store(700, epoch=2)
    for name in (half, half_of_now):
        (run.path / name / "state.json").unlink()
    (run.path / "published" / "000000000100-e1-x").mkdir(parents=True)
    (run.path / "published" / "000000000100-e1-x" / "state.json").write_text("{}")
    everything = run.folders()
    assert sweep(STORAGE, run.uri) == []
    assert run.folders() == everything
    for name in everything - {newest}:
        run.age(name, GRACE_S - 60)
    assert sweep(STORAGE, run.uri) == []
    assert sweep(STORAGE, run.uri, epoch=2) == [half_of_now]  # whose workers have ended
    for name in everything - {newest, half_of_now}:
        run.age(name, 120)
    assert sweep(STORAGE, run.uri) == sorted([half, superseded])
    assert run.folders() == {oldest, newest, unlisted_newer, between}
    assert (run.path / "published" / "000000000100-e1-x" / "state.json").exists()


def test_a_kill_in_the_middle_of_a_rotation_leaves_no_checkpoint_that_looks_whole(run, monkeypatch):
    old = run.enter(100, keep=1)
    deleted: list[str] = []
    monkeypatch.setattr(Storage, "delete", lambda self, uri, **_: deleted.append(uri.rsplit("/", 1)[1]))
    monkeypatch.setattr(Storage, "delete_folder", lambda self, uri, **_: deleted.append(uri.rsplit("/", 1)[1]))
    run.enter(200, keep=1)
    assert deleted == ["state.json", old]


def test_checkpoints_of_a_release_that_kept_no_list_are_found(run):
    (run.path / "checkpoint_2026-11-01_10-00-00.000001").mkdir(parents=True)
    save_checkpoint(run.path / "checkpoint_2026-11-01_10-00-00.000001", a_checkpoint(100))
    (run.path / "driver").write_text("0123456789abcdef0123456789abcdef")
    assert run.newest() == 100
    assert take_over(STORAGE, run.uri).epoch == 1
    assert run.listed() == ["checkpoint_2026-11-01_10-00-00.000001"]
    assert [entry.epoch for entry, _ in complete_checkpoints(STORAGE, run.uri)] == [0]


def test_no_file_is_taken_that_the_state_does_not_name(run):
    name = run.enter(100)
    (run.path / name / "more").write_text("planted")
    assert run.newest() == 100
    assert not (run.path.parent / "fetched" / "more").exists()
