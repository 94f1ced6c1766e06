"""A study from its start to its end, without the work of its trials."""

from __future__ import annotations

import signal

import pytest
from ray.tune.tune import _setup_signal_catching

from pipelines.config import compose
from pipelines.search import studies
from pipelines.search.study_config import StudyConfig
from pipelines.tracking import Tracker

STUDY = StudyConfig.model_validate({"kind": "guidance", "trials": 4, "space": {"guidance.scale": {"uniform": [0, 4]}}})


@pytest.fixture
def mlflow(monkeypatch):
    """What the study's MLflow run is told, in order: (method, arguments)."""
    told = []
    for method in ("text", "status"):
        monkeypatch.setattr(Tracker, method, lambda tracker, *given, method=method: told.append((method, given)))
    monkeypatch.setattr(studies.tracking, "open_run", lambda *given: (Tracker("http://nowhere", "parent"), False))
    return told


def test_tune_leaves_ctrl_c_to_the_study():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        _setup_signal_catching()
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_study_that_is_broken_off_is_killed_in_mlflow_and_runs_when_it_goes_on(mlflow):
    config = compose(["+experiment=digits", "tracking.uri=http://nowhere"])
    with pytest.raises(KeyboardInterrupt), studies._opened_run(config, "s", STUDY, "a model"):
        raise KeyboardInterrupt
    assert [given for method, given in mlflow if method == "status"] == [("RUNNING",), ("KILLED",)]
    with studies._opened_run(config, "s", STUDY, "a model"):
        assert mlflow[-2] == ("status", ("RUNNING",))
