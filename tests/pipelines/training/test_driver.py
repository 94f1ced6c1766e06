"""The end of a training on the driver, without a cluster."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError

from ddpm.model import load_model, tensors_digest
from pipelines import tracking
from pipelines.checkpoints import ModelError
from pipelines.config import compose
from pipelines.storage import Fence, FencedError, Storage
from pipelines.tracking import Tracker
from pipelines.training import driver
from pipelines.training.driver import Plan, initial_lineage, train
from pipelines.training.errors import TrainingError
from pipelines.training.goodput import Attempt
from pipelines.training.loop.context import Job
from tests.pipelines.training.loop.ranks import last_checkpoint, tiny_config, train_here

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose MLflow is away, and a driver that needs no Ray."""

    @contextmanager
    def only_driver(config):
        yield None

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(driver, "connect_ray", lambda *arguments: None)
    monkeypatch.setattr(driver, "require_resources", lambda *arguments: None)
    monkeypatch.setattr(driver, "only_driver", only_driver)
    places = ["storage=file", f"storage.root=file://{tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    config = compose(["+experiment=digits", "images=100", *places])
    return Job(config, None, Storage(), Tracker(NOBODY, "r", patience_s=0), {})


def fit_to(images: int, error: BaseException | None = None, length: int | None = None):
    def fit(job, monitor, ledger, *rest):
        ledger.update([Attempt(0.0, 1.0, 0, images, {"step": 1.0}, length=length)])
        return error

    return fit


def test_a_finished_training_ends_well_while_mlflow_is_away(job, monkeypatch, caplog):
    monkeypatch.setattr(driver, "_fit_until_stuck", fit_to(100))
    result = train(Plan(job, 0, 100))
    assert (result.status, result.images_seen, result.published) == ("finished", 100, None)
    assert "MLflow does not know that the run is FINISHED; the same command tries again" in caplog.text
    assert result.tracker.url == NOBODY
    assert train(Plan(job, 100, 100)).status == "complete"


@pytest.mark.parametrize("images, length, status", [(60, 60, "finished"), (100, 140, "stopped")])
def test_a_run_that_has_seconds_is_finished_where_its_workers_say_that_it_ends(
    job, monkeypatch, images, length, status
):
    monkeypatch.setattr(driver, "_fit_until_stuck", fit_to(images, length=length))
    assert train(Plan(job, 0, 100)).status == status


def test_a_failed_training_says_why_and_not_that_mlflow_is_away(job, monkeypatch, caplog):
    monkeypatch.setattr(driver, "_fit_until_stuck", fit_to(50, TrainingError("no GPU left")))
    with pytest.raises(TrainingError, match="no GPU left"):
        train(Plan(job, 0, 100))
    assert "does not know that the run is FAILED" in caplog.text


class Recorder:
    """Takes the place of the evaluations of a run, and of its MLflow run, and remembers what was asked of them."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append("end")

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(name)


@pytest.mark.parametrize(
    "images, error, waits",
    [(100, None, True), (50, None, False), (50, TrainingError("no GPU left"), False), (100, FencedError("x"), False)],
)
def test_only_a_run_that_has_seen_all_its_images_waits_for_evaluations(job, monkeypatch, images, error, waits):
    recorder = Recorder()
    monkeypatch.setattr(driver, "_evaluations", lambda *arguments: recorder)
    monkeypatch.setattr(driver, "_fit_until_stuck", fit_to(images, error))
    monkeypatch.setattr(driver, "report_goodput", lambda *arguments: None)
    monkeypatch.setattr(Tracker, "status", lambda *arguments: None)
    with pytest.raises(TrainingError) if error else nullcontext():
        train(Plan(job, 0, 100))
    assert recorder.calls == (["finish", "end"] if waits else ["end"])


def test_a_complete_run_takes_the_run_over_only_where_something_is_left_to_score(job, monkeypatch):
    recorder, left = Recorder(), []
    recorder.outstanding = lambda: bool(left)  # type: ignore[attr-defined]
    monkeypatch.setattr(driver, "_evaluations", lambda *arguments: recorder)
    monkeypatch.setattr(driver, "send_unsent", lambda job: None)
    monkeypatch.setattr(Tracker, "is_finished", lambda self: True)
    assert train(Plan(job, 100, 100)).status == "complete"
    assert recorder.calls == []
    left.append(100)
    assert train(Plan(job, 100, 100)).status == "complete"
    assert recorder.calls == ["finish", "end"]
    assert job.storage.exists(f"{job.run_uri}/driver")


LOST = ControllerError(ActorUnavailableError("lost while it was started", None))


@pytest.mark.parametrize(
    "ends, error, left",
    [
        ([(LOST, 0), (LOST, 0), (None, 100)], None, 0),
        ([(LOST, 0)] * 3, LOST, 0),  # more often than cluster.max_failures
        ([(LOST, 0), (LOST, 0), (LOST, 10), (LOST, 10), (LOST, 10), (None, 100)], None, 0),  # got further in between
        ([(ControllerError(ValueError("no such bundle")), 0), (None, 100)], "no such bundle", 1),
    ],
)
def test_a_worker_lost_while_it_is_started_is_one_of_the_failures_that_are_allowed(job, monkeypatch, ends, error, left):
    left_over, now = list(ends), [0]

    def fit_and_watch(*arguments):
        ended, now[0] = left_over.pop(0)
        return ended

    monkeypatch.setattr(driver, "fit_and_watch", fit_and_watch)
    monkeypatch.setattr(driver, "describe_run", lambda job: None)
    monkeypatch.setattr(driver, "newest_checkpoint", lambda *arguments: SimpleNamespace(images_seen=now[0]))
    cluster = job.config.cluster.model_copy(update={"max_failures": 2})
    config, fence = job.config.model_copy(update={"cluster": cluster}), Fence.take(job.storage, f"{job.run_uri}/driver")
    job = replace(job, config=config, fence=fence)
    said = []
    found = driver._fit_until_stuck(job, None, None, None, said.append, lambda job, monitor: None)
    assert found is error or str(error) in str(found)
    assert len(left_over) == left
    assert all("starting again at" in text for text in said)
    assert len(said) == len(ends) - left - 1


def test_what_does_not_work_is_told_on_the_terminal_and_on_the_page_of_the_run(job, monkeypatch):
    pages, said = [], []
    monkeypatch.setattr(tracking, "describe", lambda tracker, parts: pages.append((tracker.patience_s, parts)))
    tell = driver.on_the_page(job.tracker, said.append)
    for text in (
        "rank 0: update left out",
        "rank 0: not working: the loss stays",
        "rank 0: not working: samples are grey",
    ):
        tell(text)
    assert said[0] == "rank 0: update left out"
    assert len(said) == 3
    assert pages == [
        (0, {"Warnings": "The loss stays."}),
        (0, {"Warnings": "The loss stays. Samples are grey."}),
    ]


def test_what_the_configuration_shows_is_told_before_the_workers_start(job, monkeypatch):
    said = []

    def fit(*arguments):
        assert any("guidance.scale=1" in text for text in said)

    monkeypatch.setattr(driver, "_fit_until_stuck", fit)
    monkeypatch.setattr(tracking, "describe", lambda *arguments: None)
    objective = job.config.objective.model_copy(update={"label_drop": 0.0})
    config = job.config.model_copy(update={"objective": objective})
    train(Plan(replace(job, config=config), 0, 100), notice=said.append)
    assert said[0].startswith("not working: guidance.scale = 1.5 needs samples without a condition")


def test_the_lineage_names_the_weights_that_a_run_started_from_and_keeps_them_when_it_goes_on(digits, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert initial_lineage(tiny_config(base, 50, 25), Storage(), new=True) == {}
    train_here(base, digits, tiny_config(base, 50, 25))
    model = last_checkpoint(base)
    config = tiny_config(tuned, 50, 25, f"init_from={model}")
    expected = {"init_from": str(model), "init_from_digest": tensors_digest(load_model(model).network.state_dict())}
    found = initial_lineage(config, Storage(), new=True)
    assert found == expected
    train_here(tuned, digits, config, lineage=found)
    shutil.rmtree(base)
    assert initial_lineage(config, Storage(), new=False) == expected
    with pytest.raises(ModelError, match="names no model"):
        initial_lineage(config, Storage(), new=True)
