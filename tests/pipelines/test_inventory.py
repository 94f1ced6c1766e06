"""Deleting what may go, on files, with a list of runs in place of MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import inventory, tracking
from pipelines.checkpoints import CheckpointList, CheckpointState, Listed, newest_checkpoint, run_folder
from pipelines.config import Config, compose
from pipelines.housekeeping import Folder, RemovalError, Verdict
from pipelines.storage import Storage, StorageError, join
from pipelines.tracking import RunRecord, TrackingError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    overrides = ["storage=file", f"storage.root=file://{tmp_path}", "tracking.uri=http://mlflow", "name=first"]
    return compose(["+experiment=digits", *overrides])


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[RunRecord]:
    """What MLflow has; one that is deleted leaves the list."""
    there = [RunRecord("id", "first", "ddpm", "KILLED")]

    def delete(uri: str, run_id: str) -> None:
        there[:] = [record for record in there if record.run_id != run_id]

    monkeypatch.setattr(tracking, "list_runs", lambda uri, name=None: list(there))
    monkeypatch.setattr(tracking, "all_versions", lambda uri: [])
    monkeypatch.setattr(tracking, "delete_run", delete)
    return there


@dataclass(frozen=True)
class Stubborn(Storage):
    """A store that fails when `LEFT` deletions are made."""

    def delete(self, uri: str, *, patience_s: float = 0) -> None:
        LEFT[0] -= 1
        if LEFT[0] < 0:
            raise StorageError("interrupted")
        super().delete(uri, patience_s=patience_s)


LEFT = [0]


def store_run(config: Config) -> int:
    """Store a run of two checkpoints, both listed, one of them published; return the number of its objects."""
    storage, folder = Storage(), run_folder(config)
    names = ["checkpoint_000000000009-e1-x", "checkpoint_000000000002-e2-x"]
    for place, seen in ((names[0], 9), (names[1], 2), ("published/000000000002", 2)):
        state = CheckpointState(seen, {}, "digest", 1, 0, files={"model": "x"}, sizes={"model": 5})
        storage.write(join(folder, place, "model"), b"bytes")
        storage.write(join(folder, place, "state.json"), state.to_json().encode())
    listed = CheckpointList(2, (Listed(1, 9, names[0]), Listed(2, 2, names[1])))
    storage.write(join(folder, "checkpoints.json"), listed.to_json())
    storage.write(join(folder, "goodput/000001.json"), b"{}")
    return len(storage.list(folder))


def test_a_removal_that_is_interrupted_anywhere_leaves_the_run_as_it_was_or_none_and_a_repeat_ends_it(config, records):
    objects = store_run(config)
    for after in range(1, objects):
        store_run(config)
        records[:] = [RunRecord("id", "first", "ddpm", "KILLED")]
        LEFT[0] = after
        with pytest.raises(StorageError, match="interrupted"):
            inventory.remove(inventory.find_removal(config, Storage(), force=False), config, Stubborn())
        newest = newest_checkpoint(config, Storage())
        assert newest is None or newest.images_seen == 2, after  # never an older one
        if not records:
            assert newest is None
            assert not [e for e in Storage().list(run_folder(config)) if e.uri.endswith("state.json")]
        records[:] = records or [RunRecord("id", "first", "ddpm", "KILLED", deleted=True)]
        if records[0].deleted:
            age(config)  # without a word of MLflow's, what was written a moment ago is not touched
        inventory.remove(inventory.find_removal(config, Storage(), force=False), config, Storage())
        assert Storage().list(run_folder(config)) == []


def age(config: Config) -> None:
    import os

    for path in Path(run_folder(config).removeprefix("file://")).rglob("*"):
        os.utime(path, (0, 0))


def test_a_removed_run_leaves_no_folder_and_is_no_longer_known(config, records, tmp_path):
    store_run(config)
    inventory.remove(inventory.find_removal(config, Storage(), force=False), config, Storage())
    assert not (tmp_path / "runs" / "first").exists()
    with pytest.raises(RemovalError, match="no run 'first'"):
        inventory.find_removal(config, Storage(), force=False)


def test_nothing_is_known_to_be_garbage_without_mlflow(config, records, monkeypatch):
    store_run(config)
    age(config)
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED", deleted=True)]
    (verdict,) = inventory.find_garbage(config, Storage())
    assert verdict.folder.address.endswith("/published/000000000002")

    def away(uri: str, name: str | None = None) -> list[RunRecord]:
        raise TrackingError("no answer")

    monkeypatch.setattr(tracking, "list_runs", away)
    with pytest.raises(TrackingError):
        inventory.find_garbage(config, Storage())


def test_a_published_checkpoint_whose_record_waits_for_mlflow_is_not_garbage(config, records, monkeypatch):
    store_run(config)
    age(config)
    monkeypatch.setattr(inventory, "list_published", lambda tracker: [])
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED")]
    assert len(inventory.find_garbage(config, Storage())) == 1
    Storage().write(join(run_folder(config), "unsent.zip"), b"")
    assert inventory.find_garbage(config, Storage()) == []
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED", deleted=True)]
    assert len(inventory.find_garbage(config, Storage())) == 1


def test_records_that_cannot_be_read_end_the_search(config, records, monkeypatch):
    store_run(config)
    age(config)
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED")]

    def away(tracker: tracking.Tracker) -> list[object]:
        raise TrackingError("no answer")

    monkeypatch.setattr(inventory, "list_published", away)
    with pytest.raises(TrackingError):
        inventory.find_garbage(config, Storage())


def test_collecting_begins_with_what_makes_a_checkpoint_complete_and_ends_with_its_origin(config):
    address = f"{config.storage.root}/runs/first/published/1"
    for name in ("model.json", "model.safetensors", "state.json"):
        Storage().write(f"{address}/{name}", b"x")
    folder = Folder(address, tuple(Storage().list(address)))
    for after, there in ((1, ["model.json", "model.safetensors"]), (2, ["model.json"])):
        LEFT[0] = after
        with pytest.raises(StorageError):
            inventory.collect(Verdict(folder, True, "nothing names it"), Stubborn())
        assert [entry.uri.rsplit("/", 1)[-1] for entry in Storage().list(address)] == there
    inventory.collect(Verdict(folder, True, "nothing names it"), Storage())
    assert Storage().list(address) == []


def test_evaluators_of_any_kind_stay_while_a_score_names_one_of_them(config, records, monkeypatch, tmp_path):
    import os

    place = f"{config.storage.root}/datasets/digits"
    Storage().write(f"{place}/dataset.json", b'{"digest": "%s"}' % (b"f" * 64))
    for name, digest in (("evaluator.json", b"old"), ("classifier/evaluator.json", b"new")):
        Storage().write(f"{place}/evaluator/0123456789abcdef/{name}", b'{"digest": "%s"}' % digest)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    for named, garbage in (("old", 0), ("new", 0), ("other", 1)):
        monkeypatch.setattr(inventory._Scores, "_all", [{"evaluator_digest": named}])
        assert len(inventory.find_garbage(config, Storage())) == garbage
