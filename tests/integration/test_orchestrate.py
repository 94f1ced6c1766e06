"""Dagster beside the local stack, and the stages as assets on the real services: made once, then skipped by digest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from mlflow import MlflowClient

from pipelines import stack
from pipelines.flow import GRAPH
from pipelines.flow.orchestrate.settings import OrchestrateSettings
from tests.integration.conftest import Shell
from tests.integration.workers import forked
from tests.networks import TINY_UNET
from tests.processes import family, kill

dg = pytest.importorskip("dagster", reason="comes with the extra orchestrate")

pytestmark = pytest.mark.integration

SHORT = (
    "+experiment=digits",
    "name=assets",
    *TINY_UNET,
    "cluster.num_workers=1",
    "images=1280",
    "sampler.steps=4",
    "evaluation.n=90",
    "evaluation.evaluator_passes=5",
    "evaluation.seeds=1",
    "evaluation.likelihood_images=0",
    "tracking.grid_images=10",
)


QUERY = """{
  repositoryOrError(repositorySelector: {
    repositoryName: "__repository__", repositoryLocationName: "pipelines.flow.orchestrate.definitions"
  }) { ... on Repository {
    assetNodes { assetKey { path } partitionKeys } sensors { name sensorState { status } } schedules { name }
  } }
  instance { daemonHealth { allDaemonStatuses { healthy } } runQueueConfig { tagConcurrencyLimitsYaml }
    poolConfig { poolGranularity defaultPoolLimit } }
}"""


def asked(url: str) -> dict:
    return requests.post(f"{url}/graphql", json={"query": QUERY}, timeout=30).json()["data"]


def test_webserver_and_daemon_serve_the_assets_on_loopback_and_end_together(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    home = tmp_path / ".ddpm"
    try:
        stack.up(home, services=stack.ORCHESTRATOR)
        services = {service.name: service for service in stack.status(home) if service.running}
        assert sorted(services) == sorted(stack.ORCHESTRATOR)
        url = services["dagster"].url
        deadline = time.monotonic() + 40
        while not all(daemon["healthy"] for daemon in asked(url)["instance"]["daemonHealth"]["allDaemonStatuses"]):
            assert time.monotonic() < deadline
            time.sleep(1)
        found = asked(url)
        assets = {
            node["assetKey"]["path"][0]: node["partitionKeys"] for node in found["repositoryOrError"]["assetNodes"]
        }
        assert assets == {place.gives: list(OrchestrateSettings().partitions) for place in GRAPH}
        assert found["repositoryOrError"]["sensors"] == [{"name": "new_data", "sensorState": {"status": "STOPPED"}}]
        assert found["repositoryOrError"]["schedules"] == [{"name": "retrain"}]
        assert "dagster/partition" in found["instance"]["runQueueConfig"]["tagConcurrencyLimitsYaml"]
        assert found["instance"]["poolConfig"] == {"poolGranularity": "run", "defaultPoolLimit": 1}
        members = [psutil.Process(service.pid) for service in services.values()]
        members += [child for member in members for child in member.children(recursive=True)]
        listening = [c.laddr.ip for p in members for c in p.net_connections("inet") if c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
    finally:
        stopped = stack.down(home)
    assert stopped == list(reversed(stack.ORCHESTRATOR))
    psutil.wait_procs(members, timeout=10)
    assert not [member for member in members if member.is_running()]


def test_the_digits_graph_is_materialised_once_and_then_skipped(shell: Shell, local_stack, forks, monkeypatch):
    from pipelines.flow.orchestrate import definitions
    from pipelines.flow.orchestrate.definitions import JOB, make_definitions

    child = definitions.CHILD
    command, variables = forked(forks, child[-1])
    monkeypatch.setattr(definitions, "CHILD", command)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("DDPM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, shell.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    job = make_definitions(OrchestrateSettings(partitions={"short": SHORT}, retries=0)).resolve_job_def(JOB)
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    found = []
    for _ in range(2):
        result = job.execute_in_process(partition_key="short", raise_on_error=False)
        events = result.get_asset_materialization_events()
        found.append({event.asset_key.to_user_string(): event.materialization.metadata for event in events})
        (check,) = result.get_asset_check_evaluations()
        # A model of 1,280 images may be refused as noise: then that is what the check says, and there is no champion.
        assert result.success == check.passed == ("champion" in found[-1])
        judged = "| signature |" in check.metadata["table"].value
        assert judged or check.metadata["reason"].value == "the alias champion is there already"
    made, again = found
    assert {"dataset", "run", "evaluation", "version"} <= made.keys()
    (run,) = [
        r
        for r in client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
        if r.info.run_name == "assets"
    ]
    assert made["run"]["run_id"].value == run.info.run_id
    assert run.info.run_id in made["run"]["mlflow"].value
    assert made["run"]["skipped"].value is False
    assert made["evaluation"]["scores/frechet_distance"].value > 0
    (version,) = client.search_model_versions("name = 'assets'")
    assert made["version"]["version"].value == str(version.version)
    assert made["version"]["served_digest"].value == version.tags["served_digest"]
    for asset in ("dataset", "run", "evaluation", "version"):
        assert again[asset]["skipped"].value is True
        assert again[asset]["why"].value.startswith("skipped: ")
        assert again[asset]["inputs"].value == made[asset]["inputs"].value

    # A stage is a process of its own, which imports what it needs by itself.
    monkeypatch.setattr(definitions, "CHILD", child)
    alone = job.execute_in_process(partition_key="short", asset_selection=[dg.AssetKey("dataset")])
    (event,) = alone.get_asset_materialization_events()
    assert event.materialization.metadata["skipped"].value is True
    assert event.materialization.metadata["inputs"].value == made["dataset"]["inputs"].value


LAUNCH = """mutation($selector: JobOrPipelineSelector!, $tags: [ExecutionTag!]) {
  launchRun(executionParams: {selector: $selector, executionMetadata: {tags: $tags}}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  }
}"""
RUNS = "{ runsOrError { ... on Runs { results { runId status parentRunId tags { key value } } } } }"
MANY = 12_800


def until(true: Callable[[], Any], timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(0.2)
    return found


def posted(url: str, query: str, **variables: Any) -> dict[str, Any]:
    answer = requests.post(f"{url}/graphql", json={"query": query, "variables": variables}, timeout=60).json()
    assert "errors" not in answer, answer
    return answer["data"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_daemon_that_is_killed_in_a_training_goes_on_with_it_and_what_it_has_made_is_skipped_afterwards(
    shell: Shell, local_stack, s3, monkeypatch
):
    from pipelines.flow.orchestrate.definitions import JOB, make_definitions

    home = local_stack.home
    monkeypatch.setenv("DDPM_HOME", shell.environment["DDPM_HOME"])
    overrides = [*SHORT, "name=restarted", f"images={MANY}", "checkpoint.every=1280", "registry.model=restarted"]
    (home / "orchestrate.yaml").write_text(yaml.safe_dump({"partitions": {"short": overrides}, "retry_delay_s": 1}))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("XDG_CACHE_HOME", shell.environment["XDG_CACHE_HOME"])
    try:
        stack.up(home, services=stack.ORCHESTRATOR)
        pids = {service.name: service.pid for service in stack.status(home) if service.running}
        (url,) = [service.url for service in stack.status(home) if service.name == "dagster"]
        location = "pipelines.flow.orchestrate.definitions"
        selector = {"repositoryLocationName": location, "repositoryName": "__repository__", "jobName": "flow"}
        tags = [{"key": "dagster/partition", "value": "short"}]
        launched = posted(url, LAUNCH, selector=selector, tags=tags)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        until(lambda: any("/state.json" in entry.uri for entry in s3.list("s3://ddpm/runs/restarted")), 900)
        kill(family(pids["dagster-daemon"]))  # and with it what has started the run, the run, and its stage
        stack.up(home, services=stack.ORCHESTRATOR)

        def ended() -> list[dict[str, Any]] | None:
            runs = posted(url, RUNS)["runsOrError"]["results"]
            return runs if len(runs) > 1 and runs[0]["status"] in ("SUCCESS", "FAILURE") else None

        again, first = until(ended, 1800)
        assert first["runId"] == launched["run"]["runId"] == again["parentRunId"]
        assert first["status"] == "FAILURE"
    finally:
        for service in stack.status(home):  # the rest of the stack is for the tests that come after
            if service.name in stack.ORCHESTRATOR and service.pid is not None:
                kill(family(service.pid))
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    (run,) = client.search_runs([experiment], "tags.`ddpm.run` = 'restarted'")
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    assert steps[-1] == MANY
    (version,) = client.search_model_versions("name = 'restarted'")
    assert version.run_id == run.info.run_id
    # What the gate says of so short a training is its own affair; the run has failed where it has refused.
    assert (again["status"] == "SUCCESS") == ("champion" in client.get_registered_model("restarted").aliases)

    # By digest: what another run of the same graph finds, which knows nothing of that daemon, is not made again.
    job = make_definitions(OrchestrateSettings(partitions={"short": tuple(overrides)}, retries=0)).resolve_job_def(JOB)
    result = job.execute_in_process(partition_key="short", raise_on_error=False)
    found = {
        e.asset_key.to_user_string(): e.materialization.metadata for e in result.get_asset_materialization_events()
    }
    for asset in ("dataset", "run", "evaluation", "version"):
        assert found[asset]["skipped"].value is True
        assert found[asset]["why"].value.startswith("skipped: ")
    assert found["run"]["run_id"].value == run.info.run_id
    assert found["version"]["version"].value == str(version.version)
    assert found["version"]["served_digest"].value == version.tags["served_digest"]
    (check,) = result.get_asset_check_evaluations()
    assert result.success == check.passed == ("champion" in found)
    assert len(client.search_runs([experiment], "tags.`ddpm.run` = 'restarted'")) == 1
