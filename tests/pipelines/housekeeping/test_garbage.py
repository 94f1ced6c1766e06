"""What nothing names: decided on graphs, and found on files with a list of runs in place of MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import tracking
from pipelines.checkpoints import Published, run_folder
from pipelines.housekeeping import Folder, GarbageVerdict, Stored, collect, find_garbage, garbage, judge
from pipelines.storage import Storage, StorageError, join
from pipelines.tracking import ModelVersion, RunRecord, TrackingError
from tests.pipelines.housekeeping.stored import LEFT, NEW, NOW, OLD, Stubborn, age, folder, store_run

COUNT = 12


def stored(i: int, names=(), rests_on=(), kept=None, modified=OLD) -> Stored:
    place = folder(f"x/{i}", "file", modified=modified)
    return Stored(place, frozenset(map(str, names)), "nothing names it", kept, frozenset(map(str, rests_on)))


@st.composite
def graphs(draw):
    """Folders by number; each has the name of its number, and some share another one's."""
    numbers = st.sets(st.integers(0, COUNT - 1), max_size=3)
    return [
        stored(
            i,
            {i, *draw(st.sets(st.integers(0, COUNT - 1), max_size=1))},
            draw(numbers),
            draw(st.sampled_from([None, None, None, "it is not sure"])),
            draw(st.sampled_from([OLD, OLD, OLD, NEW, None])),
        )
        for i in range(draw(st.integers(0, COUNT)))
    ], {str(i): "a run" for i in draw(numbers)}


@given(graphs())
def test_what_is_deleted_is_exactly_what_cannot_be_reached(graph):
    there, named = graph
    reached = {i for i, one in enumerate(there) if one.kept or one.folder.within(86_400, NOW) or one.names & {*named}}
    for _ in there:  # as often as there are folders, so that no path is too long
        rested = {name for i in reached for name in there[i].rests_on}
        reached |= {i for i, one in enumerate(there) if one.names & rested}
    verdicts = judge(there, named, NOW)
    assert [verdict.folder for verdict in verdicts] == [one.folder for one in there]
    assert {i for i, verdict in enumerate(verdicts) if not verdict.garbage} == reached
    assert all(verdict.why for verdict in verdicts)


def test_the_reason_says_who_names_it():
    young, kept, named, rested, free = verdicts = judge(
        [
            stored(0, modified=NEW),
            stored(1, kept="it is not sure"),
            stored(2, names=["a"], rests_on=["b"]),
            stored(3, names=["b"]),
            stored(4, names=["c"]),
        ],
        {"a": "a run names it"},
        NOW,
    )
    assert (young.why, kept.why, named.why) == (
        "it was written in the last 24 hours",
        "it is not sure",
        "a run names it",
    )
    assert rested.why == f"{named.folder.address} rests on it"
    assert (free.why, [verdict.garbage for verdict in verdicts]) == ("nothing names it", [False] * 4 + [True])


def test_nothing_is_known_to_be_garbage_without_mlflow(config, records, monkeypatch):
    store_run(config)
    age(config)
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED", deleted=True)]
    (verdict,) = find_garbage(config)
    assert verdict.folder.address.endswith("/published/000000000002")

    def away(uri: str, name: str | None = None) -> list[RunRecord]:
        raise TrackingError("no answer")

    monkeypatch.setattr(tracking, "list_runs", away)
    with pytest.raises(TrackingError):
        find_garbage(config)


def test_a_published_checkpoint_whose_record_waits_for_mlflow_is_not_garbage(config, records, monkeypatch):
    store_run(config)
    age(config)
    monkeypatch.setattr(garbage, "list_published", lambda tracker: [])
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED")]
    assert len(find_garbage(config)) == 1
    Storage().write(join(run_folder(config), "unsent.zip"), b"")
    assert find_garbage(config) == []
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED", deleted=True)]
    assert len(find_garbage(config)) == 1


def test_records_that_cannot_be_read_end_the_search(config, records, monkeypatch):
    store_run(config)
    lineage = {"run_id": "id", "images_seen": 2}
    write(Path(run_folder(config).removeprefix("file://")) / "published/000000000002/model.json", {"lineage": lineage})
    age(config)
    records[:] = [RunRecord("id", "first", "ddpm", "FINISHED")]

    def away(tracker: tracking.Tracker) -> list[object]:
        raise TrackingError("no answer")

    monkeypatch.setattr(garbage, "list_published", away)
    with pytest.raises(TrackingError):
        find_garbage(config)


def test_collecting_begins_with_what_makes_a_checkpoint_complete_and_ends_with_its_origin(config):
    address = f"{config.storage.root}/runs/first/published/1"
    for name in ("model.json", "model.safetensors", "state.json"):
        Storage().write(f"{address}/{name}", b"x")
    folder = Folder(address, tuple(Storage().list(address)))
    for after, there in ((1, ["model.json", "model.safetensors"]), (2, ["model.json"])):
        LEFT[0] = after
        with pytest.raises(StorageError):
            collect(GarbageVerdict(folder, True, "nothing names it"), Stubborn())
        assert [entry.uri.rsplit("/", 1)[-1] for entry in Storage().list(address)] == there
    collect(GarbageVerdict(folder, True, "nothing names it"), Storage())
    assert Storage().list(address) == []


