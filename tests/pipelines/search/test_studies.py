"""A study from its start to its end, without the work of its trials."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.tune.tune import _setup_signal_catching

from ddpm.generate import Sampling
from ddpm.model import ModelSpec
from pipelines import tracking
from pipelines.checkpoints import references
from pipelines.config import ConfigError, compose, sampling
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.real import HELD_OUT
from pipelines.presentation.progress import no_stage_notice
from pipelines.search import guidance_search, studies, training_search
from pipelines.search.guidance_search import GuidanceSearch, base_of
from pipelines.search.judge import TrialSubject
from pipelines.search.study import StudyError, StudyStore
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_search import TrainingSearch
from pipelines.tracking import Tracker
from tests.pipelines.checkpoints.tiny import DATASET, SMALL

STUDY = StudyConfig.model_validate({"kind": "guidance", "trials": 4, "space": {"guidance.scale": {"uniform": [0, 4]}}})
OWN = Sampling.of(kind="heun", steps=7, scale=1.5)


class Bench:
    """A model, its data and an MLflow server, none of which is asked for anything: what becomes of them is noted."""

    def __init__(self, monkeypatch, folder) -> None:
        where = ["storage=file", f"storage.root=file://{folder}", "tracking.uri=http://nowhere"]
        self.config = compose(["+experiment=digits", *where])
        spec = ModelSpec(SMALL, {"kind": "cosine", "num_steps": 20}, "v", 8, DATASET.classes, sampling=OWN)
        resolved = SimpleNamespace(version=None, model=SimpleNamespace(spec=spec))
        self.told: list[tuple[str, tuple[object, ...]]] = []
        self.searched: list[tuple[object, ...]] = []
        self.ends_with: BaseException = KeyboardInterrupt()
        for method in ("text", "status"):
            monkeypatch.setattr(Tracker, method, self._note(method))
        monkeypatch.setattr(tracking, "open_run", lambda *given: (Tracker("http://nowhere", "parent"), False))
        monkeypatch.setattr(references, "resolve", lambda *given, **options: resolved)
        for kind in (guidance_search, training_search):
            monkeypatch.setattr(kind, "read_dataset", lambda uri, storage: DATASET)
        monkeypatch.setattr(studies, "run_trials", self._run_trials)
        monkeypatch.setattr(guidance_search, "processors", lambda use_gpu: 1)
        monkeypatch.setattr(EvaluationData, "evaluator", SimpleNamespace(encoder=None))
        monkeypatch.setattr(EvaluationData, "real", None)
        monkeypatch.setattr(studies, "connect_ray", lambda config: None)
        monkeypatch.setattr(TrialSubject, "of", lambda *given: None)
        monkeypatch.setattr(guidance_search, "asked_for", lambda *given: None)

    def _note(self, method):
        return lambda tracker, *given: self.told.append((method, given))

    def _run_trials(self, *given, **options) -> None:
        self.searched.append(given)
        raise self.ends_with

    def study(self, *overrides: str, resume: bool = False) -> None:
        """Run a study up to its trials, where it is broken off."""
        search = GuidanceSearch(self.config, "s", STUDY, no_stage_notice, "/a/model", overrides)
        search.run(resume=resume, after=[], on_change=lambda observer: None)

    @property
    def states(self) -> list[str]:
        """What the study's MLflow run was said to be, in order."""
        return [str(given[0]) for method, given in self.told if method == "status"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    return Bench(monkeypatch, tmp_path)


def test_tune_leaves_ctrl_c_to_the_study():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        _setup_signal_catching()
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "end, status",
    [
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(15), "KILLED"),  # what Ray makes of SIGTERM, by which a job on a cluster is stopped
        (StudyError("the cluster is too small"), "FAILED"),
    ],
)
def test_a_study_that_is_broken_off_has_ended_in_mlflow_and_runs_when_it_goes_on(bench, end, status):
    bench.ends_with = end
    for resume in (False, True):
        with pytest.raises(type(end)):
            bench.study(resume=resume)
        assert bench.states == ["RUNNING", status]
        bench.told.clear()


@pytest.mark.parametrize(
    "overrides, changes",
    [
        ([], {}),
        (["+experiment=digits", "evaluation.n=64"], {}),
        (["+experiment=digits", "sampler.precision=bf16", "guidance.scale=2"], {"precision": "bf16", "scale": 2.0}),
    ],
)
def test_a_guidance_study_begins_with_the_models_own_settings_and_what_overrides_change(bench, overrides, changes):
    with pytest.raises(KeyboardInterrupt):
        bench.study(*overrides)
    ((_, study, base, *_),) = bench.searched
    assert study == STUDY
    assert sampling(base) == OWN.with_fields(**changes)


def test_a_guidance_study_that_is_refused_has_changed_nothing_in_mlflow(bench):
    store = StudyStore.of(bench.config, "s")
    store.open(STUDY, base_of(bench.config, OWN), "another model", resume=False)
    for resume, message in ((False, "go on with --resume"), (True, "was begun with another subject")):
        with pytest.raises(StudyError, match=message):
            bench.study(resume=resume)
    assert bench.told == []


@pytest.mark.parametrize(
    "searched, width",
    [
        ({"optim.lr": {"log": [1e-4, 1e-2]}}, 0),
        ({"model.text_dim": {"choice": [0, 384]}}, 384),  # the configuration as it stands is not on text
    ],
)
def test_a_training_study_judges_by_the_captions_of_all_stored_test_images(bench, monkeypatch, searched, width):
    asked, judging = [], []

    def open_captions(width, *given, held_out):
        asked.append((width, held_out))
        return "drawn", "held"

    def judge(search):
        judging.append((search.captions, *search.held_out))
        raise KeyboardInterrupt

    monkeypatch.setattr(training_search, "open_captions", open_captions)
    images = torch.zeros(HELD_OUT, 1, 8, 8)
    monkeypatch.setattr(training_search, "held_out_images", lambda real, captions: (images, captions))
    monkeypatch.setattr(training_search, "fresh_images", lambda study, images, cond: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(TrainingSearch, "judge", judge)
    trained = StudyConfig.model_validate({"kind": "training", "trials": 1, "space": searched})
    with pytest.raises(KeyboardInterrupt):
        run_training(bench.config, trained)
    assert asked == [(width, HELD_OUT)]
    ((captions, images, cond),) = judging
    assert (captions, len(images), cond) == ("drawn", HELD_OUT, "held")


def run_training(config, study) -> None:
    TrainingSearch(config, "t", study, no_stage_notice, {}).run(resume=False, after=[], on_change=lambda observer: None)


def test_a_training_study_of_runs_of_open_length_is_refused(bench):
    timed = bench.config.model_copy(update={"training_s": 60.0})
    trained = StudyConfig.model_validate(
        {"kind": "training", "trials": 1, "space": {"optim.lr": {"log": [1e-4, 1e-2]}}}
    )
    with pytest.raises(ConfigError, match="trials are compared after as many images each"):
        run_training(timed, trained)
    assert not bench.told
