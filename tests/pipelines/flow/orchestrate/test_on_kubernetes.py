"""A stage as a RayJob: started where its result is not there, then looked for, and stopped where Dagster cancels it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest

from pipelines.config import ConfigError, compose
from pipelines.flow import StageStatus
from pipelines.flow.judge import Promote
from pipelines.flow.orchestrate import on_kubernetes
from pipelines.flow.orchestrate.on_kubernetes import command_of, launch_stage, walk_on_kubernetes
from pipelines.flow.stage import REGISTER
from pipelines.launch import LaunchError, kubectl
from pipelines.launch.kubectl import JobState
from pipelines.registry import Verdict
from pipelines.tracking import ModelVersion
from tests.pipelines.flow.test_walk import World, Written

PLACES = ["storage=s3", "storage.root=s3://b", "tracking.uri=http://mlflow.x.svc:5000"]
OVERRIDES = ["+experiment=digits", *PLACES]
LAUNCH = ["launch.image=i", "launch.s3_secret=s"]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def jobs(world, monkeypatch):
    """Names of the stages that were launched; a job does what the stage would do."""
    launched = []

    def launch(command, notice):
        stage = command.arguments[1]
        launched.append(stage)
        world.walk(stage, stage)

    monkeypatch.setattr(on_kubernetes, "launch_stage", launch)
    return launched


def renamed(overrides, name):
    """The configuration of these overrides for a run of another name."""
    return compose(overrides).model_copy(update={"name": name})


def walked(world, stage):
    return walk_on_kubernetes(world.stages, world.site, stage, OVERRIDES, LAUNCH)


def test_a_job_runs_where_the_result_is_not_there_and_none_where_it_is(world, jobs):
    made = walked(world, "ingest")
    assert (jobs, made.ran, made.skipped) == (["ingest"], ("ingest",), {})
    again = walked(world, "ingest")
    assert (jobs, again.ran, again.skipped) == (["ingest"], (), {"ingest": "there it is"})
    assert (again.results, again.inputs) == (made.results, made.inputs)
    with pytest.raises(ConfigError, match="the result of train, which comes before, is not there"):
        walked(world, "evaluate")
    assert jobs == ["ingest"]


def test_a_job_that_leaves_nothing_is_an_error(world, monkeypatch):
    monkeypatch.setattr(on_kubernetes, "launch_stage", lambda command, notice: None)
    with pytest.raises(LaunchError, match="the RayJob of ingest has ended, and its result is not there"):
        walked(world, "ingest")


def test_a_version_that_the_gate_has_refused_there_is_told_by_the_gates_log(world, jobs, monkeypatch):
    version = ModelVersion("m", "2", "r", {}, ())

    @dataclass(frozen=True)
    class Registered(Written):
        def done(self, site, given, inputs):
            return StageStatus(version, "there")

    @dataclass(frozen=True)
    class Refusing(Promote):
        def done(self, site, given, inputs):
            return StageStatus(None, "not there")

        def gate(self, site):
            return SimpleNamespace(log=SimpleNamespace(read=lambda: said))

    said = [Verdict(False, "worse", "m", "champion", number) for number in ("2", "1")]
    world.walk()
    *before, _, gate = world.stages
    stages = (*before, Registered(REGISTER, gate.config), Refusing(gate.config))
    monkeypatch.setattr(on_kubernetes, "launch_stage", lambda command, notice: None)
    found = walk_on_kubernetes(stages, world.site, "gate", OVERRIDES, LAUNCH)
    assert (found.results.champion, found.ran) == (said[0], ("gate",))
    said.pop(0)
    with pytest.raises(LaunchError, match="its log has no decision about models:/m/2"):
        walk_on_kubernetes(stages, world.site, "gate", OVERRIDES, LAUNCH)


def test_the_job_of_a_stage_is_the_flow_from_it_until_it_of_the_runs_name():
    overrides = [*OVERRIDES, "images=640"]
    command = command_of("train", overrides, LAUNCH, renamed(overrides, "digits-12345678"))
    assert command.verb == "flow"
    assert command.arguments[:4] == ("--from", "train", "--until", "train")
    assert "images=640" in command.arguments
    assert not [word for word in command.arguments if word.startswith("launch")]
    assert command.config.name == "digits-12345678"
    assert command.config.launch.image == "i"


def test_a_run_of_changed_data_has_the_dataset_and_the_registered_model_of_its_experiment():
    source = ["data.source=s3://b/incoming/pets", "data.num_classes=3"]
    overrides = ["+experiment=folder32", "name=pets", *source, *PLACES]
    wanted = renamed(overrides, "pets-12345678")
    assert (wanted.data.uri, wanted.registry.model) == ("s3://b/datasets/pets", "pets")
    command = command_of("register", overrides, LAUNCH, wanted)
    elsewhere = {"tracking": {"uri"}}  # reaches the pods as a variable
    assert compose(command.arguments[4:]).model_dump(exclude=elsewhere) == wanted.model_dump(exclude=elsewhere)


@pytest.mark.parametrize(
    "state, message",
    [
        (JobState("digits-flow", "Failed", "FAILED", "no node"), "digits-flow has failed: Failed failed: no node"),
        (None, "digits-flow was stopped; the next run of this stage resumes it"),
        (JobState("digits-flow", "Complete", "SUCCEEDED"), None),
    ],
)
def test_a_job_that_fails_is_an_error_and_one_that_dagster_cancels_is_stopped(monkeypatch, state, message):
    called = []

    def call(name, answer, *arguments):
        called.append(name)
        return answer

    for name, answer in {"apply": None, "follow": state, "stop": None}.items():
        monkeypatch.setattr(kubectl, name, partial(call, name, answer))
    monkeypatch.setattr(kubectl, "kubectl_of", lambda command: None)
    command = command_of("train", OVERRIDES, LAUNCH, compose(OVERRIDES))
    if message is None:
        launch_stage(command, lambda name, text: None)
    else:
        with pytest.raises(LaunchError, match=message):
            launch_stage(command, lambda name, text: None)
    assert called == ["apply", "follow", *(["stop"] if state is None else [])]
