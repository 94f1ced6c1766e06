"""What rank 0 logs arrives once, whatever happens to the server and to rank 0."""

from __future__ import annotations

import time
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from pipelines.config import ConfigError, compose
from pipelines.config.sections import TrackingConfig
from pipelines.storage import Fence, FencedError, Storage, TransientStorageError
from pipelines.tracking import RunLog, TrackingError, UnreachableError, run_log
from pipelines.tracking.run_log import SINKS, Outbox


class Server:
    """MLflow as far as it matters here: away at times, and sometimes it takes what it does not acknowledge."""

    uri = "http://mlflow"
    run_id = "run"

    def __init__(self) -> None:
        self.away = False
        self.deaf_once = False
        self.points: list[tuple[str, int, float]] = []
        self.pictures: list[tuple[str, int]] = []
        self.texts: dict[str, str] = {}

    def last_steps(self):
        self._answer()
        steps = {}
        for key, step, _ in self.points:
            steps[key] = max(step, steps.get(key, -1))
        return steps

    def last_pictures(self):
        self._answer()
        steps = {}
        for key, step in self.pictures:
            steps[f"images/{key}"] = max(step, steps.get(f"images/{key}", -1))
        return steps

    def metrics(self, values, step, at_ms):
        self._answer()
        if any(np.isnan(v) for v in values.values()):
            raise TrackingError("not a number")
        self.points += [(key, step, value) for key, value in values.items()]
        if self.deaf_once:
            self.deaf_once = False
            raise UnreachableError("timed out")

    def image(self, key, pixels, step):
        self._answer()
        assert pixels.dtype == np.uint8
        self.pictures.append((key, step))

    def text(self, text, name):
        self._answer()
        self.texts[name] = text

    def holds(self, mark, name):
        self._answer()
        return mark in self.texts.get(name, "")

    def _answer(self):
        if self.away:
            raise UnreachableError("away")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(run_log, "RETRY_S", 0.01)


PIXELS = np.zeros((2, 2, 1), np.uint8)


def test_points_wait_for_a_server_that_is_away_and_arrive_in_order_once(tmp_path):
    server = Server()
    server.away = True
    log = Outbox(server, tmp_path)
    for step in (10, 20, 30):
        log.metrics({"loss": step / 10}, step)
    log.image("samples", PIXELS, 30)
    with pytest.raises(UnreachableError, match="4 points of the run wait"):
        log.flush(0.1)
    server.away = False
    log.flush()
    assert server.points == [("loss", 10, 1.0), ("loss", 20, 2.0), ("loss", 30, 3.0)]
    assert server.pictures == [("samples", 30)]
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_held_log_sends_nothing_until_it_begins_or_is_flushed(tmp_path):
    asked, flushed = Server(), Server()
    logs = [RunLog({"mlflow": server}, tmp_path / name, held=True) for server, name in ((asked, "a"), (flushed, "b"))]
    for log in logs:
        log.metrics({"loss": 1.0}, 10)
    time.sleep(0.1)
    assert not asked.points
    assert not flushed.points
    logs[0].begin()
    for _ in range(500):
        if asked.points:
            break
        time.sleep(0.01)
    assert asked.points == [("loss", 10, 1.0)]
    logs[1].flush()
    assert flushed.points == [("loss", 10, 1.0)]
    for log in [*logs, RunLog({"mlflow": Server()}, tmp_path / "c", held=True)]:
        log.close()


def test_the_next_process_sends_what_a_killed_one_could_not_and_drops_what_it_computes_again(tmp_path):
    server = Server()
    killed = Outbox(server, tmp_path)
    killed.metrics({"loss": 1.0}, 10)
    killed.image("samples", PIXELS, 10)
    killed.flush()
    server.away = True
    killed.metrics({"loss": 2.0}, 20)
    killed.close()  # as good as killed: it says nothing more
    after = Outbox(server, tmp_path)  # resumes at 0: passes 10 and 20 again
    for step in (10, 20, 30):
        after.metrics({"loss": step / 10, "lr": 0.1}, step)
        after.image("samples", PIXELS, step)
    server.away = False
    after.flush()
    assert [p for p in server.points if p[0] == "loss"] == [("loss", 10, 1.0), ("loss", 20, 2.0), ("loss", 30, 3.0)]
    assert [step for key, step, _ in server.points if key == "lr"] == [10, 20, 30]
    assert server.pictures == [("samples", 10), ("samples", 20), ("samples", 30)]
    after.close()


def test_what_was_taken_but_not_acknowledged_is_not_sent_again(tmp_path):
    server = Server()
    log = Outbox(server, tmp_path)
    server.deaf_once = True
    log.metrics({"loss": 1.0}, 10)
    log.metrics({"loss": 2.0}, 20)
    log.flush()
    assert Counter(step for _, step, _ in server.points) == {10: 1, 20: 1}
    log.close()


def test_a_point_that_the_server_refuses_does_not_hold_up_the_others(tmp_path):
    server = Server()
    log = Outbox(server, tmp_path)
    log.metrics({"loss": float("nan")}, 10)
    log.metrics({"loss": 2.0}, 20)
    log.flush()
    assert server.points == [("loss", 20, 2.0)]
    log.close()


