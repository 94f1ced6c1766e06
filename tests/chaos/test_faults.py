"""Every fault that a network, a busy server or a gateway has for a client, in every phase that talks to a service.

Nothing is lost: no sample, no checkpoint, no metric, and there is one run and one version of a model. The table at the
end of the module says so (`pytest -s`, or as JSON in the file that DDPM_FAULT_TABLE names).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from ddpm.models.unet import UNet
from pipelines import stack, tracking
from pipelines.checkpoints import (
    Checkpoint,
    CheckpointList,
    CheckpointState,
    Listed,
    Published,
    checkpoint_name,
    complete_checkpoints,
    enter_checkpoint,
    list_published,
    load_checkpoint,
    publish,
    record_published,
    record_scores,
    save_checkpoint,
    take_over,
)
from pipelines.checkpoints.references import model_spec
from pipelines.config import Config, compose
from pipelines.evaluation.evaluators import open_evaluator
from pipelines.presentation.errors import PipelineError
from pipelines.shards.audit.check import check
from pipelines.shards.index import Dataset, read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.read import opened_split, read_split
from pipelines.shards.stream import StreamSettings, open_stream
from pipelines.stack import StackState
from pipelines.storage import Storage, join, s3
from pipelines.tracking import RunLog, Tracker, run_log
from pipelines.tracking.mlflow_sink import MlflowSink
from tests.chaos.fault_proxy import Active, Fault, FaultProxy
from tests.pipelines.checkpoints.tiny import SMALL, fetch_newest

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

OUTAGE_S = 3.0
PICTURES = 60
BATCH, STEPS = 12, 40
CONFIG = compose(["+experiment=digits"])
FINAL = ("denied", "forbidden", "unauthorized")
"""Answers that may end a call at once, in words; made again afterwards, it loses nothing."""


@dataclass(frozen=True)
class Cell:
    """One fault in one phase.

    Attributes:
        hits: requests that met the fault.
        lost: samples, checkpoints, metrics or versions that are missing, wrong or there twice; of `of`.
        note: what was said, where the fault ended the call.
    """

    fault: str
    phase: str
    hits: int
    lost: int
    of: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Services:
    """The services, and what was stored in them before anything went wrong.

    Attributes:
        pictures: a folder of class folders.
        dataset: made of them, on S3; `same` is another copy, on this machine.
        checkpoint: a folder, and its state.
        model_id: of a logged model.
        evaluator_digest: of the dataset's evaluator network, which is stored.
    """

    state: StackState
    s3: Storage
    pictures: Path
    dataset: Dataset
    same: Dataset
    checkpoint: Path
    checkpoint_state: CheckpointState
    tracker: Tracker
    model_id: str
    evaluator_digest: str


@dataclass
class Attempt:
    """A phase under way, whose client talks through a proxy.

    Attributes:
        name: of this fault and phase alone.
        switch: turns the fault on.
    """

    name: str
    services: Services
    proxy: FaultProxy
    fault: Fault
    folder: Path
    active: Active | None = None

    def switch(self) -> Active:
        if self.active is None:
            self.active = self.proxy.start(self.fault)
        return self.active

    @property
    def storage(self) -> Storage:
        return replace(self.services.s3, endpoint_url=self.proxy.url)

    @property
    def uri(self) -> str:
        return f"s3://ddpm/faults/{self.name}"


Phase = Callable[[Attempt], tuple[int, int]]
"""Returns how much was lost, and of how much."""


def in_ingest(attempt: Attempt) -> tuple[int, int]:
    attempt.switch()
    written = write(attempt.services.pictures, attempt.uri, attempt.storage)
    calm = attempt.services.s3
    assert read_dataset(attempt.uri, calm).digest == written.digest == attempt.services.dataset.digest
    return len(check(attempt.uri, calm).problems), PICTURES


def in_check(attempt: Attempt) -> tuple[int, int]:
    attempt.switch()
    report = check(attempt.services.dataset.uri, attempt.storage)
    assert report.bytes == sum(s.bytes for split in report.dataset.splits.values() for s in split)
    return len(report.problems), PICTURES


def in_first_batch(attempt: Attempt) -> tuple[int, int]:
    attempt.switch()
    return read_through(attempt, [0])


def in_mid_epoch(attempt: Attempt) -> tuple[int, int]:
    def firsts() -> Iterator[int]:
        yield from (0, BATCH)
        active = attempt.switch()
        first = 2 * BATCH
        while first < 4 * PICTURES or (active.on and first < 10_000 * BATCH):
            yield first
            first += BATCH

    return read_through(attempt, firsts())


def read_through(attempt: Attempt, firsts: Iterator[int] | list[int]) -> tuple[int, int]:
    """Read batches by ranges, without a cache, and compare them with those of the same dataset read without a fault."""
    settings = StreamSettings(lanes=2, window=2, seed=1, cache_dir=attempt.folder / "cache", cache_bytes=1)
    dataset = read_dataset(attempt.services.dataset.uri, attempt.storage)
    reader, order = open_stream(dataset, "train", attempt.storage, settings)
    calm, _ = open_stream(attempt.services.same, "train", Storage(), settings)
    lost = count = 0
    try:
        for first in firsts:
            piece = order.piece(first, BATCH, 0, 1)
            for got, wanted in zip(reader.samples(piece), calm.samples(piece), strict=True):
                got.pop("__url__"), wanted.pop("__url__")
                lost, count = lost + (got != wanted), count + 1
    finally:
        reader.close()
        calm.close()
    return lost, count


def in_checkpoint(attempt: Attempt) -> tuple[int, int]:
    folder, state = attempt.services.checkpoint, attempt.services.checkpoint_state
    attempt.switch()
    for name in [*state.files, "state.json"]:
        attempt.storage.upload(folder / name, join(attempt.uri, name))
    return is_lost(attempt, attempt.uri), 1


def in_publish(attempt: Attempt) -> tuple[int, int]:
    folder, state = attempt.services.checkpoint, attempt.services.checkpoint_state
    source, target = join(attempt.uri, "source"), join(attempt.uri, "published")
    for name in [*state.files, "state.json"]:
        attempt.services.s3.upload(folder / name, join(source, name))
    attempt.switch()
    publish(attempt.storage, source, target, state)
    return is_lost(attempt, target), 1


def in_list(attempt: Attempt) -> tuple[int, int]:
    """Take a run over, and enter three checkpoints into its list, of which two stay."""
    folder, state, calm = attempt.services.checkpoint, attempt.services.checkpoint_state, attempt.services.s3
    attempt.switch()
    fence = take_over(attempt.storage, attempt.uri)
    for images in (640, 1280, 1920):
        name = checkpoint_name(images, fence.epoch)
        for file in state.files:
            calm.upload(folder / file, join(attempt.uri, name, file))
        calm.write(join(attempt.uri, name, "state.json"), replace(state, images_seen=images).to_json().encode())
        enter_checkpoint(attempt.storage, attempt.uri, Listed(fence.epoch, images, name), keep=2)
    now = CheckpointList.from_json(calm.read(join(attempt.uri, "checkpoints.json")))
    assert now is not None
    assert [(entry.epoch, entry.images_seen) for entry in now.checkpoints] == [(fence.epoch, 1280), (fence.epoch, 1920)]
    whole = {listed.name for listed, _ in complete_checkpoints(calm, attempt.uri)}
    newest, damaged = fetch_newest(attempt.storage, attempt.uri, attempt.folder / "newest")
    assert newest is not None
    assert newest.images_seen == 1920
    return len({entry.name for entry in now.checkpoints} - whole) + len(damaged), 2


def in_evaluation(attempt: Attempt) -> tuple[int, int]:
    """Read all real samples and the evaluator network, as a task of an evaluation does."""
    attempt.switch()
    dataset = read_dataset(attempt.services.dataset.uri, attempt.storage)
    read = 0
    for split in ("train", "test"):
        with opened_split(dataset, split, attempt.storage, str(attempt.folder / "cache"), 1.0) as reader:
            read += len(read_split(reader))
    evaluator = open_evaluator(stored_at(attempt.storage), dataset)
    assert evaluator.digest == attempt.services.evaluator_digest
    return PICTURES - read, PICTURES


def in_scores(attempt: Attempt) -> tuple[int, int]:
    """Record scores on the record of a published checkpoint."""
    calm, _ = tracking.open_run(str(attempt.services.state.tracking_uri), "faults", attempt.name, {})
    record_published(calm, Published("s3://ddpm/there", 640, "digest"))
    attempt.switch()
    record_scores(Tracker(attempt.proxy.url, calm.run_id), 640, {"frechet_distance": 1.5})
    (published,) = list_published(calm)
    return int(published.scores != {"frechet_distance": 1.5}), 1


def is_lost(attempt: Attempt, uri: str) -> int:
    """Whether a stored checkpoint is not the one that it should be, to the byte."""
    there = attempt.folder / "there"
    attempt.services.s3.download_folder(uri, there)
    state, tensors = load_checkpoint(there)  # checks every digest
    assert tensors
    return int(state != attempt.services.checkpoint_state)


def in_metrics(attempt: Attempt) -> tuple[int, int]:
    address = str(attempt.services.state.tracking_uri)
    calm, _ = tracking.open_run(address, "faults", attempt.name, {})
    log = RunLog({"mlflow": MlflowSink(Tracker(attempt.proxy.url, calm.run_id))}, attempt.folder / "unsent")
    for step in range(1, STEPS + 1):
        log.metrics({"train/loss": step / 8}, step)
        if step == STEPS // 8:
            attempt.switch()
            log.image("samples", np.zeros((4, 4, 1), np.uint8), step)
        time.sleep(attempt.fault.seconds / STEPS if attempt.fault.seconds else 0)
    log.flush(120 + (attempt.fault.seconds or 0))
    log.close()
    client = MlflowClient(address)
    recorded = Counter((m.step, m.value) for m in client.get_metric_history(calm.run_id, "train/loss"))
    wanted = Counter((step, step / 8) for step in range(1, STEPS + 1))
    experiment = client.get_experiment_by_name("faults")
    runs = client.search_runs([experiment.experiment_id], f"tags.`ddpm.run` = '{attempt.name}'")
    pictures = [info.path for info in client.list_artifacts(calm.run_id, "images") if info.path.endswith(".png")]
    twice_or_missing = (recorded - wanted).total() + (wanted - recorded).total()
    refused = attempt.fault.kind == "too_large"  # what is too large stays so: it is left out, and does not hold up more
    return twice_or_missing + abs(len(runs) - 1) + (0 if refused else abs(len(pictures) - 1)), STEPS + 2


def in_registration(attempt: Attempt) -> tuple[int, int]:
    name, services = attempt.name.replace("/", "-"), attempt.services
    attempt.switch()
    tracking.register(Tracker(attempt.proxy.url, services.tracker.run_id), name, services.model_id, {"scores": "{}"})
    (*there,) = tracking.versions(str(services.state.tracking_uri), name)
    assert all(version.tags == {"scores": "{}"} for version in there)
    return abs(len(there) - 1), 1


S3_PHASES: dict[str, Phase] = {
    "ingest": in_ingest,
    "check": in_check,
    "first batch": in_first_batch,
    "mid-epoch": in_mid_epoch,
    "checkpoint": in_checkpoint,
    "list": in_list,
    "publish": in_publish,
    "evaluation": in_evaluation,
}
MLFLOW_PHASES: dict[str, Phase] = {"metrics": in_metrics, "scores": in_scores, "registration": in_registration}
FAULTS = {
    "stall": (Fault("stall"), Fault("stall")),
    "reset": (Fault("reset", share=0.7), Fault("reset", share=0.7)),
    "refuse": (Fault("refuse"), Fault("refuse")),
    "short body": (Fault("short_body", share=0.7), Fault("short_body", share=0.7)),
    "trickle": (Fault("trickle"), Fault("trickle")),
    "503": (Fault("slow_down", share=0.9), Fault("unavailable")),
    "403": (Fault("denied"), Fault("forbidden")),
    # The answer to HEAD has no body that could say so; the client knows what it means if its credentials expire.
    "expired token, 401": (Fault("expired_token", methods=("GET", "PUT", "POST")), Fault("unauthorized")),
    "413": (None, Fault("too_large", path="artifacts|model-versions/create")),
}
"""For S3 and for MLflow."""


def write(pictures: Path, uri: str, storage: Storage) -> Dataset:
    return ingest(str(pictures), uri, storage, image_size=16, channels=3, shard_samples=8, workers=2).dataset


def make_checkpoint(folder: Path, dataset: Dataset) -> CheckpointState:
    """A checkpoint that is uploaded in parts."""
    torch.manual_seed(0)
    tensors = {f"ema.{name}": tensor for name, tensor in UNet(SMALL).state_dict().items()}
    tensors["network.large"] = torch.randn(5 << 20)
    spec = replace(model_spec(CONFIG, dataset, {}), network=SMALL)
    return save_checkpoint(
        folder, Checkpoint(spec, tensors, images_seen=640, identity=CONFIG.identity(), optimizer_steps=5)
    )


def log_model(tracker: Tracker, folder: Path) -> str:
    """A model of a line of code."""
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("1")
    code = folder / "code.py"
    code.write_text(
        "import mlflow\n\n\nclass Model(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n        return model_input\n\n\n"
        "mlflow.models.set_model(Model())\n"
    )
    values = np.zeros(2)
    pyfunc = tracking.Pyfunc({"model": folder / "model"}, code, (), ("mlflow",), {"value": "any"}, values, {})
    return tracking.log_pyfunc(tracker, pyfunc, 0)


def stored_at(storage: Storage) -> Config:
    """Return a configuration with this storage."""
    found = {"endpoint_url": storage.endpoint_url, "credentials_file": storage.credentials_file}
    section = CONFIG.storage.model_copy(update={**found, "region": storage.region})
    return CONFIG.model_copy(update={"storage": section})


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    home = tmp_path_factory.mktemp("home") / ".ddpm"
    try:
        state = stack.up(home, ["s3", "mlflow"])
        s3 = Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1")
        folder = tmp_path_factory.mktemp("stored")
        rng = np.random.default_rng(0)
        for number in range(PICTURES):
            path = folder / "pictures" / f"class-{number % 2}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        dataset = write(folder / "pictures", "s3://ddpm/faults/dataset", s3)
        same = write(folder / "pictures", f"file://{folder}/dataset", Storage())
        (folder / "checkpoint").mkdir()
        checkpoint_state = make_checkpoint(folder / "checkpoint", dataset)
        tracker, _ = tracking.open_run(str(state.tracking_uri), "faults", "model", {})
        model_id = log_model(tracker, tmp_path_factory.mktemp("model"))
        data = CONFIG.data.model_copy(update={"cache_dir": str(folder / "cache")})
        found = stored_at(s3)
        evaluator = open_evaluator(found.model_copy(update={"data": data}), dataset)
        checkpoint = folder / "checkpoint"
        yield Services(
            *(state, s3, folder / "pictures", dataset, same, checkpoint, checkpoint_state, tracker, model_id),
            evaluator.digest,
        )
    finally:
        stack.down(home)


@pytest.fixture(scope="module")
def table() -> Iterator[list[Cell]]:
    cells: list[Cell] = []
    yield cells
    phases = [*S3_PHASES, *MLFLOW_PHASES]
    by_place = {(cell.fault, cell.phase): cell for cell in cells}
    lines = [["lost", *phases]]
    for fault in dict.fromkeys(cell.fault for cell in cells):
        row = [by_place.get((fault, phase)) for phase in phases]
        lines.append([fault, *(f"{c.lost} of {c.of}{' *' if c.note else ''}" if c else "" for c in row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)))
    for cell in cells:
        if cell.note:
            print(f"* {cell.fault}, {cell.phase}: ended at once; called again, it lost nothing. It said: {cell.note}")
    if path := os.environ.get("DDPM_FAULT_TABLE"):
        Path(path).write_text(json.dumps([asdict(cell) for cell in cells], indent=1))


@pytest.mark.timeout(170)
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_to_a_short_fault(services, table, tmp_path, monkeypatch, name):
    # A server that sends nothing for longer than a test is noticed sooner than in a run.
    monkeypatch.setattr(s3, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(run_log, "RETRY_S", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    assert_nothing_is_lost(services, table, tmp_path, name, OUTAGE_S)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_to_a_long_fault(services, table, tmp_path, name):
    assert_nothing_is_lost(services, table, tmp_path, f"{name}", 120)


def assert_nothing_is_lost(services: Services, table: list[Cell], tmp_path: Path, name: str, outage_s: float) -> None:
    """Every phase at the same time, each through a proxy of its own."""
    of_s3, of_mlflow = FAULTS[name]
    work: list[tuple[str, Phase, Fault, str]] = []
    if of_s3 is not None:
        work += [(phase, call, of_s3, str(services.state.s3_endpoint)) for phase, call in S3_PHASES.items()]
    work += [(phase, call, of_mlflow, str(services.state.tracking_uri)) for phase, call in MLFLOW_PHASES.items()]
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [
            pool.submit(
                disturb, services, tmp_path, name, phase, call, replace(fault, seconds=outage_s, waits=True), target
            )
            for phase, call, fault, target in work
        ]
    failures = []
    for (phase, *_), future in zip(work, futures, strict=True):
        error = future.exception()
        if error is None:
            table.append(future.result())
        else:
            failures.append(f"{phase}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    assert [(cell.phase, cell.lost) for cell in table if cell.fault == name and cell.lost] == []


def disturb(services: Services, tmp_path: Path, name: str, phase: str, call: Phase, fault: Fault, target: str) -> Cell:
    place = f"{name}-{phase}".replace(" ", "_").replace(",", "")
    (tmp_path / place).mkdir()
    began, note = time.monotonic(), ""
    with FaultProxy(target, seed=int(hashlib.sha256(place.encode()).hexdigest()[:8], 16)) as proxy:
        attempt = Attempt(place, services, proxy, fault, tmp_path / place)
        try:
            lost, of = call(attempt)
        except PipelineError as error:
            if fault.kind not in (*FINAL, "too_large"):
                raise
            note = str(error)
            assert attempt.active is not None
            assert time.monotonic() < attempt.active.ends + 1, f"it took a whole outage to say: {note}"
            proxy.stop()
            lost, of = call(attempt)
        assert attempt.active is not None
        assert attempt.active.hits, f"the fault met no request of {phase}"
    return Cell(name, phase, len(attempt.active.hits), lost, of, round(time.monotonic() - began, 1), note)
