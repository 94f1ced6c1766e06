"""The driver of a training, without a cluster: a call in place of Ray Train, a monitor in place of its actor."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError

from pipelines import tracking
from pipelines.config import compose
from pipelines.storage import FencedError
from pipelines.tracking import Tracker
from pipelines.training import driver
from pipelines.training.driver import train
from pipelines.training.errors import TrainingError
from pipelines.training.loop.context import Job
from pipelines.training.loop.progress import Progress
from pipelines.training.prepare import PreparedRun
from pipelines.training.ray_train import watch
from pipelines.training.ray_train.mailboxes import Monitor
from pipelines.training.states import AnotherDriver

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose MLflow is away, and a driver that needs no Ray."""

    @contextmanager
    def only_driver(config):
        yield Handle()

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(driver, "connect_ray", lambda *arguments: None)
    monkeypatch.setattr(driver, "only_driver", only_driver)
    monkeypatch.setattr(driver, "describe_run", lambda job: None)
    monkeypatch.setattr(watch, "answer", lambda reply, *arguments: reply)
    places = ["storage=file", f"storage.root=file://{tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    config = compose(["+experiment=digits", "images=100", *places])
    return Job(config, None, Tracker(NOBODY, "r", patience_s=0), {})


class Handle:
    """The handle of a monitor in this process, whose methods are called as those of an actor are."""

    def __init__(self):
        self.monitor = Monitor()

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.monitor, name))


def workers_to(images: int, error: BaseException | None = None, length: int | None = None):
    """Return workers that train to so many images, and end with this error."""

    def provide(job, monitor):
        def fit():
            monitor.post.remote("a", 1.0, Progress(images, 0, 0.5, {"step": 1.0}, length=length))
            if error is not None:
                raise error

        return fit

    return provide


def test_a_finished_training_ends_well_while_mlflow_is_away(job, caplog):
    result = train(PreparedRun(job, 0, 100), workers=workers_to(100))
    assert (result.status, result.images_seen, result.published) == ("finished", 100, None)
    assert "MLflow failed at the status FINISHED of the run; the same command tries again" in caplog.text
    assert result.tracker.url == NOBODY
    assert train(PreparedRun(job, 100, 100)).status == "complete"


@pytest.mark.parametrize("images, length, status", [(60, 60, "finished"), (100, 140, "stopped")])
def test_a_run_that_has_seconds_is_finished_where_its_workers_say_that_it_ends(job, images, length, status):
    assert train(PreparedRun(job, 0, 100), workers=workers_to(images, length=length)).status == status


def test_a_failed_training_says_why_and_not_that_mlflow_is_away(job, caplog):
    with pytest.raises(TrainingError, match="no GPU left"):
        train(PreparedRun(job, 0, 100), workers=workers_to(50, TrainingError("no GPU left")))
    assert "failed at the status FAILED of the run" in caplog.text


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
    [(100, None, True), (50, None, False), (50, TrainingError("no GPU left"), False), (100, "taken over", False)],
)
def test_only_a_run_that_has_seen_all_its_images_waits_for_evaluations(job, monkeypatch, images, error, waits):
    recorder = Recorder()
    monkeypatch.setattr(driver, "_evaluations", lambda *arguments: recorder)
    monkeypatch.setattr(driver, "report_goodput", lambda *arguments: None)
    monkeypatch.setattr(Tracker, "status", lambda *arguments: None)
    if error == "taken over":
        error = None
        monkeypatch.setattr(driver, "taken_over", lambda job: AnotherDriver(FencedError("x")))
        expected = pytest.raises(TrainingError, match="x")
    else:
        expected = pytest.raises(TrainingError) if error else nullcontext()
    with expected:
        train(PreparedRun(job, 0, 100), workers=workers_to(images, error))
    calls = [call for call in recorder.calls if call != "newest_distance"]
    assert calls == (["finish", "end"] if waits else ["end"])


def test_a_complete_run_takes_the_run_over_only_where_something_is_left_to_score(job, monkeypatch):
    recorder, left = Recorder(), []
    recorder.outstanding = lambda: bool(left)  # type: ignore[attr-defined]
    monkeypatch.setattr(driver, "_evaluations", lambda *arguments: recorder)
    monkeypatch.setattr(driver, "send_unsent", lambda job: None)
    monkeypatch.setattr(Tracker, "is_finished", lambda self: True)
    assert train(PreparedRun(job, 100, 100)).status == "complete"
    assert recorder.calls == []
    left.append(100)
    assert train(PreparedRun(job, 100, 100)).status == "complete"
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

    def provide(job, monitor):
        def fit():
            ended, now[0] = left_over.pop(0)
            if ended is not None:
                raise ended
            monitor.post.remote("a", 1.0, Progress(now[0], 0, 0.5, {"step": 1.0}))

        return fit

    def checkpoint_images(*arguments):
        return now[0]

    monkeypatch.setattr(driver, "checkpoint_images", checkpoint_images)
    monkeypatch.setattr(watch, "checkpoint_images", checkpoint_images)
    cluster = job.config.cluster.model_copy(update={"max_failures": 2})
    job = replace(job, config=job.config.model_copy(update={"cluster": cluster}))
    said = []
    with nullcontext() if error is None else pytest.raises(TrainingError) as raised:
        train(PreparedRun(job, 0, 100), notice=said.append, workers=provide)
    if raised is not None:
        assert raised.value.__cause__ is error or str(error) in str(raised.value)
    assert len(left_over) == left
    said = [text for text in said if text.startswith("starting again at")]
    assert len(said) == len(ends) - left - 1


def test_faults_are_shown_on_the_terminal_and_on_the_page_of_the_run(job, monkeypatch):
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


def test_faults_of_the_configuration_are_shown_before_the_workers_start(job, monkeypatch):
    said = []

    def provide(job, monitor):
        assert any("guidance.scale=1" in text for text in said)
        return workers_to(100)(job, monitor)

    monkeypatch.setattr(tracking, "describe", lambda *arguments: None)
    objective = job.config.objective.model_copy(update={"label_drop": 0.0})
    config = job.config.model_copy(update={"objective": objective})
    train(PreparedRun(replace(job, config=config), 0, 100), notice=said.append, workers=provide)
    assert said[0].startswith("not working: guidance.scale = 1.5 needs samples without a condition")
