"""Trials are logged to MLflow while it answers, and later where it did not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pipelines import tracking
from pipelines.config import compose
from pipelines.search.observer import Observer
from pipelines.search.study import StudyStore
from pipelines.search.study_config import StudyConfig
from pipelines.storage import Storage, layout
from pipelines.tracking import Tracker, UnreachableError
from pipelines.training.run_id import read_run_id


class Mlflow:
    """The runs of the trials, by name; `away` as long as the server does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away, self.tags, self.states = False, {}, {}
        monkeypatch.setattr(tracking, "open_run", self.open_run)
        for name in ("tags", "params", "metric", "metrics", "tag", "status"):
            monkeypatch.setattr(Tracker, name, self.call(name))

    def open_run(self, uri, experiment, name, tags, patience_s):
        self.answer()
        self.tags.setdefault(name, {}).update(tags)
        return Tracker(uri, name), False

    def call(self, name):
        def called(tracker, *arguments):
            if self.away and tracker.patience_s:
                time.sleep(3)  # instead of minutes
            self.answer()
            if name == "tags":
                self.tags.setdefault(tracker.run_id, {}).update(arguments[0])
            if name == "status":
                self.states[tracker.run_id] = arguments[0]
            if name == "tag":
                return self.tags.get(tracker.run_id, {}).get(arguments[0])
            return []

        return called

    def answer(self):
        if self.away:
            raise UnreachableError("no answer")


def an_observer(tmp_path) -> Observer:
    study = StudyConfig.model_validate({"kind": "training", "trials": 1, "space": {"model.width": {"int": [8, 64]}}})
    store = StudyStore(Storage(), f"file://{tmp_path}/studies/s")
    return Observer(
        store,
        study,
        Tracker("http://nowhere", "parent"),
        compose(["+experiment=digits", "images=100", f"storage.root=file://{tmp_path}"]),
    )


def trial(width: int) -> SimpleNamespace:
    return SimpleNamespace(config={"model.width": width}, error_file=None)


def test_callbacks_do_not_wait_for_mlflow_and_what_is_missing_is_logged_when_the_study_goes_on(
    tmp_path, monkeypatch, caplog
):
    mlflow = Mlflow(monkeypatch)
    first = an_observer(tmp_path)
    first.begin([])
    first.on_trial_start(0, [], trial(8))
    (begun,) = first.store.records()
    assert (begun.state, begun.run_id, mlflow.tags) == ("running", None, {})  # a training opens its run itself
    mlflow.away = True
    began = time.monotonic()
    first.on_trial_result(0, [], trial(8), {"frechet_distance": 1.0, "images_seen": 100})
    first.on_trial_error(0, [], trial(8))
    assert time.monotonic() - began < 2
    first.settle()  # still away: the study has ended well all the same
    assert "1 trials are not logged to MLflow" in caplog.text
    assert not mlflow.states

    mlflow.away = False
    second = an_observer(tmp_path)
    second.begin(second.store.records())
    second.settle()
    assert list(mlflow.states.values()) == ["FAILED"]
    assert not second.unlogged
    mlflow.states.clear()
    third = an_observer(tmp_path)
    third.begin(third.store.records())
    third.settle()  # nothing is logged twice
    assert not mlflow.states


def test_a_trial_that_is_run_again_has_each_report_once(tmp_path, monkeypatch):
    Mlflow(monkeypatch)
    reports = [{"frechet_distance": 3.0, "images_seen": 50.0}, {"frechet_distance": 1.0, "images_seen": 100.0}]
    first = an_observer(tmp_path)
    first.begin([])
    first.on_trial_start(0, [], trial(8))
    first.on_trial_result(0, [], trial(8), reports[0])
    second = an_observer(tmp_path)
    second.begin(second.store.records())
    second.on_trial_start(0, [], trial(8))
    for report in reports:  # the first one is stored beside the run's checkpoints
        second.on_trial_result(0, [], trial(8), report)
    second.on_trial_complete(0, [], trial(8))
    (record,) = second.store.records()
    assert (record.state, record.history, record.scores) == ("finished", reports, reports[1])


def test_a_training_that_was_refused_before_it_had_a_run_finds_the_one_made_for_it_by_its_id(tmp_path, monkeypatch):
    mlflow = Mlflow(monkeypatch)
    observer = an_observer(tmp_path)
    observer.begin([])
    observer.on_trial_start(0, [], trial(8))
    observer.on_trial_error(0, [], trial(8))
    (record,) = observer.store.records()
    own = read_run_id(observer.store.storage, layout.run_folder(f"file://{tmp_path}", f"s-{record.trial}"))
    assert own is not None
    assert mlflow.tags[record.run_id][tracking.ID_TAG] == own
    assert mlflow.states[record.run_id] == "FAILED"
