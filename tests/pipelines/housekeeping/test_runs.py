"""The list of runs and the removal of one: decided on lists, and done on files with a list in place of MLflow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.checkpoints import newest_checkpoint, run_folder
from pipelines.housekeeping import (
    Folder,
    RemovalError,
    find_removal,
    folders,
    plan_removal,
    removal_order,
    remove,
    summaries,
)
from pipelines.storage import Entry, Storage, StorageError
from pipelines.tracking import RunRecord
from tests.pipelines.housekeeping.stored import LEFT, NEW, NOW, OLD, Stubborn, age, folder, record, store_run, version


def test_folders_have_all_that_is_below_them_and_loose_objects_are_none():
    entries = [Entry(f"s3://b/runs/{name}", 1, "t", OLD) for name in ("a/x", "a/y/z", "ab/x", "loose")]
    assert [(f.address, f.size) for f in folders(entries, "s3://b/runs")] == [
        ("s3://b/runs/a", 2),
        ("s3://b/runs/ab", 1),
    ]


def test_a_folder_with_an_object_of_unknown_age_counts_as_new():
    known = folder("runs/a", "x")
    assert not known.within(60, NOW)
    assert Folder(known.address, (*known.entries, Entry("s3://b/runs/a/y", 1, "t"))).within(60, NOW)


# --- the list ---


@pytest.mark.parametrize(
    "status, modified, state",
    [
        ("FINISHED", NEW, "finished"),
        ("FAILED", OLD, "failed"),
        ("KILLED", OLD, "stopped"),
        ("RUNNING", NEW, "running"),
        ("RUNNING", None, "running"),  # the store does not say
        ("RUNNING", OLD, "stopped"),  # its driver was killed and could not tell
    ],
)
def test_the_state_of_a_run(status, modified, state):
    (row,) = summaries([record(status=status)], [folder("runs/first", "x", modified=modified)], "ddpm", NOW)
    assert row.state == state


def test_a_row_has_images_the_newest_score_and_what_is_stored():
    metrics = {
        "train/loss": (0.1, 2560),
        "eval/frechet_distance": (9.0, 1280),
        "eval/class_accuracy": (0.9, 1280),
        "system/cpu": (1.0, 9_999_999),
    }
    ended = record(metrics=metrics, ended=NOW - 100)
    (row,) = summaries([ended], [folder("runs/first", "x", "published/1/y")], "ddpm", NOW)
    assert (row.images_seen, row.score, row.size, row.when) == (2560, ("frechet_distance", 9.0), 20, NOW - 100)


def test_the_list_has_the_runs_of_the_experiment_and_what_storage_alone_has_but_no_studies():
    records = [
        record("mine"),
        replace(record("theirs"), experiment="other"),
        record("study-s", study="s"),
        record("s-trial", study="s"),
        replace(record("gone"), deleted=True),
    ]
    stored = [folder(f"runs/{name}", "x") for name in ("mine", "theirs", "s-trial", "gone")]
    rows = {row.name: row.state for row in summaries(records, stored, "ddpm", NOW)}
    assert rows == {"mine": "finished", "s-trial": "finished", "gone": "unrecorded"}


# --- removing a run ---


def plan(stored: Folder, records, versions=(), force=False, own_id=None):
    return plan_removal(stored, records, versions, own_id=own_id, experiment="ddpm", now=NOW, force=force)


def test_an_ended_run_goes_with_all_that_it_has():
    stored = folder("runs/first", "list.json", "checkpoint_1/state.json", "published/12/state.json")
    removal = plan(stored, [record(), replace(record(), experiment="other"), replace(record(), deleted=True)])
    assert removal.records == (record(),)
    assert "30 bytes in 3 objects" in removal.lines()[0]
    assert "published checkpoints in it: 12" in removal.lines()[1]


@pytest.mark.parametrize("records", [[record(status="RUNNING")], []])
def test_a_run_that_was_written_a_moment_ago_stays_unless_mlflow_says_that_it_has_ended(records):
    stored = folder("runs/first", "driver", modified=NEW)
    with pytest.raises(RemovalError, match="may be being trained"):
        plan(stored, records)
    with pytest.raises(RemovalError, match="may be being trained"):
        plan(folder("runs/first", "driver", modified=None), records)
    assert plan(stored, [record(status="KILLED")]).folder == stored
    trashed = replace(record(status="RUNNING"), deleted=True)
    assert plan(stored, [record(), trashed]).folder == stored
    with pytest.raises(RemovalError, match="may be being trained"):
        plan(stored, [record(), replace(record(status="RUNNING"), experiment="other")])  # which has the same folder
    assert plan(folder("runs/first", "driver"), records).records == tuple(records)


@pytest.mark.parametrize("made", [version(), version("id-x", sampling='{"classifier": "runs:/abc0/640"}')])
def test_a_run_that_a_registered_version_was_made_from_or_names_stays_unless_forced(made):
    records = [record(), replace(record(), run_id="abc0")]
    with pytest.raises(RemovalError, match="models:/digits/1 @champion"):
        plan(folder("runs/first", "x"), records, [made])
    removal = plan(folder("runs/first", "x"), records, [made], force=True)
    assert removal.versions == (made,)
    assert any("stays without its name" in line for line in removal.lines())
    assert plan(folder("runs/first", "x"), [record()], [version("id-other")]).versions == ()


def test_the_mlflow_run_of_another_folder_stays():
    ours, theirs, earlier = replace(record(), id="ours"), replace(record(), id="theirs"), record()
    stored = folder("runs/first", "x")
    assert plan(stored, [ours, theirs, earlier], own_id="ours").records == (ours, earlier)
    assert plan(stored, [replace(theirs, status="RUNNING"), ours], own_id="ours").records == (ours,)
    with pytest.raises(RemovalError, match="no run 'first'"):
        plan(folder("runs/first"), [theirs], own_id="ours")


def test_a_run_that_does_not_exist_is_named():
    with pytest.raises(RemovalError, match="no run 'nobody'"):
        plan(folder("runs/nobody"), [])


def test_the_rest_of_an_interrupted_removal_can_be_removed():
    assert plan(folder("runs/first", "checkpoint_1/model.safetensors"), [replace(record(), deleted=True)]).records == ()
    assert plan(folder("runs/first"), [record()]).records == (record(),)


def test_what_makes_checkpoints_complete_goes_first_and_the_newest_last():
    old, new = "checkpoint_000000000900-e1-x", "checkpoint_000000000200-e2-x"
    files = [f"{old}/model", f"{old}/state.json", f"{new}/state.json", f"{new}/model", "published/1/state.json"]
    stored = folder("runs/first", *files, "checkpoints.json", "published/1/model")
    first, rest = removal_order(stored)
    below = [uri.removeprefix(f"{stored.address}/") for uri in first]
    assert below == ["published/1/state.json", f"{old}/state.json", "checkpoints.json", f"{new}/state.json"]
    assert sorted([*first, *rest]) == sorted(entry.uri for entry in stored.entries)


def test_a_removal_that_is_interrupted_anywhere_leaves_the_run_as_it_was_or_none_and_a_repeat_ends_it(
    config, records, monkeypatch
):
    objects = store_run(config)
    for after in range(1, objects):
        store_run(config)
        records[:] = [RunRecord("id", "first", "ddpm", "KILLED")]
        LEFT[0] = after
        removal = find_removal(config, force=False)
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "of", lambda config: Stubborn())
            with pytest.raises(StorageError, match="interrupted"):
                remove(removal, config)
        newest = newest_checkpoint(config)
        assert newest is None or newest.images_seen == 2, after  # never an older one
        if not records:
            assert newest is None
            assert not [e for e in Storage().list(run_folder(config)) if e.uri.endswith("state.json")]
        records[:] = records or [RunRecord("id", "first", "ddpm", "KILLED", deleted=True)]
        if records[0].deleted:
            age(config)  # without a word of MLflow's, what was written a moment ago is not touched
        remove(find_removal(config, force=False), config)
        assert Storage().list(run_folder(config)) == []


def test_a_removed_run_leaves_no_folder_and_is_no_longer_known(config, records, tmp_path):
    store_run(config)
    remove(find_removal(config, force=False), config)
    assert not (tmp_path / "runs" / "first").exists()
    with pytest.raises(RemovalError, match="no run 'first'"):
        find_removal(config, force=False)
