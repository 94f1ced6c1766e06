"""Benchmark of `ddpm serve` beside `mlflow models serve`: the same version, machine, protocol and requests.

    python -m benchmarks.serving [--work FOLDER] [--quick] [--json]

It starts its own local stack, and registers a digits model after all and after an eighth of its training. 100 clients
ask at once for 1,000 single pictures of mixed labels and seeds, with two numbers of steps; every picture is compared
with what the model draws for that request alone. Rounds of the two servers alternate, both by MLflow's protocol, and
`ddpm serve` by its own too. Then the alias moves there and back, and a replica is killed, while the same requests are
asked; and the memory of the server's processes is read along the way. Each process computes with one thread.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import Size, commit, ddpm, make_parser, publish, work_folder

if TYPE_CHECKING:
    from pipelines.stack import StackState

NAME, ALIAS = "serving", "champion"
MODEL = f"models:/{NAME}@{ALIAS}"
STEPS = (5, 10)


@dataclass(frozen=True)
class Load:
    """What the servers are asked for.

    Attributes:
        clients: at once.
        requests: of a round.
        rounds: of every server.
        again: how often the requests are asked while something happens.
        training: of the model, as a share of that of the page of digits.
    """

    clients: int
    requests: int
    rounds: int
    again: int
    training: float


FULL, QUICK, SMOKE = Load(100, 1_000, 5, 2, 0.5), Load(20, 80, 1, 4, 0.02), Load(2, 4, 1, 8, 0.0)


@dataclass(frozen=True)
class Ask:
    """A request for one picture."""

    label: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Told:
    """What came of a request: the version that answered where it says so, its pixels, and how long it took."""

    version: str | None
    pixels: Any
    seconds: float


Send = Callable[[Ask], tuple[str | None, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("serving", __doc__, quick="fewer clients, requests and rounds", keeps="the trained model")
    home = "folder of a stack that runs and has no model `serving`; default: one of its own"
    parser.add_argument("--home", type=Path, help=home)
    options = parser.parse_args(arguments)
    from benchmarks.stacks import stack_of

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with stack_of(options.home) as state:
        os.environ["DDPM_HOME"] = str(state.home)
        load = options.size.of(FULL, QUICK, SMOKE)
        publish(run(state, work_folder(options), load, options.size), "serving", options)


def run(state: StackState, work: Path, load: Load, size: Size) -> dict[str, Any]:
    """Return the figures of both servers."""
    models = _register(work, load, size, str(state.tracking_uri))
    asked = _requests(load.requests)
    wanted = {version: _wanted(model, asked) for version, model in models.items()}
    _point(str(state.tracking_uri), "1")
    with _theirs(str(state.tracking_uri)) as (their_url, answers), _ours(state.home) as (url, headers):
        answers()
        ours, table = _image_sender(url, headers), _table_sender(url, headers)
        theirs = _table_sender(their_url, {})
        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(load.rounds):
            for system, send in (("ddpm", ours), ("ddpm_invocations", table), ("mlflow", theirs)):
                rounds.setdefault(system, []).append(_measure(send, asked, load.clients, wanted))
        memory = [_memory(state.home)]
        moved = _disturbed(ours, asked, load, wanted, lambda: _move(str(state.tracking_uri)))
        memory.append(_memory(state.home))
        killed = _disturbed(ours, asked, load, wanted, lambda: _kill(state.home))
        batches = _batches(url, headers)
    middle = {system: _median(of) for system, of in rounds.items()}
    speed = {system: of["images_per_s"] for system, of in middle.items()}
    return {
        "benchmark": "serving",
        "commit": commit(),
        "quick": size is not Size.FULL,
        "clients": load.clients,
        "requests": load.requests,
        "cores": os.cpu_count(),
        "systems": middle,
        "speedup_mlflow": speed["ddpm_invocations"] / speed["mlflow"],
        "speedup_mlflow_own_protocol": speed["ddpm"] / speed["mlflow"],
        "pictures_of_a_batch": batches,
        "alias_moves": moved,
        "replica_killed": killed,
        "memory_mib": memory,
    }


def _register(work: Path, load: Load, size: Size, uri: str) -> dict[str, Any]:
    """Register the model after all of its training (version 1) and after an eighth of it; return both."""
    from dataclasses import replace

    import torch

    from benchmarks.digits.data import load_digits
    from benchmarks.digits.training import SHAPE, Zoo
    from ddpm.generate import Sampling
    from ddpm.model import Model, ModelSpec, save_model
    from pipelines import tracking
    from pipelines.registry.evidence import MODEL as FOLDER
    from pipelines.registry.evidence import packages
    from pipelines.registry.package import pyfunc_of

    torch.set_num_threads(1)
    zoo = Zoo(load_digits(work, size), work, load.training, lambda text: print(text, file=sys.stderr))
    settings = Sampling.of(kind="dpm_solver", steps=STEPS[1], scale=1.5)
    classes = tuple(map(str, range(10)))
    spec = ModelSpec(SHAPE, {"kind": "cosine", "num_steps": 1000}, "eps", 8, classes, settings)
    models: dict[str, Any] = {}
    for number, denoiser in enumerate((zoo.classes(), zoo.weak()), 1):
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / FOLDER, spec, denoiser.network.state_dict())
            tracker, _ = tracking.open_run(uri, "ddpm", f"{NAME}-{number}", {})
            pyfunc = replace(
                pyfunc_of(Path(folder), spec.shape, packages()), artifacts={"model": Path(folder) / FOLDER}
            )
            version = tracking.register(tracker, NAME, tracking.log_pyfunc(tracker, pyfunc, 0), {})
        models[version.version] = Model(spec, denoiser.network)
    return models


def _requests(count: int) -> list[Ask]:
    choose = random.Random(0)
    return [Ask(str(choose.randrange(10)), choose.randrange(1 << 40), choose.choice(STEPS)) for _ in range(count)]


def _wanted(model: Any, asked: Sequence[Ask]) -> dict[Ask, Any]:
    """Return what the model draws for each request by itself."""
    from pipelines.inference.pictures import picture
    from pipelines.inference.request import SampleRequest

    def alone(ask: Ask) -> Any:
        return picture(
            SampleRequest.of(labels=[ask.label], seeds=[ask.seed], sampling={"steps": ask.steps}), model
        ).pixels[0]

    return {ask: alone(ask) for ask in asked}


def _image_sender(url: str, headers: dict[str, str]) -> Send:
    import numpy as np
    from PIL import Image

    from pipelines.serving.client import Client

    client = Client(url, headers["authorization"].removeprefix("Bearer "))

    def send(ask: Ask) -> tuple[str | None, Any]:
        answer = client.ask({"labels": [ask.label], "seeds": [ask.seed], "sampling": {"steps": ask.steps}})
        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        return answer["model"]["version"], np.array(image)[..., None]

    return send


def _table_sender(url: str, headers: dict[str, str]) -> Send:
    import numpy as np
    import requests

    local = threading.local()

    def send(ask: Ask) -> tuple[str | None, Any]:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        table = {"columns": ["label", "seed"], "data": [[ask.label, ask.seed]]}
        body = {"dataframe_split": table, "params": {"steps": ask.steps}}
        answer = local.session.post(f"{url}/invocations", json=body, headers=headers, timeout=600)
        answer.raise_for_status()
        return None, np.array(answer.json()["predictions"], np.uint8)[0]

    return send


def _load(send: Send, asked: Sequence[Ask], clients: int) -> tuple[list[Told | Exception], float]:
    """Return what came of each request, and the seconds that all of them took."""

    def one(ask: Ask) -> Told | Exception:
        began = time.perf_counter()
        try:
            version, pixels = send(ask)
        except Exception as error:  # noqa: BLE001 - a lost request, whatever the reason, is what is counted
            return error
        return Told(version, pixels, time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        told = list(pool.map(one, asked))
    return told, time.perf_counter() - began


def _measure(send: Send, asked: Sequence[Ask], clients: int, wanted: dict[str, dict[Ask, Any]]) -> dict[str, Any]:
    """Return the figures of one round."""
    told, seconds = _load(send, asked, clients)
    return {"images_per_s": len(asked) / seconds, **_judge(told, asked, wanted)}


def _judge(told: Sequence[Told | Exception], asked: Sequence[Ask], wanted: dict[str, dict[Ask, Any]]) -> dict[str, Any]:
    """Return how many requests were lost, and how many pictures are another than that of the version that answered."""
    import numpy as np

    answers = [(each, ask) for each, ask in zip(told, asked, strict=True) if isinstance(each, Told)]
    apart = [
        np.abs(each.pixels.astype(int) - wanted[each.version or "1"][ask].astype(int)).max() for each, ask in answers
    ]
    took = sorted(each.seconds for each, _ in answers)
    return {
        "lost": len(told) - len(answers),
        "mixed_up": sum(int(difference) > 1 for difference in apart),
        "p50_s": took[len(took) // 2],
        "p99_s": took[min(len(took) - 1, int(0.99 * len(took)))],
        "versions": sorted({each.version for each, _ in answers if each.version}),
    }


def _disturbed(
    send: Send, asked: Sequence[Ask], load: Load, wanted: dict[str, dict[Ask, Any]], disturb: Callable[[], None]
) -> dict[str, Any]:
    """Return the figures of requests while something happens, from a second after their start."""
    timer = threading.Timer(1, disturb)
    timer.start()
    many = list(asked) * load.again
    told, _ = _load(send, many, load.clients)
    timer.join()
    return _judge(told, many, wanted)


def _median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of rounds; what is counted is added up."""
    counted = {name: sum(each[name] for each in rounds) for name in ("lost", "mixed_up")}
    names = ("images_per_s", "p50_s", "p99_s")
    return counted | {name: statistics.median(each[name] for each in rounds) for name in names}


