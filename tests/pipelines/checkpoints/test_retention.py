"""Which published checkpoints `checkpoint.keep_best` keeps, and how the others go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.checkpoints import (
    BEST,
    ModelError,
    Published,
    best_published,
    list_published,
    names_checkpoint,
    record_published,
    record_scores,
    retire,
    superseded,
)
from pipelines.storage import Fence, FencedError, Storage
from pipelines.tracking import ModelVersion
from tests.pipelines.checkpoints.test_published import published
from tests.pipelines.training.loop.ranks import MemoryTracker

RUN = "abc0"
OTHER = {"run_id": "def1"}


def scored(**distances: float | None) -> list[Published]:
    """Published checkpoints by i100=DISTANCE; None for one without scores."""
    return [
        Published(f"file:///{name}", int(name[1:]), "d", {} if value is None else {BEST: value})
        for name, value in distances.items()
    ]


def gone(records, keep, versions=(), references=()):
    return [p.images_seen for p in superseded(records, keep, RUN, versions, references)]


def version(run_id: str = RUN, **tags: str) -> ModelVersion:
    return ModelVersion("digits", "1", run_id, tags, ())


FIVE = scored(i100=5.0, i200=2.0, i300=9.0, i400=1.0, i500=7.0)


def test_the_best_and_the_newest_stay():
    assert gone(FIVE, 2) == [100, 300]
    assert gone(FIVE, 1) == [100, 200, 300]
    assert gone(FIVE, 5) == []
    assert gone(scored(i100=2.0, i200=2.0, i300=1.0), 1) == [100, 200]
    assert gone(scored(i100=2.0, i200=2.0, i300=3.0), 1) == [200]  # of equal ones the older, as for runs:/ID/best


def test_a_checkpoint_without_scores_stays_and_is_not_counted():
    assert gone(scored(i100=5.0, i200=None, i300=4.0, i400=None), 1) == [100]
    assert gone(scored(i100=None, i200=None), 1) == []
    assert gone(scored(i100=5.0, i200=4.0, i300=None), 1) == [100]
    only_accuracy = [replace(p, scores={"eval/class_accuracy": 0.5}) for p in scored(i100=None)]
    assert gone([*only_accuracy, *scored(i200=3.0, i300=4.0)], 1) == []


def test_a_deleted_checkpoint_is_not_deleted_again_and_is_not_among_the_best():
    deleted = [replace(FIVE[3], deleted=True)]
    assert gone([*FIVE[:3], *deleted, FIVE[4]], 1) == [100, 300]


@pytest.mark.parametrize(
    "versions, references",
    [
        ([version(images_seen="300")], []),
        ([version(**OTHER, sampling='{"weak": "runs:/abc0/300"}')], []),
        ([], ["runs:/abc0/300"]),
    ],
)
def test_a_checkpoint_that_a_version_or_another_run_names_stays(versions, references):
    assert gone(FIVE, 2, versions, references) == [100]


def test_a_version_or_run_that_does_not_say_which_checkpoint_keeps_all():
    assert gone(FIVE, 1, [version()]) == []
    assert gone(FIVE, 1, [], ["runs:/abc0"]) == []
    assert gone(FIVE, 1, [version(**OTHER)], ["runs:/abc", "runs:/abc00/300"]) == [100, 200, 300]


def test_a_version_names_what_it_was_made_from_and_what_guides_it():
    guided = version(**OTHER, images_seen="640", sampling="runs:/abc0/320")
    assert names_checkpoint(guided, {RUN}, 320)
    assert not names_checkpoint(guided, {RUN}, 640)
    assert names_checkpoint(guided, {"def1"}, 640)
    assert not names_checkpoint(guided, {"def1"}, 320)
    assert names_checkpoint(guided, {RUN}, None)


def test_a_retired_checkpoint_is_deleted_and_its_record_says_so_and_keeps_its_scores(tmp_path):
    tracker, storage = MemoryTracker(), Storage()
    published(tmp_path, tracker, 100, 200)
    for seen, distance in [(100, 5.0), (200, 6.0)]:
        record_scores(tracker, seen, {BEST: distance})
    fence = Fence.take(storage, f"file://{tmp_path}/driver")
    old, new = list_published(tracker)
    assert retire(storage, tracker, fence, old).deleted
    assert list_published(tracker) == [new]
    assert list_published(tracker, deleted=True) == [replace(old, deleted=True), new]
    assert best_published(tracker, BEST, lowest=True) == new
    assert not storage.list(old.uri)
    assert len(storage.list(new.uri)) > 1
    assert Published.read(tracker, old.name) == replace(old, deleted=True)
    with pytest.raises(ModelError, match="no published checkpoint at 100"):
        record_scores(tracker, 100, {BEST: 1.0})


def test_a_driver_that_was_replaced_deletes_nothing(tmp_path):
    tracker, storage = MemoryTracker(), Storage()
    published(tmp_path, tracker, 100, 200)
    fence = Fence.take(storage, f"file://{tmp_path}/driver")
    Fence.take(storage, f"file://{tmp_path}/driver")
    old = list_published(tracker)[0]
    with pytest.raises(FencedError):
        retire(storage, tracker, fence, old)
    assert list_published(tracker)[0] == old
    assert len(storage.list(old.uri)) > 1


def test_a_record_of_an_earlier_release_is_read(tmp_path):
    tracker = MemoryTracker()
    record_published(tracker, FIVE[0])
    (name,) = tracker.texts
    tracker.texts[name] = tracker.texts[name].replace(' "deleted": false,\n', "")
    assert "deleted" not in tracker.texts[name]
    assert list_published(tracker) == [FIVE[0]]


def test_a_folder_being_retired_is_never_a_complete_checkpoint(tmp_path, monkeypatch):
    """`state.json` goes first: whoever looks in between finds an incomplete folder."""
    tracker, storage = MemoryTracker(), Storage()
    published(tmp_path, tracker, 100)
    (old,) = list_published(tracker)
    monkeypatch.setattr(Storage, "delete_folder", lambda self, uri: None)
    retire(storage, tracker, None, old)
    assert storage.list(old.uri)
    assert not storage.exists(f"{old.uri}/state.json")
