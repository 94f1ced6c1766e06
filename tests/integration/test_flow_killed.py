"""The driver of a flow is killed at any moment and started again: what had finished stays, and all is there once."""

from __future__ import annotations

import os
import random
import re
import time
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines import stack
from pipelines.flow import GRAPH
from pipelines.storage import Storage
from pipelines.training.goodput import measure
from pipelines.training.ledger import read_sessions
from tests.integration.conftest import Finished, Shell
from tests.networks import TINY_UNET
from tests.processes import ray_train_workers

pytestmark = pytest.mark.integration

EVERY = 384
SETTINGS = [
    "+experiment=digits", *TINY_UNET,
    "batch_size=128", "images=1920", "optim.warmup_images=0", f"checkpoint.every={EVERY}", "tracking.log_every=128",
    "tracking.grid_every=1920", "tracking.grid_images=10", "cluster.num_workers=1", "sampler.steps=2",
    "evaluation.n=90", "evaluation.seeds=1", "evaluation.likelihood_images=4", "evaluation.evaluator_passes=10",
    "registry.n=90",
]  # fmt: skip
NAMES = [place.name for place in GRAPH]
LONGEST_S = 4.0
"""The evaluator, of ten passes, is trained in a quarter of that."""


def settings(name: str) -> list[str]:
    """Those of a flow that shares nothing with another one: its dataset, run and registered model are its own."""
    return [*SETTINGS, f"name={name}", f"data.uri=s3://ddpm/datasets/{name}", f"registry.model={name}"]


@pytest.fixture(scope="module")
def calm(shell: Shell) -> Finished:
    return ended(shell, "calm")


def test_the_evaluator_is_trained_beside_one_worker_where_there_are_two_cores(calm):
    assert ("evaluator  beside train" in calm.err) == ((os.cpu_count() or 1) > 1)
    assert "training the evaluator (classifier)" in calm.err


@pytest.mark.parametrize("kills, seed", [(2, 1), pytest.param(5, 0, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_a_flow_that_was_killed_ends_as_an_undisturbed_one(calm, shell, local_stack, s3, kills, seed):
    rng, name = random.Random(seed), f"killed{kills}"
    drawn = sorted((rng.randrange(len(NAMES)), rng.uniform(0, LONGEST_S)) for _ in range(kills))
    points = [(stage, after_s / 4 if NAMES[stage] == "evaluator" else after_s) for stage, after_s in drawn]
    said = [killed(shell, name, NAMES[stage], after_s) for stage, after_s in points]
    last = ended(shell, name)

    # At most what a stage had not finished is done twice: those before it are skipped by every later start.
    finished: set[str] = set()
    for start in (*said, last.err.splitlines()):
        begun = worked_on(start)
        assert not finished & begun, start
        finished |= {place.name for place in GRAPH if any(place.gives in needed(name) for name in begun)}
    goodput = measure(read_sessions(s3, f"s3://ddpm/runs/{name}"))
    assert goodput.recomputed_images <= kills * EVERY
    assert goodput.sessions <= 1 + kills

    disturbed, undisturbed = (state(local_stack.tracking_uri, s3, each) for each in (name, "calm"))
    for what, there in undisturbed.items():
        assert disturbed[what] == there, differences(what, disturbed[what], there)
    assert numbers(last.answer["scores"]) == pytest.approx(numbers(calm.answer["scores"]), rel=1e-4)
    assert last.answer["gate"]["passed"] == calm.answer["gate"]["passed"]
    (ray,) = [service.pid for service in stack.status(local_stack.home) if service.name == "ray"]
    assert ray is not None
    assert not ray_train_workers(ray)


def ended(shell: Shell, name: str) -> Finished:
    """Run a flow to its end."""
    done = shell("flow", *settings(name), "--json", timeout=1200)
    assert done.code == 0, done.err[-3000:]
    print(f"{name} has ended, it had said:", done.err, sep="\n", flush=True)
    return done


def killed(shell: Shell, name: str, stage: str, after_s: float) -> list[str]:
    """Start a flow and SIGKILL it some seconds after a stage has begun, or a later one; return the lines that it said.

    A flow that ends before that is not killed.
    """
    process = shell.start("flow", *settings(name))
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line.rstrip())
        if worked_on([line]) & set(NAMES[NAMES.index(stage) :]):
            break
    time.sleep(after_s)
    process.kill()
    said += process.communicate()[1].splitlines()
    print(f"killed {after_s:.1f} s into {stage}, it had said:", *said, sep="\n  ", flush=True)
    return said


def worked_on(said: list[str]) -> set[str]:
    """Return the stages that lines of a flow say something of, besides that they are skipped."""
    lines = [line.strip().partition("  ") for line in said]
    return {at for at, _, text in lines if at in NAMES and not text.startswith("skipped")}


def differences(what: str, one: Any, other: Any) -> str:
    """Return what one flow has and the other has not, which pytest would cut short."""
    only = [[item for item in here if item not in there] for here, there in ((one, other), (other, one))]
    return f"{what}: only the disturbed flow has {only[0]}, only the undisturbed one has {only[1]}"


def needed(name: str) -> set[str]:
    """Return the results that a stage needs, and those that were needed for these."""
    (place,) = [place for place in GRAPH if place.name == name]
    before = [other.name for other in GRAPH if other.gives in place.needs]
    return set(place.needs).union(*map(needed, before))


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in scores["estimates"].items()}


def state(uri: str, s3: Storage, name: str) -> dict[str, Any]:
    """Return what MLflow, the registry and S3 hold of a flow, without what differs between any two flows."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    runs = client.search_runs([experiment], f"tags.`ddpm.run` = '{name}'")
    run = runs[0]
    trace = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss"))
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.info.run_id}'")
    versions = client.search_model_versions(f"name = '{name}'")
    aliases = client.get_registered_model(name).aliases
    digest = re.compile(r"-e\d+-\w+|[0-9a-f]{16,}|-\d{3,}")
    below = [f"s3://ddpm/runs/{name}", f"s3://ddpm/datasets/{name}"]
    stored = [entry.uri.replace(f"/{name}/", "/NAME/") for folder in below for entry in s3.list(folder)]
    # Each driver has a ledger, and the workers of each have logs, of their own. What MLflow had not got yet when a
    # checkpoint was written lies in it.
    kept = [uri for uri in stored if not re.search(r"/(goodput|logs)/|/unsent\.zip$", uri)]
    return {
        "runs": [run.info.status for run in runs],
        "losses": trace,
        "artifacts": sorted(digest.sub("", f.path) for f in client.list_artifacts(run.info.run_id)),
        "logged models": sorted(model.name for model in models),
        "versions": [(str(v.version), v.status) for v in versions],
        "aliases": {alias: str(number) for alias, number in aliases.items()},
        "stored": sorted(digest.sub("", uri) for uri in kept),
    }
