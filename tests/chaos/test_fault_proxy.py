"""The proxy breaks what it is told to break, for as long as it is told, and nothing else."""

import time
from collections.abc import Iterator

import pytest
import requests

from tests.chaos.arena import until
from tests.chaos.fault_proxy import ANSWERS, Fault, FaultProxy
from tests.http_server import Answer, Server, serving

BODY = bytes(range(250)) * 40


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(lambda request: Answer(200, b"" if request.method == "PUT" else BODY, {"ETag": '"1"'})) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        yield proxy


def test_without_a_fault_everything_goes_through_as_it_came(server, proxy):
    session = requests.Session()
    got = session.get(f"{proxy.url}/bucket/a%2Fb?x=%2F&y", headers={"X-Amz-Date": "now"})
    assert (got.content, got.headers["ETag"]) == (BODY, '"1"')
    assert session.put(f"{proxy.url}/whole", data=BODY).status_code == 200
    assert session.put(f"{proxy.url}/parts", data=iter([BODY, b"more"])).content == b""
    assert session.head(f"{proxy.url}/head").headers["Content-Length"] == str(len(BODY))
    asked = [(request.method, request.path, request.body) for request in server.requests]
    paths = ["/bucket/a%2Fb?x=%2F&y", "/whole", "/parts", "/head"]
    assert asked == list(zip(["GET", "PUT", "PUT", "HEAD"], paths, [b"", BODY, BODY + b"more", b""], strict=True))
    assert server.requests[0].headers["X-Amz-Date"] == "now"
    assert all(f"http://{request.headers['Host']}" == proxy.url for request in server.requests)  # S3 signs it


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_of_the_proxys_own_does_not_reach_the_server(server, proxy, kind):
    active = proxy.start(Fault(kind, count=2, methods=("PUT",), path="/a"))
    status, text = ANSWERS[kind]
    for _ in range(2):
        got = requests.put(f"{proxy.url}/a", data=b"1")
        assert (got.status_code, got.content) == (status, text)
    assert requests.get(f"{proxy.url}/a").content == BODY
    assert requests.put(f"{proxy.url}/b", data=b"1").status_code == 200
    assert requests.put(f"{proxy.url}/a", data=b"1").status_code == 200  # the third
    assert active.hits == ["PUT /a", "PUT /a"]
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind, asked", [("stall", 1), ("reset", 1), ("short_body", 1), ("refuse", 0)])
def test_a_broken_connection_gives_no_whole_answer(server, proxy, kind, asked):
    for method in ("GET", "PUT"):
        proxy.start(Fault(kind, count=1))
        server.requests.clear()
        with pytest.raises(requests.RequestException):
            requests.request(method, f"{proxy.url}/a", timeout=0.3 if kind == "stall" else 30)
        # A client that has given up may be ahead of the server.
        until(lambda: len(server.requests) >= asked, 10, lambda: f"{asked} requests at the server")
        assert len(server.requests) == asked  # the server has done it, and the client does not know
        proxy.stop()
        assert requests.get(f"{proxy.url}/a").content == BODY
    proxy.start(Fault("short_body", after=100))
    with pytest.raises(requests.RequestException, match="100 bytes read"):
        requests.get(f"{proxy.url}/a")


def test_a_fault_lasts_for_its_period_and_meets_its_share(proxy):
    active = proxy.start(Fault("unavailable", seconds=0.5, share=0.5))
    answers = [requests.get(f"{proxy.url}/a").status_code for _ in range(40)]
    assert {200, 503} == set(answers)
    assert len(active.hits) == answers.count(503)
    active.over.wait(0.6)
    assert {requests.get(f"{proxy.url}/a").status_code for _ in range(10)} == {200}


def test_a_trickle_is_slow_and_whole(proxy):
    proxy.start(Fault("trickle", seconds=1.5))
    began = time.monotonic()
    got = requests.get(f"{proxy.url}/a", timeout=1)  # something comes before that, time and again
    assert time.monotonic() - began > 1
    assert got.content == BODY