@contextmanager
def _ours(home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Run `ddpm serve`; yield its address and the headers that it asks for."""
    settings = ["serving.port=0", "serving.follow_s=0.5", "serving.cpus_per_replica=0.5", "serving.max_queue=1000"]
    command = [*ddpm(), "serve", MODEL, *settings, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        yield url, {"authorization": f"Bearer {(home / 'serve-token').read_text().strip()}"}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


@contextmanager
def _theirs(uri: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run `mlflow models serve` of the same version; yield its address, and what waits until it answers there."""
    import requests

    from pipelines.serving.service import free_port

    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--timeout", "600"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where it finds uvicorn
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)

    def answers() -> None:
        deadline = time.monotonic() + 180
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.5)

    try:
        yield f"http://127.0.0.1:{port}", answers
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _point(uri: str, version: str) -> None:
    from pipelines import tracking

    tracking.set_alias(uri, NAME, ALIAS, version)


def _move(uri: str) -> None:
    """Have the alias point to the other version, and back a few seconds later."""
    _point(uri, "2")
    time.sleep(3)
    _point(uri, "1")


def _processes(home: Path) -> Iterator[Any]:
    """Yield the processes of the server: its replica and its front."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        ours = title.startswith("ray::ServeReplica:")
        if ours and process.environ().get("RAY_AUTH_TOKEN_PATH") == str(home / "ray-token"):
            yield process


def _kill(home: Path) -> None:
    """Kill the process that holds the model."""
    for process in _processes(home):
        if ":model-0" in " ".join(process.cmdline()):
            process.kill()


def _memory(home: Path) -> float:
    """Return the memory of the server's processes, in MiB."""
    return sum(process.memory_info().rss for process in _processes(home)) / 2**20


def _batches(url: str, headers: dict[str, str]) -> float:
    """Return the mean number of pictures of a network batch."""
    import requests

    lines = requests.get(f"{url}/metrics", headers=headers, timeout=60).text.splitlines()
    found = {line.split("{")[0]: float(line.split(" ")[-1]) for line in lines if line.startswith("ddpm_serve_batch")}
    return found["ddpm_serve_batch_images_sum"] / found["ddpm_serve_batch_images_count"]


if __name__ == "__main__":
    main()
