"""Which answers of MLflow, and of what stands in front of it, let a point wait, and which leave it out."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass, field

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from mlflow.exceptions import MlflowException, RestException

from pipelines.storage.retry import TransientError
from pipelines.tracking import Tracker, TrackingError, UnreachableError, run_log
from pipelines.tracking.client import as_tracking_errors, client, http_status
from pipelines.tracking.mlflow_sink import MlflowSink
from pipelines.tracking.run_log import Outbox
from tests.http_server import Answer, Request, serving

PIXELS = np.zeros((2, 2, 1), np.uint8)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(run_log, "RETRY_S", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    client.cache_clear()


@dataclass
class Mlflow:
    """The part of MLflow's REST interface that curves need; `trouble` is what it answers to a point instead."""

    trouble: Answer | None = None
    stage: str = "active"
    points: list[int] = field(default_factory=list)
    troubled: int = 0

    def __call__(self, request: Request) -> Answer:
        if request.path.startswith("/api/2.0/mlflow/runs/get"):
            info = {"run_id": "r", "run_uuid": "r", "lifecycle_stage": self.stage, "status": "RUNNING"}
            return as_json(200, {"run": {"info": info, "data": {}}})
        if (trouble := self.trouble) is not None:
            self.troubled += 1
            return trouble
        assert request.path.startswith("/api/2.0/mlflow/runs/log-batch")
        self.points += [metric["step"] for metric in json.loads(request.body)["metrics"]]
        return as_json(200, {})


def as_json(status: int, body: object) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


def from_mlflow(status: int, code: str) -> Answer:
    return as_json(status, {"error_code": code, "message": "so it is"})


def page(status: int) -> Answer:
    """What nginx answers."""
    html = f"<html><head><title>{status}</title></head><body><center>nginx</center></body></html>"
    return Answer(status, html.encode(), {"Content-Type": "text/html"})


@pytest.mark.parametrize(
    ("trouble", "waits"),
    [
        (from_mlflow(401, "UNAUTHENTICATED"), True),
        (from_mlflow(401, "CUSTOMER_UNAUTHORIZED"), True),
        (from_mlflow(403, "PERMISSION_DENIED"), True),
        (from_mlflow(404, "RESOURCE_DOES_NOT_EXIST"), True),
        (from_mlflow(429, "REQUEST_LIMIT_EXCEEDED"), True),
        (from_mlflow(429, "RESOURCE_EXHAUSTED"), True),
        (from_mlflow(500, "INTERNAL_ERROR"), True),
        (from_mlflow(503, "TEMPORARILY_UNAVAILABLE"), True),
        (from_mlflow(400, "INVALID_PARAMETER_VALUE"), False),
        (from_mlflow(400, "BAD_REQUEST"), False),
        (Answer(401, b"You are not authenticated. Please see documentation", {"Content-Type": "text/plain"}), True),
        (Answer(403, b"Permission denied", {"Content-Type": "text/plain"}), True),
        (page(200), True),  # the page of a login
        (page(401), True),
        (page(403), True),
        (page(404), True),
        (page(405), True),
        (page(408), True),
        (page(429), True),
        (page(500), True),
        (page(502), True),
        (page(503), True),
        (page(504), True),
        (page(400), False),
        (page(413), False),
        (as_json(413, {"message": "Request Too Long", "status": 413}), False),
        (as_json(403, {"message": "Forbidden"}), True),
        (as_json(403, {"error_code": "403", "message": "Forbidden"}), True),
        (as_json(413, {"error_code": 413}), False),
    ],
    ids=lambda value: f"{value.status} {value.body[:60].decode()}" if isinstance(value, Answer) else "",
)
def test_points_wait_or_are_left_out_by_what_the_server_answers(tmp_path, caplog, trouble, waits):
    mlflow = Mlflow(trouble)
    with serving(mlflow) as server:
        log = Outbox(MlflowSink(Tracker(server.url, "r", patience_s=0)), tmp_path)
        log.metrics({"train/loss": 1.0}, 2560)
        until(lambda: mlflow.troubled >= 2)  # what is refused is sent once more
        mlflow.trouble = None
        log.metrics({"train/loss": 0.5}, 5120)
        log.flush(20)
        log.close()
    assert mlflow.points == ([2560, 5120] if waits else [5120])
    said = "training goes on without" if waits else "refuses the point of train/loss at 2,560 images, which is left out"
    assert any(said in record.message for record in caplog.records)


