"""A command waits for the first answer of a server that is starting, and names the address of one that is not there."""

from __future__ import annotations

import pytest
import requests

from pipelines.tracking import TrackingError, client

URI = "http://127.0.0.1:9"


def test_a_command_waits_for_the_first_answer_of_a_server_that_is_restarted():
    answers = iter([requests.ConnectionError("refused"), requests.ReadTimeout("stalls"), "there"])

    def call(_: object) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert client.first_answer(URI, call) == "there"


def test_a_server_that_never_answers_is_a_mistake_in_the_address(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"127.0.0.1:9.*Check tracking.uri"):
        client.first_answer(URI, lambda mlflow: mlflow.get_run("x"), patience_s=0.5)
