"""RayJobs through kubectl, which is a script here: it records its calls and answers with the states of a job's life."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.config import ConfigError
from pipelines.launch import LaunchError
from pipelines.launch.kubectl import JobState, Kubectl, apply, follow, stop
from tests.pipelines.launch.rendered import KUBERAY, TRAIN, command, job

SCRIPT = """#!{python}
import json, sys
from pathlib import Path
folder = Path({folder!r})
words = [word for word in sys.argv[1:] if not word.startswith("--namespace=")]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if words[0] == "get":
    states = json.loads((folder / "states").read_text())
    state = states.pop(0) if len(states) > 1 else states[0]
    (folder / "states").write_text(json.dumps(states))
    made = {{"metadata": {{"name": words[1].split("/")[1]}}, "status": state, "spec": {{"entrypoint": {entrypoint!r}}}}}
    print("" if state is None else json.dumps(made))
elif words[0] == "apply":
    (folder / "applied").write_text(sys.stdin.read())
    print("rayjob.ray.io/first created")
elif words[0] == "logs":
    print("what the command prints", flush=True)
elif words[0] == "exec" and (folder / "broken").exists():
    sys.exit("error: the pod is gone")
"""
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": "first-abc"}
RUNNING |= {"rayClusterStatus": {"head": {"podName": "first-head"}}}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit code 1"}


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answers(self, *states):
        (self.folder / "states").write_text(json.dumps(states))

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self):
        return [next(word for word in call if not word.startswith("--")) for call in self.calls()]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "kubectl"
    script.parent.mkdir()
    script.write_text(
        SCRIPT.format(python=sys.executable, folder=str(tmp_path), entrypoint=job()["spec"]["entrypoint"])
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return Cluster(tmp_path)


@pytest.fixture
def said():
    return []


@pytest.fixture
def notice(said):
    return lambda name, text: said.append(text)


def training():
    return command("kuberay", *TRAIN, *KUBERAY, "launch.namespace=team")


def test_a_new_command_is_applied_in_its_namespace(cluster, notice):
    cluster.answers(None)
    apply(training(), notice)
    assert cluster.verbs() == ["get", "apply"]
    assert all(call[0] == "--namespace=team" for call in cluster.calls())
    assert yaml.safe_load((cluster.folder / "applied").read_text()) == job("launch.namespace=team")


def test_a_command_that_runs_already_is_left_alone(cluster, notice, said):
    cluster.answers(RUNNING)
    apply(training(), notice)
    assert cluster.verbs() == ["get"]
    assert "already exists (Running running): following it" in said[0]


def test_another_command_under_the_name_of_one_that_runs_is_refused(cluster, notice):
    cluster.answers(RUNNING)
    other = command("kuberay", *TRAIN, *KUBERAY, "launch.namespace=team", "images=64")
    with pytest.raises(LaunchError, match=r"RayJob first already runs another command: `ddpm train .*--stop first"):
        apply(other, notice)
    assert cluster.verbs() == ["get"]


def test_one_that_has_ended_is_replaced_so_that_its_run_resumes(cluster, notice, said):
    cluster.answers(FAILED)
    apply(training(), notice)
    assert cluster.verbs() == ["get", "delete", "apply"]
    assert "has ended (Failed failed: AppFailed exit code 1): a new one resumes its run" in said[0]


INVALID = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "the name is too long"}


def test_a_job_that_kuberay_refuses_has_ended(cluster, notice, said):
    cluster.answers(INVALID)
    state = follow(Kubectl("team"), "first", notice, lambda seconds: pytest.fail("it is followed on"))
    assert state is not None
    assert (state.ended, state.ok) == (True, False)
    assert said == ["ValidationFailed: ValidationFailed the name is too long"]
    apply(training(), notice)
    assert cluster.verbs() == ["get", "get", "delete", "apply"]


def test_a_call_that_does_not_end_is_given_up(cluster):
    script = cluster.folder / "bin" / "kubectl"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(LaunchError, match=r"get rayjob/first has not ended within 0 s: does `kubectl cluster-info`"):
        Kubectl("team")("get", "rayjob/first", timeout_s=0.2)


def test_following_shows_states_and_output_until_the_end(cluster, notice, said, capfd):
    initializing = {"jobDeploymentStatus": "Initializing"}
    cluster.answers(initializing, initializing, RUNNING, DONE | {"failed": 1})
    slept = []
    state = follow(Kubectl("team"), "first", notice, slept.append)
    assert state is not None
    assert state.ok
    assert said == ["Initializing", "Running running", "Complete succeeded, after 1 failed attempt"]
    assert "what the command prints" in capfd.readouterr().out
    assert len(slept) == 3


def test_a_failure_is_returned_with_its_reason(cluster, notice):
    cluster.answers(FAILED)
    state = follow(Kubectl("team"), "first", notice)
    assert state is not None
    assert not state.ok
    assert str(state) == "Failed failed: AppFailed exit code 1"


def test_ctrl_c_detaches(cluster, notice, said):
    cluster.answers(RUNNING)

    def interrupt(seconds):
        raise KeyboardInterrupt

    assert follow(Kubectl("team"), "first", notice, interrupt) is None
    assert said[-1] == "detached; RayJob first keeps running; the same command follows it again"
    assert "delete" not in cluster.verbs()


def test_a_rayjob_that_is_gone_cannot_be_followed(cluster, notice):
    cluster.answers(None)
    with pytest.raises(LaunchError, match="RayJob first no longer exists"):
        follow(Kubectl("team"), "first", notice)


def test_stopping_asks_the_command_first_and_then_takes_the_cluster_away(cluster, notice):
    cluster.answers(RUNNING)
    stop(Kubectl("team"), "first", notice)
    assert cluster.verbs() == ["get", "exec", "delete"]
    assert cluster.calls()[1][1:] == [
        "exec",
        "first-head",
        "--container=ray-head",
        "--",
        "ray",
        "job",
        "stop",
        "first-abc",
    ]


def test_a_head_that_is_lost_is_taken_away_all_the_same(cluster, notice, said):
    cluster.answers(RUNNING)
    (cluster.folder / "broken").touch()
    stop(Kubectl("team"), "first", notice)
    assert cluster.verbs() == ["get", "exec", "delete"]
    assert any("will resume from its newest checkpoint" in text and "the pod is gone" in text for text in said)


def test_stopping_a_missing_job_says_so(cluster, notice):
    cluster.answers(None)
    with pytest.raises(LaunchError, match="there is no RayJob first in this namespace"):
        stop(Kubectl("team"), "first", notice)


def test_without_kubectl_nothing_is_tried(monkeypatch, tmp_path, notice):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="kubectl is not installed here"):
        apply(training(), notice)


def test_a_new_rayjob_has_no_status_yet():
    state = JobState.of({"metadata": {"name": "x"}})
    assert (str(state), state.ended) == ("New", False)