def test_the_points_of_a_run_in_the_trash_wait_until_it_is_restored(tmp_path, caplog):
    mlflow = Mlflow(from_mlflow(400, "INVALID_PARAMETER_VALUE"), stage="deleted")
    with serving(mlflow) as server:
        log = Outbox(MlflowSink(Tracker(server.url, "r", patience_s=0)), tmp_path)
        log.metrics({"train/loss": 1.0}, 10)
        until(lambda: mlflow.troubled >= 2)
        mlflow.trouble, mlflow.stage = None, "active"
        log.flush(20)
        log.close()
    assert mlflow.points == [10]
    assert "mlflow runs restore --run-id r" in caplog.text


def test_a_server_that_is_not_there_is_worth_another_try_and_a_wrong_address_is_said_at_once():
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        Tracker("http://127.0.0.1:9", "r", patience_s=0).last_steps()
    assert time.monotonic() - began < 10


def test_statuses_are_read_from_the_answer_and_not_from_its_text():
    text = "API request to endpoint /x failed with error code 401 != 200. Response body: 'error code 413 != 200'"
    assert http_status(MlflowException(text)) == 401
    assert http_status(MlflowException("API request to http://x/413 failed with exception 413")) == 500
    assert http_status(RestException({"error_code": "NOT_FOUND", "message": "413"})) == 404


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (boto3.exceptions.S3UploadFailedError("train-000403: timed out"), True),
        (ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject"), True),
        (ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject"), False),
        (NoCredentialsError(), False),
        (OSError(5, "Input/output error"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_artifact_store_raises_is_sorted_too(error, again):
    with (
        pytest.raises(TrackingError, match="artifacts of MLflow at http://m") as raised,
        as_tracking_errors("http://m"),
    ):
        raise error
    assert isinstance(raised.value, TransientError) is again


class Sink:
    """A sink whose parts are away, or broken, one by one."""

    uri = "here"

    def __init__(self) -> None:
        self.points: list[int] = []
        self.pictures: list[int] = []
        self.artifacts_away = False
        self.broken_at = -1

    def last_steps(self):
        return {}

    def last_pictures(self):
        if self.artifacts_away:
            raise UnreachableError("no bucket")
        return {}

    def metrics(self, values, step, at_ms):
        if step == self.broken_at:
            raise RuntimeError("a bug of a library")
        self.points.append(step)

    def image(self, key, pixels, step):
        self.pictures.append(step)

    def text(self, text, name):
        pass


def test_curves_do_not_wait_for_an_artifact_store_that_is_away(tmp_path):
    sink = Sink()
    sink.artifacts_away = True
    log = Outbox(sink, tmp_path)
    for step in (10, 20, 30):
        log.image("samples", PIXELS, step)
        log.metrics({"loss": 1.0}, step)
    until(lambda: sink.points == [10, 20, 30])
    assert sink.pictures == []
    sink.artifacts_away = False
    log.flush(10)
    log.close()
    assert sink.pictures == [10, 20, 30]


def test_an_unexpected_error_costs_its_point_and_not_the_thread(tmp_path, caplog):
    sink = Sink()
    sink.broken_at = 10
    (tmp_path / "000000000000005-0-000000.metrics").write_bytes(b"{")  # half a file, after a power failure
    with caplog.at_level(logging.ERROR):
        log = Outbox(sink, tmp_path)
        for step in (10, 20):
            log.metrics({"loss": 1.0}, step)
        log.flush(10)
    assert sink.points == [20]
    assert "the point of loss at 10 images cannot be sent" in caplog.text
    assert "a bug of a library" in caplog.text
    log.metrics({"loss": 1.0}, 30)
    log.flush(10)
    log.close()
    assert sink.points == [20, 30]


def test_two_processes_with_one_folder_both_go_on(tmp_path):
    here, there = Sink(), Sink()
    logs = [Outbox(here, tmp_path), Outbox(there, tmp_path)]
    for step in range(200):
        logs[step % 2].metrics({"loss": 1.0}, step)
    for log in logs:
        log.flush(20)
        log.metrics({"loss": 1.0}, 1000)
        log.flush(20)
        assert log._thread.is_alive()
        log.close()
    assert set(here.points) | set(there.points) >= {*range(200), 1000}


def test_the_thread_goes_on_after_a_disk_that_is_away(tmp_path, monkeypatch):
    sink = Sink()
    log = Outbox(sink, tmp_path)
    listed, calls = log._waiting, threading.Semaphore(0)

    def failing():
        if threading.current_thread() is log._thread and not calls.acquire(blocking=False):
            calls.release()
            raise OSError(5, "Input/output error")
        return listed()

    monkeypatch.setattr(log, "_waiting", failing)
    log.metrics({"loss": 1.0}, 10)
    log.flush(10)
    log.close()
    assert sink.points == [10]


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
