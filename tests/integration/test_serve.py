"""`ddpm serve` on a real Ray cluster, of versions in a real registry, while all kinds of things happen to it."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio_client
import numpy as np
import psutil
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image

from ddpm.model import Model, load_model
from pipelines import tracking
from pipelines.checkpoints.references import Resolved
from pipelines.inference.pictures import picture
from pipelines.inference.request import SampleRequest
from pipelines.registry import Signer, register
from pipelines.serving.client import Client
from pipelines.serving.forms import OWN
from pipelines.stack import StackState
from tests.integration.conftest import Shell
from tests.pipelines.drawing import model_folder
from tests.pipelines.registry.version import CONFIG, scores
from tests.pipelines.serving.bad_requests import BAD, LIMITS

pytestmark = pytest.mark.integration

NAME = "served"
CHAMPION = f"models:/{NAME}@champion"
NAMES = tuple(str(i) for i in range(10))
STEPS = (3, 5)
QUEUE = 200


@dataclass
class Server:
    """A server that runs, and the lines that it has printed."""

    process: subprocess.Popen[str]
    url: str
    token: str
    lines: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def ask(self, **body: Any) -> dict[str, Any]:
        return Client(self.url, self.token).ask(body)

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}{path}", headers=self.headers, timeout=30)

    def versions(self) -> list[str]:
        return [model["version"] for model in self.get("/v1/models").json()["models"]]


@contextmanager
def serving(shell: Shell, home: Path, *arguments: str) -> Iterator[Server]:
    """Run a server; end it by Ctrl-C, which it must survive in order."""
    process = shell.start("serve", *arguments, "--json")
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        lines.extend(process.stderr)  # a line at a time

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "".join(lines)[-3000:]
        yield Server(process, json.loads(first)["url"], (home / "serve-token").read_text().strip(), lines)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0, "".join(lines)[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
        reader.join()


@dataclass(frozen=True)
class Versions:
    """Two registered versions, the folders of their models, and the alias that names one of them."""

    mlflow: MlflowClient
    models: dict[str, Model]

    def point(self, version: str) -> None:
        self.mlflow.set_registered_model_alias(NAME, "champion", version)


@pytest.fixture(scope="module")
def versions(local_stack: StackState, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    models: dict[str, Model] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(local_stack.home))
        for seed in (1, 2):
            model = load_model(model_folder(tmp_path_factory.mktemp("served") / str(seed), classes=NAMES, seed=seed))
            tracker, _ = tracking.open_run(local_stack.tracking_uri, "ddpm", f"served-{seed}", {})
            found = scores(model.spec.sampling)
            version = register(Resolved("tiny", model, tracker), NAME, found, "file:///none", Signer.of(CONFIG))
            models[version.version] = model
    made = Versions(MlflowClient(local_stack.tracking_uri), models)
    made.point("1")
    return made


@pytest.fixture(scope="module")
def server(shell: Shell, local_stack: StackState, versions: Versions) -> Iterator[Server]:
    limits = [f"serving.{name}={value}" for name, value in LIMITS.items()]
    more = ["serving.port=0", "serving.follow_s=0.5", f"serving.max_queue={QUEUE}", "serving.cpus_per_replica=0.2"]
    with serving(shell, local_stack.home, CHAMPION, f"models:/{NAME}/2", "--page", *limits, *more) as running:
        yield running


def near(one: Any, other: Any) -> bool:
    """Whether pictures are equal, up to one grey level in at most 1 of 1,000 pixels, or in one of a small picture."""
    one, other = np.asarray(one, int), np.asarray(other, int)
    apart = np.abs(one - other)
    return bool(one.shape == other.shape and apart.max() <= 1 and (apart > 0).sum() <= max(1, apart.size / 1000))


def pixels(answer: dict[str, Any]) -> np.ndarray:
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in answer["images"]]
    stacked = np.stack(pictures)
    return stacked if stacked.ndim == 4 else stacked[..., None]


def drawn(model: Model, label: str, seed: int, steps: int) -> np.ndarray:
    return picture(SampleRequest.of(labels=[label], seeds=[seed], sampling={"steps": steps}), model).pixels


def until(happened: Callable[[], bool], within_s: float) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within_s, f"not within {within_s} s"
        time.sleep(0.1)


@contextmanager
def load(server: Server, versions: Versions, clients: int = 16) -> Iterator[list[tuple[str, bool]]]:
    """Ask from many clients at once inside this block; collects (version, whether the picture was the right one).

    Whatever goes wrong is raised at the end.
    """
    told: list[tuple[str, bool]] = []
    wanted = {
        (version, label, seed, steps): drawn(model, label, seed, steps)
        for version, model in versions.models.items()
        for label in NAMES[:3]
        for seed in range(2)
        for steps in STEPS
    }
    stop = threading.Event()

    def ask(number: int) -> None:
        choose = random.Random(number)
        while not stop.is_set():
            label, seed, steps = choose.choice(NAMES[:3]), choose.randrange(2), choose.choice(STEPS)
            answer = requests.post(
                f"{server.url}/v1/images",
                json={"labels": [label], "seeds": [seed], "sampling": {"steps": steps}},
                headers=server.headers,
                timeout=60,
            )
            assert answer.status_code == 200, answer.text
            version = answer.json()["model"]["version"]
            told.append((version, near(pixels(answer.json()), wanted[version, label, seed, steps])))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield told
        finally:
            stop.set()
        for future in asking:
            future.result()


def test_a_picture_is_the_same_by_every_way_to_ask_for_it(server, shell, versions, tmp_path):
    options = ["--labels", "3,8", "--seeds", "5", "--steps", "4"]
    local = shell.ok("sample", CHAMPION, "--out", str(tmp_path / "local"), *options, "--json").answer
    asked = shell.ok(
        "sample", "champion", "--out", str(tmp_path / "asked"), *options, "--film", "--url", server.url, "--json"
    ).answer
    ours, theirs = ([np.array(Image.open(path)) for path in answer["files"]] for answer in (local, asked))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))  # of equal batches: exactly
    here, there = (json.loads(Path(answer["manifest"]).read_text()) for answer in (local, asked))
    assert there["model"]["digest"] == here["model"]["digest"]
    assert (there["request"], there["pictures"]) == (here["request"] | {"film": True}, here["pictures"])
    assert [Path(path).name for path in asked["others"]] == ["film.png", "film.webp"]

    one = requests.post(
        f"{server.url}/v1/images",
        json={"labels": ["3"], "seeds": [5], "sampling": {"steps": 4}, "format": "png"},
        headers=server.headers,
        timeout=60,
    )
    assert near(np.array(Image.open(io.BytesIO(one.content))), ours[0])

    import mlflow

    mlflow.set_tracking_uri(server_uri := versions.mlflow.tracking_uri)
    from mlflow.pyfunc import load_model as load_pyfunc
    from mlflow.pyfunc import scoring_server
    from starlette.testclient import TestClient

    assert server_uri
    table = {"dataframe_split": {"columns": ["label", "seed"], "data": [["3", 5], ["8", 5]]}, "params": {"steps": 4}}
    reference = TestClient(scoring_server.init(load_pyfunc(CHAMPION))).post("/invocations", json=table)
    answer = requests.post(f"{server.url}/invocations", json=table, headers=server.headers, timeout=60)
    assert answer.json() == reference.json()
    assert near(np.array(answer.json()["predictions"])[0, ..., 0], ours[0])


def test_requests_of_all_kinds_at_once_are_batched_and_none_is_mixed_up(server, versions):
    def one(number: int) -> bool:
        choose = random.Random(number)
        label, seed, steps = choose.choice(NAMES), choose.randrange(1 << 40), choose.choice(STEPS)
        version = choose.choice(("1", "2"))
        count = choose.randint(1, 3)
        body = {"labels": [label], "seed": seed, "count": count, "sampling": {"steps": steps}}
        found = server.ask(model=CHAMPION if version == "1" else f"models:/{NAME}/2", **body)
        assert found["model"]["version"] == version
        return near(pixels(found), picture(SampleRequest.of(**body), versions.models[version]).pixels)

    with ThreadPoolExecutor(40) as pool:
        assert all(pool.map(one, range(120)))
    counted = server.get("/metrics").text
    totals = {line.split(" ")[0]: float(line.split(" ")[1]) for line in counted.splitlines() if line[0] != "#"}
    batches = sum(value for name, value in totals.items() if name.startswith("ddpm_serve_batch_images_count"))
    images = sum(value for name, value in totals.items() if name.startswith("ddpm_serve_images_total"))
    print(f"{images:.0f} pictures in {batches:.0f} network batches")
    assert images >= 2 * batches


def test_the_page_draws_what_the_server_draws_for_whoever_has_sent_the_token(server, versions):
    page = f"{server.url}/page/"
    assert requests.get(page, timeout=30).status_code == 401
    browser = requests.Session()
    assert browser.post(page, data={"token": server.token}, timeout=30).status_code == 200
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    visitor = gradio_client.Client(page, headers={"cookie": cookie}, verbose=False)
    fields = [["3"], "", "", 7, 1, OWN, 3, versions.models["1"].spec.sampling.guidance.scale]
    shown = visitor.predict(*fields, api_name="/sample")
    (picture_of_it,) = re.findall(r"data:image/png;base64,([^\"]+)", shown)
    asked = server.ask(model=CHAMPION, labels=["3"], seed=7, sampling={"steps": 3})
    assert near(pixels({"images": [picture_of_it]}), pixels(asked))


def test_no_request_is_lost_while_the_alias_moves(server, versions):
    until(lambda: server.versions() == ["1", "2"], 20)
    with load(server, versions) as told:
        time.sleep(2)
        versions.point("2")
        until(lambda: ("2", True) in told, 60)
        versions.point("1")
        until(lambda: told[-1] == ("1", True), 60)
    assert {version for version, _ in told} == {"1", "2"}
    assert all(right for _, right in told)
    print(f"{len(told)} requests while the alias moved there and back")


def test_no_request_is_lost_when_a_replica_is_killed(server, versions, local_stack):
    with load(server, versions, clients=8) as told:
        time.sleep(1)
        (victim,) = replicas(local_stack, "model-0")
        before = len(told)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(told) > before + 50, 60)
    assert all(right for _, right in told)
    assert replicas(local_stack, "model-0") != [victim]


def test_a_client_outlives_the_death_of_the_front(server, local_stack):
    (victim,) = replicas(local_stack, "Front")
    stop, asked = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            asked.append(server.ask(labels=["1"], seeds=[len(asked)]))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        until(lambda: len(asked) > 3, 20)
        os.kill(victim, signal.SIGKILL)
        before = len(asked)
        until(lambda: len(asked) > before + 5 or asking.done(), 60)
        stop.set()
        asking.result()
    assert replicas(local_stack, "Front") != [victim]


def test_bad_requests_are_refused_with_the_reason_and_the_server_lives(server):
    before = server.ask(labels=["1"], seeds=[1])["images"]
    for name, bad in BAD.items():
        headers = (server.headers if bad.token else {}) | bad.headers
        answer = requests.request(bad.method, server.url + bad.path, data=bad.data, headers=headers, timeout=30)
        assert answer.status_code == bad.status, f"{name}: {answer.status_code} {answer.text}"
        assert bad.reason in answer.json()["message"], f"{name}: {answer.text}"
    assert spoken(server, b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408 ")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert spoken(server, b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 64).startswith(b"HTTP/1.1 413 ")
    assert server.ask(labels=["1"], seeds=[1])["images"] == before


def test_ctrl_c_ends_it_once_every_admitted_request_is_answered(server):
    slow = {"labels": ["1"], "count": 16, "sampling": {"kind": "langevin", "steps": 5, "steps_per_level": 40}}
    before = admitted(server)
    with ThreadPoolExecutor(6) as pool:
        asked = [
            pool.submit(requests.post, f"{server.url}/v1/images", json=slow, headers=server.headers, timeout=60)
            for _ in range(6)
        ]
        until(lambda: admitted(server) == before + 6 and waiting(server), 20)
        server.process.send_signal(signal.SIGINT)
        answers = [each.result() for each in asked]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert server.process.wait(90) == 0
    assert "stopping: waiting requests are answered first" in "".join(server.lines)
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""  # nor a line of Ray's, of what it ends
    with pytest.raises(requests.ConnectionError):
        server.get("/ping")


def admitted(server: Server) -> int:
    """How many requests for pictures wait, are drawn or were answered."""
    counted = r"^ddpm_serve_(?:queue|requests_total\{path=\"/v1/images\").* ([\d.]+)$"
    return sum(int(float(number)) for number in re.findall(counted, server.get("/metrics").text, re.MULTILINE))


def waiting(server: Server) -> int:
    """How many requests for pictures have no answer yet."""
    counted = re.findall(r"^ddpm_serve_queue\{.* ([\d.]+)$", server.get("/metrics").text, re.MULTILINE)
    return sum(int(float(number)) for number in counted)


def spoken(server: Server, rest: bytes) -> bytes:
    """What the server answers to a request whose body stops somewhere."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/images HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.token}\r\n"
        with suppress(ConnectionError):  # it may have answered, and closed, before all was sent
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n" + rest)
        return connection.recv(100)


def replicas(stack: StackState, name: str) -> list[int]:
    """The processes of the stack's Ray that run a deployment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        ours = title.startswith("ray::ServeReplica:") and f":{name}" in title
        if ours and process.environ().get("RAY_AUTH_TOKEN_PATH") == str(stack.home / "ray-token"):
            found.append(process.pid)
    return found