DIGEST = "f" * 64
SCORES = {"evaluator_digest": "1" * 64, "stream_digest": "5" * 64, "samples": "s3://another-spelling/evaluations/run"}
OF_VERSION = {
    "evaluator_digest": "2" * 64,
    "stream_digest": "6" * 64,
    "samples": "file:///x/evaluations/version",
    "prompts": {"evaluator_digest": "3" * 64},
}
MODELS = {  # run -> (its MLflow run, its published checkpoints with what their descriptions name)
    "first": ("abc0", {"640": "runs:/abc0/160", "320": "", "160": "", "1280": ""}),
    "deleted": ("abc1", {"640": "", "320": ""}),
    "stopped": ("abc2", {"640": ""}),
    "of-another-server": ("abc3", {"640": ""}),
}
PLANTED = {  # what lies there -> whether nothing names it
    "runs/first/published/640": False,  # the run records it
    "runs/first/published/320": False,  # a version was made from it
    "runs/first/published/160": False,  # it guides that of 640
    "runs/first/published/1280": True,
    "runs/deleted/published/640": True,
    "runs/deleted/published/320": False,  # a study that stays is about it
    "runs/stopped/published/640": False,
    "runs/of-another-server/published/640": False,
    "studies/there": False,
    "studies/deleted": True,
    "studies/of-a-version": False,
    "studies/of-another-server": False,
    "datasets/d/evaluator/ffffffffffffffff": False,  # of the dataset as it is
    "datasets/d/evaluator/of-scores": False,
    "datasets/d/evaluator/of-a-version": False,
    "datasets/d/evaluator/of-captions": False,
    "datasets/d/evaluator/of-features": False,  # those are young
    "datasets/d/evaluator/unnamed": True,
    "datasets/without-index/evaluator/unnamed": False,
    f"datasets/d/features/{'5' * 16}-{'1' * 16}": False,
    f"datasets/d/features/{'6' * 16}-{'2' * 16}": False,
    f"datasets/d/features/{'5' * 16}-{'4' * 16}": False,  # young
    f"datasets/d/features/{'6' * 16}-{'1' * 16}": True,
    "datasets/d/check-progress": False,  # a check that was interrupted goes on from it
    "datasets/without-index/index-progress": False,
    "evaluations/run": False,
    "evaluations/version": False,
    "evaluations/unnamed": True,
}
EVALUATORS = {"of-scores": "1", "of-a-version": "2", "of-captions": "3", "of-features": "4", "unnamed": "9"}


class Scored:
    """What MLflow has of a run: its scores."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.run_id = run_id

    def names(self, of: str) -> list[str]:
        return ["evaluation/640.json"] if self.run_id == "abc0" else []

    def read_text(self, name: str) -> str:
        return json.dumps(SCORES)


def plant(root: Path) -> None:
    """Store one of everything, long ago but for one."""
    for place in PLANTED:
        write(root / place / "file", {})
    write(root / "datasets/d/dataset.json", {"digest": DIGEST})
    for folder_name, digit in EVALUATORS.items():
        sealed = {"record": json.dumps({"digest": digit * 64}), "signature": "by whoever"}
        write(root / "datasets/d/evaluator" / folder_name / "contrastive/evaluator.json", sealed)
    for run, (run_id, published) in MODELS.items():
        for images, names in published.items():
            lineage = {"run_id": run_id, "images_seen": int(images)}
            write(root / "runs" / run / "published" / images / "model.json", {"lineage": lineage, "guide": names})
    write(root / "studies/there/study.json", {"model": "runs:/abc1/320"})
    for path in root.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(root / f"datasets/d/features/{'5' * 16}-{'4' * 16}/file")


def write(path: Path, plain: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain))


def test_of_a_root_with_everything_exactly_what_nothing_names_is_deleted(config, monkeypatch, tmp_path):
    there = [
        RunRecord("abc0", "first", "ddpm", "FINISHED"),
        RunRecord("abc1", "deleted", "ddpm", "FINISHED", deleted=True),
        RunRecord("abc2", "stopped", "ddpm", "KILLED"),
        RunRecord("abc4", "study-there", "ddpm", "FINISHED", study="there"),
        RunRecord("abc5", "study-deleted", "ddpm", "FINISHED", study="deleted", deleted=True),
        RunRecord("abc6", "study-of-a-version", "ddpm", "FINISHED", study="of-a-version", deleted=True),
    ]
    tags = {"scores": json.dumps(OF_VERSION), "study": "of-a-version", "images_seen": "320"}
    monkeypatch.setattr(tracking, "list_runs", lambda uri, name=None: there)
    monkeypatch.setattr(tracking, "all_versions", lambda uri: [ModelVersion("m", "1", "abc0", tags, ())])
    monkeypatch.setattr(garbage, "Tracker", Scored)
    recorded = {"abc0": [Published("s3://another-spelling/runs/first/published/640", 640, "digest")]}
    monkeypatch.setattr(garbage, "list_published", lambda tracker: recorded.get(tracker.run_id, []))
    plant(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    found = find_garbage(config)
    expected = {place for place, unnamed in PLANTED.items() if unnamed}
    assert {verdict.folder.address.removeprefix(f"{config.storage.root}/") for verdict in found} == expected
    for verdict in found:
        collect(verdict, Storage())
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {path for path in before if not any(path.is_relative_to(tmp_path / place) for place in expected)}
