"""What a client makes of a server's answers, and when it asks again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.inference import RequestError
from pipelines.serving.client import Client, ServerError


@contextmanager
def answering(*answers: tuple[int, str] | None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives these answers one after another; None breaks the connection."""
    left, heard = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append({"authorization": self.headers.get("authorization", ""), "path": self.path})
            self.rfile.read(int(self.headers["content-length"]))
            answer = left.pop(0) if len(left) > 1 else left[0]  # the last one again and again
            if answer is None:
                self.connection.close()
                return
            self.send_response(answer[0])
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(answer[1].encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", heard
        finally:
            server.shutdown()
            thread.join()


DONE = (200, json.dumps({"images": []}))


def test_a_lost_answer_is_asked_for_again():
    lost = [(500, "died"), (503, "{}"), (429, json.dumps({"message": "later"})), None, (502, "<html>")]
    with answering(*lost, DONE) as (url, heard):
        assert Client(url, "secret").ask({}) == {"images": []}
    assert heard == [{"authorization": "Bearer secret", "path": "/v1/images"}] * 6


@pytest.mark.parametrize(
    "status, message, expected",
    [(422, "no class 'x'", "no class 'x'"), (401, "a token", "a token; give --token"), (404, "", "404")],
)
def test_a_refusal_is_the_users_to_mend_and_is_not_asked_again(status, message, expected):
    refused = answering((status, json.dumps({"message": message})))
    with refused as (url, heard), pytest.raises(RequestError, match=expected):
        Client(url).ask({})
    assert [each["authorization"] for each in heard] == [""]


def test_a_server_that_stays_silent_is_an_error_after_a_while():
    with answering((503, "busy")) as (url, _), pytest.raises(ServerError, match="does not answer: 503 busy"):
        Client(url, patience_s=0.3).ask({})
    with pytest.raises(ServerError, match="does not answer"):
        Client("http://127.0.0.1:9", patience_s=0.3).ask({})
    with answering((200, "<html>")) as (url, _), pytest.raises(RequestError, match="something else than JSON"):
        Client(url).ask({})
