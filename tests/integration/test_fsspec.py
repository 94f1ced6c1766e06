"""The whole way on stores that only fsspec opens: every stage, two Ray workers, a stop and a resume."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from pipelines.storage import Storage
from tests.gcs import gcs_emulator
from tests.integration.conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RUN = [
    "+experiment=digits",
    "optim.decay=constant",
    "checkpoint.every=1280",
    "tracking.log_every=640",
    "tracking.grid_every=null",
    "tracking.sinks=[mlflow,jsonl]",
    "sampler.steps=5",
    "cluster.num_workers=2",
    "cluster.cpus_per_worker=1",
    "storage=file",
]


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path, monkeypatch) -> Iterator[str]:
    if request.param == "local":
        yield f"local://{tmp_path}/store"
        return
    with gcs_emulator() as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        yield "gs://ddpm/store"


def test_the_flow_stops_resumes_and_registers(shell: Shell, local_stack, root):
    name, storage = f"through-{root[:2]}", Storage()
    # The workers' node was started before: they are told where the store is.
    shell = replace(shell, environment=shell.environment | storage.environment())
    run = [*RUN, f"storage.root={root}", f"name={name}"]
    shell.ok("ingest", "digits", "--to", f"{root}/datasets/digits")
    stopped = stop_after_some_steps(shell, "train", *run, "images=1000000", "--json")

    more = stopped["images_seen"] + 1280
    flow = shell.ok("flow", *run, f"images={more}", "--json")
    assert f"resuming run '{name}' at {stopped['images_seen']:,}" in flow.err
    assert flow.answer["skipped"] == ["ingest"]
    assert flow.answer["run_id"] == stopped["run_id"]

    names = {entry.uri.removeprefix(f"{root}/") for entry in storage.list(root)}
    folder = f"runs/{name}"
    assert {"datasets/digits/dataset.json", f"{folder}/checkpoints.json"} <= names
    assert any(n.startswith(f"{folder}/published/{more:012d}-e2-") and n.endswith("/state.json") for n in names)
    assert any(n.startswith("datasets/digits/evaluator/") for n in names)
    assert len({n.split("/")[2] for n in names if n.startswith(f"{folder}/checkpoint_")}) == 2
    assert not {n for n in names if n.rpartition("/")[2].startswith(".")}

    points = [json.loads(line) for line in storage.read(f"{root}/{folder}/metrics.jsonl").splitlines()]
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    recorded = client.get_metric_history(stopped["run_id"], "train/loss")
    assert [(p["step"], p["train/loss"]) for p in points if "train/loss" in p] == [(m.step, m.value) for m in recorded]
    assert len({m.step for m in recorded}) == len(recorded) > 2
    assert client.get_model_version_by_alias(name, "candidate").run_id == stopped["run_id"]
    assert f"registry/{name}/champion/000000.json" in names  # what the gate decided, whatever that was

    again = shell.ok("flow", *run, f"images={more}", "--json")
    gate = ["gate"] if flow.answer["gate"]["passed"] else []
    assert again.answer["skipped"] == ["ingest", "train", "evaluator", "evaluate", "register", *gate]
    drawn = shell.ok("sample", f"runs:/{stopped['run_id']}", *run[-3:-1], "--labels", "3", "--out", "x", "--json")
    assert len(drawn.answer["files"]) == 2


def stop_after_some_steps(shell: Shell, *command: str) -> dict:
    """Start a training and press Ctrl-C when it has seen some images; its answer."""
    process = shell.start(*command)
    assert process.stderr is not None
    deadline, said = time.monotonic() + 120, ""
    while not re.search(r"[1-9][\d,]* images, [\d,]+/s", said):
        said = process.stderr.readline()
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-3000:]
    stopped = json.loads(out.strip().splitlines()[-1])
    assert stopped["status"] == "stopped"
    assert stopped["images_seen"] > 0
    return stopped
