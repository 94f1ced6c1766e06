"""A stage as a RayJob on Kubernetes, for a Dagster that runs there without its own Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.config import Config, compose, quoted_override
from pipelines.flow.stage import GATE
from pipelines.flow.walk import FlowResult, preview, walk
from pipelines.launch import LaunchError, kubectl, overrides_of, parse_command, with_addresses
from pipelines.launch.command import ClusterCommand
from pipelines.presentation.progress import StageNotice

if TYPE_CHECKING:
    from pipelines.flow.stage import Site, Stage


def command_of(stage: str, overrides: Sequence[str], launch: Sequence[str], config: Config) -> ClusterCommand:
    """Return the command with which a cluster makes the result of one stage.

    Args:
        stage: its name.
        overrides: of the configuration.
        launch: overrides of the launch, such as `launch.image=…`.
        config: that of the overrides, whose run may have another name; see `pipelines.flow.train`.

    Raises:
        ConfigError: the settings do not fit each other.
    """
    # Both would follow the run's name into another dataset and another registered model.
    stay = [quoted_override("data.uri", config.data.uri), quoted_override("registry.model", config.registry.model)]
    words = ["flow", "--from", stage, "--until", stage, *overrides, f"name={config.name}", *stay, *launch]
    launched = with_addresses(compose(["launch=kuberay", *overrides_of(words)]), os.environ)
    return parse_command(words, launched)


def launch_stage(command: ClusterCommand, notice: StageNotice) -> None:
    """Start a command as a RayJob, or find the running one of its name, and follow it to its end.

    If this process is terminated, the job is stopped; a training writes a checkpoint.

    Raises:
        ConfigError, LaunchError: it cannot be started, has failed, or was stopped.
    """
    kubectl.apply(command, notice)
    state = kubectl.follow(kubectl.kubectl_of(command), command.object_name, notice)
    if state is None:
        kubectl.stop(kubectl.kubectl_of(command), command.object_name, notice)
        raise LaunchError(f"RayJob {command.object_name} was stopped; the next run of this stage resumes it")
    if not state.ok:
        raise LaunchError(f"RayJob {command.object_name} has failed: {state}")


def walk_on_kubernetes(
    stages: Sequence[Stage[Any]], site: Site, stage: str, overrides: Sequence[str], launch: Sequence[str]
) -> FlowResult:
    """Run one stage like `walk`, as a RayJob unless its result exists.

    Raises:
        PipelineError: as `walk`; or the job has failed.
    """
    config: Config = stages[0].config
    (looked,) = preview(stages, site, stage, stage)
    if not looked.runs:
        return walk(stages, site, stage, stage)
    launch_stage(command_of(stage, overrides, launch, config), site.display.stage)
    (made,) = preview(stages, site, stage, stage)
    if not made.runs:
        return replace(walk(stages, site, stage, stage), skipped={}, ran=(stage,))
    if stage != GATE.name:
        raise LaunchError(f"the RayJob of {stage} has ended, and its result is not there: {made.reason}")
    return _refused(stages, site, looked.inputs)


def _refused(stages: Sequence[Stage[Any]], site: Site, inputs: Any) -> FlowResult:
    """Return the result of a gate that has refused a version, as its log has it."""
    from pipelines.flow.judge import Promote

    before = walk(stages[:-1], site, stages[-2].name, stages[-2].name)
    gate, version = stages[-1], before.results.version
    assert isinstance(gate, Promote)
    assert version is not None
    said = [verdict for verdict in gate.gate(site).log.read() if verdict.version == version.version]
    if not said:
        raise LaunchError(f"the RayJob of the gate has ended, and its log has no decision about {version.uri}")
    return FlowResult(before.results.having(gate.spec, said[-1]), {}, (gate.name,), {gate.name: inputs})