def test_what_waits_travels_with_a_checkpoint_to_another_node(tmp_path):
    server = Server()
    server.away = True
    here = RunLog({"mlflow": server}, tmp_path / "here")
    for step in (10, 20):
        here.metrics({"loss": step / 10}, step)
    here.text("where it is", "checkpoints/20.json", 20)
    packed = here.pack()
    assert packed is not None
    here.close()
    (tmp_path / "unsent.zip").write_bytes(packed)
    there = RunLog({"mlflow": server}, tmp_path / "there")
    there.adopt(tmp_path / "unsent.zip")
    there.metrics({"loss": 3.0}, 30)
    server.away = False
    there.flush()
    assert server.points == [("loss", 10, 1.0), ("loss", 20, 2.0), ("loss", 30, 3.0)]
    assert server.texts == {"checkpoints/20.json": "where it is"}
    assert there.pack() is None
    there.close()
    back = RunLog({"mlflow": server}, tmp_path / "here")  # the first node again, with what it could not send then
    back.flush()
    back.close()
    assert len(server.points) == 3


def test_a_text_to_which_others_have_added_is_not_sent_over_it_again(tmp_path):
    server, records = Server(), "checkpoints/20.json"
    log = RunLog({"mlflow": server}, tmp_path / "run")
    for text, expected in [
        ("at A, no scores", "at A, no scores"),
        ("at A, no scores", "at A, scores"),
        ("at B, no scores", "at B, no scores"),
    ]:
        log.text(text, records, 20, mark=text.partition(",")[0])
        log.flush()
        assert server.texts == {records: expected}
        server.texts[records] = server.texts[records].replace("no scores", "scores")  # as an evaluation does
    log.text("replaced", records, 20)
    log.flush()
    assert server.texts == {records: "replaced"}
    log.close()


def test_a_sink_that_is_away_does_not_hold_up_another_and_its_queue_travels_too(tmp_path):
    there, away = Server(), Server()
    away.away = True
    log = RunLog({"mlflow": there, "other": away}, tmp_path / "run")
    log.metrics({"loss": 1.0}, 10)
    log.outboxes["mlflow"].flush(5)
    assert there.points == [("loss", 10, 1.0)]
    with pytest.raises(UnreachableError, match="1 points of the run wait"):
        log.flush(0.1)
    packed = log.pack()
    assert packed is not None
    log.close()
    (tmp_path / "unsent.zip").write_bytes(packed)
    away.away = False
    without = RunLog({"mlflow": there}, tmp_path / "elsewhere" / "run")  # the sink is not configured any more
    without.adopt(tmp_path / "unsent.zip")
    without.flush()
    without.close()
    after = RunLog({"mlflow": there, "other": away}, tmp_path / "new" / "run")
    after.adopt(tmp_path / "unsent.zip")
    after.flush()
    after.close()
    assert (there.points, away.points) == ([("loss", 10, 1.0)], [("loss", 10, 1.0)])


def test_every_sink_that_the_configuration_may_name_is_registered():
    (names, _) = get_args(TrackingConfig.model_fields["sinks"].annotation)
    assert set(get_args(names)) == set(SINKS)
    assert compose().tracking.sinks == ("mlflow",)
    with pytest.raises(ConfigError, match="and always mlflow"):
        compose(["tracking.sinks=[]"])


def test_a_driver_that_was_replaced_sends_nothing_and_its_successor_sends_the_rest(tmp_path):
    server, uri = Server(), f"file://{tmp_path}/driver"
    first = Outbox(server, tmp_path / "unsent", Fence.take(Storage(), uri))
    first.metrics({"train/loss": 0.5}, 10)
    first.flush(20)
    second_fence = Fence.take(Storage(), uri)
    first.metrics({"train/loss": 0.4}, 20)
    first.text("where it is", "checkpoints/20.json", 20)
    with pytest.raises(FencedError, match="another driver has taken over"):
        first.flush(20)
    first.close()
    assert (server.points, server.texts) == ([("train/loss", 10, 0.5)], {})
    second = Outbox(server, tmp_path / "unsent", second_fence)
    second.flush(20)
    second.close()
    assert server.points == [("train/loss", 10, 0.5), ("train/loss", 20, 0.4)]
    assert server.texts == {"checkpoints/20.json": "where it is"}


def test_points_wait_while_nobody_can_say_whether_the_driver_was_replaced(tmp_path, monkeypatch):
    server, fence = Server(), Fence.take(Storage(), f"file://{tmp_path}/driver")

    def away(self, uri, **options):
        raise TransientStorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", away)
        box = Outbox(server, tmp_path / "unsent", fence)
        box.metrics({"train/loss": 0.5}, 10)
        with pytest.raises(UnreachableError):
            box.flush(0.2)
        assert server.points == []
    box.flush(20)
    box.close()
    assert server.points == [("train/loss", 10, 0.5)]
