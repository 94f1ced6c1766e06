"""Evaluation while training goes on, without a cluster: what is due, in which order, and what is recorded of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints import BEST, Published, list_published, record_published, run_folder
from pipelines.config import compose
from pipelines.evaluation.recorded import Scored
from pipelines.evaluation.scores import Estimate
from pipelines.presentation.errors import PipelineError
from pipelines.storage import Fence, Storage, layout
from pipelines.storage.retry import TransientError
from pipelines.tracking import Tracker, client
from pipelines.training import evaluations as module
from pipelines.training.evaluations import STATE_TAG, Evaluations, due, has_outstanding, to_score
from pipelines.training.loop.context import Job
from pipelines.training.scoring import CancelledError
from tests.pipelines.evaluation import made_up

# --- what is due ---


def test_the_first_checkpoint_at_or_after_each_multiple_is_due_and_the_last_one_of_the_run():
    assert due([100, 200, 300, 400], 200, 1000) == {200, 400}
    assert due([90, 210, 390, 410], 200, 1000) == {210, 410}
    assert due([450], 200, 1000) == {450}  # one checkpoint, however many multiples it passes
    assert due([200, 1000], 900, 1000) == {1000}
    assert due([200, 1010], 2000, 1010) == {1010}
    assert due([100, 200], None, 200) == set()
    assert due([], 100, 200) == set()


def records(**scores: float | None) -> list[Published]:
    return [
        Published(f"file:///{name}", int(name[1:]), "d", {} if value is None else {BEST: value})
        for name, value in scores.items()
    ]


def wanted(published, tried=(), settled=(), every=100, end=1000):
    return [p.images_seen for p in to_score(published, every, end, tried, settled)]


def test_due_checkpoints_without_scores_are_scored_newest_first():
    assert wanted(records(i100=None, i200=1.0, i300=None)) == [300, 100]
    assert wanted(records(i100=None, i150=None, i200=None)) == [200, 100]
    assert wanted([replace(p, deleted=p.images_seen == 100) for p in records(i100=None, i200=None)]) == [200]


def test_an_evaluation_that_failed_under_an_earlier_driver_is_retried_for_the_newest_checkpoint_only():
    assert wanted(records(i100=None, i200=None, i300=None), tried={100, 300}) == [300, 200]
    assert wanted(records(i100=None, i200=None, i300=None), tried={300}, settled={300}) == [200, 100]
    assert wanted(records(i100=None, i150=None), tried={100}) == []  # the newest is another, which is not due


# --- the thread ---


@dataclass
class Run:
    """A run of 1,000 images in an MLflow of its own, that publishes where a test says so."""

    tracker: Tracker
    folder: Path
    overrides: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    room: bool = True
    fails: dict[int, Exception] = field(default_factory=dict)  # images seen -> what the evaluation raises, once

    def publish(self, *images: int, digest: str = "d") -> None:
        for seen in images:
            uri = f"file://{self.folder}/published/{seen}-{digest}"
            Storage().write(f"{uri}/state.json", b"{}")
            record_published(self.tracker, Published(uri, seen, digest))

    def driver(self) -> Evaluations:
        """Of a new driver, which takes over the run."""
        root = f"storage.root=file://{self.folder}"
        config = compose(
            ["+experiment=digits", "images=1000", "evaluation.every=100", "storage=file", root, *self.overrides]
        )
        fence = Fence.take(Storage(), f"{run_folder(config)}/driver")
        job = Job(config, None, self.tracker, {}, fence=fence)
        return Evaluations(job, config.images, self.evaluate, lambda: self.room, self.notices.append)

    def evaluate(self, published: Published, cancelled: threading.Event) -> Scored:
        images = published.images_seen
        if error := self.fails.pop(images, None):
            raise error
        self.scored.append(images)
        name = f"evaluation/{images:012d}.json"
        pixels = np.zeros((4, 4, 1), np.uint8)
        scores = made_up.scores(
            estimates={BEST.removeprefix("eval/"): Estimate(1e3 / images)},
            features=8,
            real_accuracy=None,
            real={},
        )
        return Scored(scores, name, images, ("digits", "e"), {"evaluation": pixels}, None, 1_000)

    def finish(self) -> Evaluations:
        """Let a driver do what is left after its training."""
        with self.driver() as made:
            made.finish()
        return made

    def states(self) -> dict[int, str | None]:
        return {images: m.tags.get(STATE_TAG) for images, m in tracking.checkpoint_models(self.tracker).items()}

    def curve(self) -> list[tuple[int, float]]:
        return sorted(self.tracker.metric(BEST))


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    folder = tmp_path_factory.mktemp("mlflow")
    made = client.client(f"sqlite:///{folder}/mlflow.db")
    made.create_experiment("one", artifact_location=f"file://{folder}/artifacts")
    yield made
    client.client.cache_clear()


@pytest.fixture
def run(mlflow: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.05)
    run_id = mlflow.create_run(mlflow.get_experiment_by_name("one").experiment_id).info.run_id
    return Run(Tracker(mlflow.tracking_uri, run_id, patience_s=1), tmp_path)


def until(condition, what: str) -> None:
    ticks = threading.Event()
    for _ in range(400):
        if condition():
            return
        ticks.wait(0.05)
    raise AssertionError(what)


def test_scores_are_recorded_while_training_goes_on_on_the_run_the_record_and_one_logged_model(run, mlflow):
    with run.driver() as evaluations:
        assert evaluations.newest_distance() is None
        run.publish(100, 150)
        until(lambda: evaluations.newest_distance() == (100, 10.0), "the first is scored")
        run.publish(200)
        until(lambda: list_published(run.tracker)[-1].scores, "the next is scored")
        until(lambda: evaluations.newest_distance() == (200, 5.0), "and is the newest")
    assert run.curve() == [(100, 10.0), (200, 5.0)]
    assert run.scored == [100, 200]
    assert {p.images_seen: p.scores for p in list_published(run.tracker)} == {
        100: {BEST: 10.0},
        150: {},
        200: {BEST: 5.0},
    }
    models = tracking.checkpoint_models(run.tracker)
    assert {images: model.tags.get(STATE_TAG) for images, model in models.items()} == {
        100: "scored", 150: None, 200: "scored"
    }  # fmt: skip
    (metric,) = mlflow.get_logged_model(models[200].model_id).metrics
    assert (metric.key, metric.value, metric.step, metric.dataset_name) == (BEST, 5.0, 200, "digits")
    assert run.tracker.has_picture("evaluation", 200)
    assert not run.tracker.has_picture("evaluation", 150)
    assert "evaluation/000000000200.json" in run.tracker.names("evaluation")
    assert [line for line in run.notices if "at 200 images: distance Frechet 5.00" in line]


def test_asking_for_outstanding_evaluations_writes_nothing(run):
    config = run.driver().config

    def left(**fields) -> bool:
        before = run.tracker.names(layout.CHECKPOINTS_RECORDED), run.states()
        asked = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=fields)})
        found = has_outstanding(run.tracker, asked, asked.images)
        assert (run.tracker.names(layout.CHECKPOINTS_RECORDED), run.states()) == before
        return found

    assert not left()
    run.publish(100, 200)
    assert (left(), left(every=None)) == (True, True)  # they are no logged models yet
    run.fails[200] = PipelineError("no")
    run.finish()
    assert run.scored == [100]
    assert (left(), left(every=None)) == (True, False)  # the newest is tried again
    run.finish()
    assert run.scored == [100, 200]
    assert not left()


def test_without_free_resources_only_the_newest_checkpoint_is_scored_at_the_end_and_both_is_reported_once(run):
    run.room = False
    run.publish(100, 200, 300)
    with run.driver() as evaluations:
        until(lambda: run.notices, "it says that it waits")
        until(lambda: len(run.states()) == 3, "all are entered")
        assert run.scored == []
        evaluations.finish()
    assert run.scored == [300]
    assert [line for line in run.notices if "wait: no node" in line] == run.notices[:1]
    left = [line for line in run.notices if "left without scores" in line]
    assert len(left) == 2
    assert all(f"runs:/{run.tracker.run_id}/{n}" in line for n, line in zip((100, 200), left, strict=True))
    assert "left out" in run.states()[100]
    run.publish(400)
    run.finish()
    assert run.scored == [300, 400]  # what was left out stays so


def test_a_failed_evaluation_is_reported_and_tagged_and_the_others_are_scored(run, mlflow):
    run.fails = {200: PipelineError("no labels"), 100: KeyError("x")}
    run.publish(100, 200, 300)
    with run.driver():
        until(lambda: len([s for s in run.states().values() if s]) == 3, "all were tried")
    assert run.scored == [300]
    assert run.states() == {100: "failed: KeyError: 'x'", 200: "failed: no labels", 300: "scored"}
    assert [line for line in run.notices if "at 200 images has failed, and training goes on: no labels" in line]
    assert (
        "no labels" in mlflow.get_run(run.tracker.run_id).data.tags[f"{STATE_TAG}.failed"]
        or "KeyError" in (mlflow.get_run(run.tracker.run_id).data.tags[f"{STATE_TAG}.failed"])
    )


def test_a_resumed_run_scores_untried_checkpoints_and_retries_the_newest(run):
    run.fails = {200: PipelineError("first"), 300: PipelineError("first")}
    run.publish(200, 300)
    with run.driver():
        until(lambda: len([s for s in run.states().values() if s]) == 2, "both were tried")
    run.publish(100)  # an earlier driver was killed before it
    with run.driver():
        until(lambda: run.scored == [300, 100], "the newest and the one that was not tried")
    assert run.states()[200] == "failed: first"


def test_a_service_that_is_away_for_a_moment_costs_no_scores(run):
    run.fails = {100: TransientError("MLflow is away")}
    run.publish(100)
    run.finish()
    assert (run.scored, run.states()) == ([100], {100: "scored"})


@pytest.mark.parametrize("step", ["log_scores", "tag_checkpoint_model"])
def test_scores_that_mlflow_does_not_take_now_are_recorded_later_without_another_evaluation(run, monkeypatch, step):
    call, calls = getattr(tracking, step), []

    def away_once(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            raise tracking.UnreachableError("away")
        return call(*arguments, **named)

    monkeypatch.setattr(tracking, step, away_once)
    run.publish(100)
    run.finish()
    assert len(calls) > 1
    assert run.scored == [100]
    assert run.curve() == [(100, 10.0)]
    assert list_published(run.tracker)[0].scores == {BEST: 10.0}
    assert len([name for name in run.tracker.names("images") if name.endswith(".png")]) == 1


def test_a_driver_that_was_replaced_records_nothing_more(run):
    run.publish(100)
    with run.driver() as first:
        until(lambda: run.states() == {100: "scored"}, "the first driver scores")
        with run.driver():
            until(lambda: run.states() == {100: "scored"}, "the second has looked")
            run.publish(200)
            until(lambda: run.states().get(200) == "scored", "the second scores")
            until(lambda: not first._thread.is_alive(), "the first has noticed")
    assert run.scored == [100, 200]
    assert run.curve() == [(100, 10.0), (200, 5.0)]


def test_a_stopped_training_leaves_a_running_evaluation_to_the_next_driver(run):
    begun = threading.Event()

    def until_cancelled(published, cancelled):
        begun.set()
        assert cancelled.wait(30)
        raise CancelledError("stopped")

    run.publish(100)
    with run.driver() as evaluations:
        evaluations.evaluate = until_cancelled
        assert begun.wait(30)
    assert run.states() == {100: None}
    run.finish()
    assert run.scored == [100]


def test_the_end_of_a_training_waits_for_an_evaluation_as_long_as_it_may(run, monkeypatch):
    begun = threading.Event()

    def endless(published, cancelled):
        begun.set()
        cancelled.wait(30)
        raise CancelledError("stopped")

    run.publish(1000)
    with run.driver() as evaluations:
        evaluations.evaluate = endless
        assert begun.wait(30)
        config = evaluations.config
        short = config.evaluation.model_copy(update={"wait_s": 0.6})
        evaluations.config = config.model_copy(update={"evaluation": short})
        evaluations.finish()
    assert any("waiting for the evaluation at 1,000 images, at most 1 s" in line for line in run.notices)
    assert any("the same command makes up for them" in line for line in run.notices)


def test_ctrl_c_ends_the_wait_and_not_the_training(run, monkeypatch):
    def endless(published, cancelled):
        cancelled.wait(30)
        raise CancelledError("stopped")

    def pressed(timeout):
        monkeypatch.undo()
        raise KeyboardInterrupt

    run.publish(1000)
    with run.driver() as evaluations:
        evaluations.evaluate = endless
        monkeypatch.setattr(evaluations._thread, "join", pressed)
        evaluations.finish()
    assert any("the same command makes up for them" in line for line in run.notices)
    assert run.states().get(1000) is None


def test_other_weights_at_the_same_images_are_scored_anew_on_the_same_logged_model(run):
    run.publish(100)
    run.finish()
    run.publish(100, digest="e")  # the workers had to start again from an earlier checkpoint
    run.finish()
    assert run.scored == [100, 100]
    (model,) = tracking.checkpoint_models(run.tracker).values()
    assert (model.tags["ddpm.digest"], model.tags[STATE_TAG]) == ("e", "scored")


def test_scores_of_weights_that_were_replaced_while_they_were_scored_are_not_recorded(run):
    def slow(published, cancelled):
        done = run.evaluate(published, cancelled)
        if published.digest == "d":
            run.publish(100, digest="e")
        return done

    run.publish(100)
    with run.driver() as evaluations:
        evaluations.evaluate = slow
        evaluations.finish()
    assert run.scored == [100, 100]
    (record,) = list_published(run.tracker)
    assert (record.digest, record.scores) == ("e", {BEST: 10.0})
    assert record.uri.endswith("100-e")


def test_a_checkpoint_that_was_published_anew_is_not_deleted_for_what_its_predecessor_scored(run):
    run.overrides = ("checkpoint.keep_best=1",)
    run.publish(100)
    with run.driver() as evaluations:
        until(lambda: run.states() == {100: "scored"}, "the first is scored")
        plain = evaluations.evaluate

        def publishing_anew(published, cancelled):
            if published.images_seen == 200:
                run.publish(100, digest="e")
            return plain(published, cancelled)

        evaluations.evaluate = publishing_anew
        run.publish(200)
        until(lambda: run.states().get(200) == "scored", "the second is scored")
        evaluations.finish()
    assert run.scored == [100, 200, 100]
    record = Published.read(run.tracker, "checkpoints/000000000100.json")
    assert (record.deleted, record.uri.rsplit("/", 1)[-1], record.scores) == (True, "100-e", {BEST: 10.0})
    assert [p.images_seen for p in list_published(run.tracker)] == [200]


def test_without_evaluations_every_published_checkpoint_is_a_logged_model_all_the_same(run):
    run.overrides = ("evaluation.every=null",)
    run.publish(100, 1000)
    run.finish()
    assert (run.scored, run.states()) == ([], {100: None, 1000: None})


def test_only_the_best_the_newest_and_what_is_named_stay(run, mlflow):
    run.overrides = ("checkpoint.keep_best=1",)
    run.publish(150, 200)
    mlflow.create_registered_model("digits-kept")
    tags = {"images_seen": "200"}
    mlflow.create_model_version("digits-kept", "file:///nowhere", run_id=run.tracker.run_id, tags=tags)
    with run.driver() as evaluations:
        for images in (300, 400, 500):
            run.publish(images)
            until(lambda images=images: run.states().get(images) == "scored", "it is scored")
        evaluations.finish()
    left = {p.images_seen for p in list_published(run.tracker)}
    assert left == {200, 500}  # the distance falls with the images: the newest is the best
    folders = {path.name for path in (run.folder / "published").iterdir() if any(path.iterdir())}
    assert folders == {"200-d", "500-d"}
    models = tracking.checkpoint_models(run.tracker)
    assert "keep_best" in models[300].tags["ddpm.deleted"]
    assert "ddpm.deleted" not in models[200].tags
    assert len(run.curve()) == 5
