"""What may be deleted, decided on lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.housekeeping import (
    Folder,
    Origin,
    RemovalError,
    folders,
    judge_evaluators,
    judge_published,
    judge_scored,
    judge_study,
    plan_removal,
    removal_order,
    summaries,
)
from pipelines.storage import Entry
from pipelines.tracking import ModelVersion, RunRecord

NOW = 1_000_000_000.0
OLD, NEW = NOW - 2 * 86_400, NOW - 5
ROOT = "s3://b"


def folder(address: str, *names: str, modified: float | None = OLD) -> Folder:
    return Folder(f"{ROOT}/{address}", tuple(Entry(f"{ROOT}/{address}/{name}", 10, "t", modified) for name in names))


def record(name: str = "first", status: str = "FINISHED", **fields) -> RunRecord:
    return RunRecord(f"id-{name}", name, "ddpm", status, began=OLD, **fields)


def version(run_id: str = "id-first", **tags: str) -> ModelVersion:
    return ModelVersion("digits", "1", run_id, tags, ("champion",))


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


# --- what nothing names ---

PUBLISHED = folder("runs/first/published/000000000640", "state.json", "model.json")
ORIGIN = Origin(None, "id-first", 640)


def judged(**changed):
    given = {"folder": PUBLISHED, "origin": ORIGIN, "records": [record()], "named": [], "versions": [], "now": NOW}
    return judge_published(**{**given, **changed})


def test_a_published_checkpoint_that_its_finished_run_does_not_record_is_garbage():
    assert judged().garbage
    assert judged(records=[replace(record(), deleted=True)]).garbage
    assert judged(origin=Origin(None, None, None)).garbage  # an interrupted copy has no model.json


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"folder": replace(PUBLISHED, entries=(*PUBLISHED.entries, Entry("s3://b/x", 1, "t", NEW)))}, "24 hours"),
        ({"named": [("id-first", PUBLISHED.name)]}, "records it"),
        ({"named": [("own", PUBLISHED.name)], "origin": Origin("own", None, None)}, "records it"),
        ({"origin": Origin("own", None, 640), "records": [replace(record(status="KILLED"), id="own")]}, "may still"),
        ({"records": [record(status="RUNNING")]}, "may still record it"),
        ({"records": [record(status="KILLED")]}, "may still record it"),
        ({"records": [record("other")]}, "another may"),
        ({"records": []}, "another may"),
        ({"versions": [version(images_seen="640")]}, "was made from it"),
        ({"versions": [version()]}, "was made from it"),
        ({"versions": [version("x", sampling="runs:/abc0")], "origin": Origin(None, "abc0", 640),
          "records": [replace(record(), run_id="abc0")]}, "names it"),
    ],
)  # fmt: skip
def test_a_published_checkpoint_that_anything_may_name_stays(changed, why):
    verdict = judged(**changed)
    assert (verdict.garbage, why in verdict.why) == (False, True), verdict.why


def test_the_checkpoint_that_guides_a_version_of_another_run_stays_whatever_that_one_has_seen():
    guided = version("x", sampling='{"classifier": "runs:/abc0/640"}', images_seen="1280")
    guide = {"origin": Origin(None, "abc0", 640), "records": [replace(record(), run_id="abc0")]}
    assert not judged(versions=[guided], **guide).garbage
    assert judged(versions=[guided], **{**guide, "origin": Origin(None, "abc0", 320)}).garbage


def test_the_records_of_another_run_do_not_keep_a_checkpoint_of_the_same_name():
    assert judged(named=[("id-other", PUBLISHED.name)]).garbage
    assert judged(named=[("id-first", "000000001280")]).garbage


def test_a_version_of_another_checkpoint_of_the_run_does_not_keep_this_one():
    assert judged(versions=[version(images_seen="1280")]).garbage


def test_a_study_is_garbage_when_its_runs_are_deleted_and_no_version_has_its_settings():
    study = folder("studies/s", "study.json", "trials/a.json")
    gone = [replace(record("study-s", study="s"), deleted=True)]
    assert judge_study(study, gone, [], NOW).garbage
    assert not judge_study(study, [*gone, record("s-a", study="s")], [], NOW).garbage
    assert not judge_study(study, gone, [version(study="s")], NOW).garbage
    assert not judge_study(study, [], [], NOW).garbage
    assert not judge_study(folder("studies/s", "study.json", modified=NEW), gone, [], NOW).garbage


def test_evaluators_are_garbage_when_their_dataset_has_changed_and_no_score_names_one_of_them():
    evaluators = folder("datasets/d/evaluator/0123456789abcdef", "evaluator.json", "contrastive/evaluator.json")
    digests = {"w", "c"}
    assert judge_evaluators(evaluators, digests, "f" * 64, ["other"], NOW).garbage
    assert not judge_evaluators(evaluators, digests, "0123456789abcdef" + "0" * 48, [], NOW).garbage
    for named in digests:
        assert not judge_evaluators(evaluators, digests, "f" * 64, [named], NOW).garbage
    assert not judge_evaluators(evaluators, digests, None, [], NOW).garbage


def test_samples_and_features_are_garbage_when_no_score_names_them():
    samples = folder("evaluations/0123", "samples.tar")
    assert judge_scored(samples, False, "samples", NOW).garbage
    assert not judge_scored(samples, True, "samples", NOW).garbage
    assert not judge_scored(folder("evaluations/0123", "samples.tar", modified=NEW), False, "samples", NOW).garbage
