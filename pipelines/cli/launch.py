"""`ddpm launch`: a verb on a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.cli.common import Json, answer_json, compose, find_running, terminal

if TYPE_CHECKING:
    from pipelines.config import Config, RayLaunch
    from pipelines.launch import ClusterCommand
    from pipelines.launch.ray_jobs import RayJobs

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Arguments after the verb belong to the verb."""
Target = Literal["kuberay", "aws", "ray"]


def launch(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="VERB [ARGUMENTS]...", help="Command to run on the cluster, without `ddpm`"),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(help="A RayJob on Kubernetes, files for `ray up` on EC2, or a job on an existing Ray cluster"),
    ] = "ray",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the files of --target aws")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the output of the command")] = False,
    stop: Annotated[
        str | None,
        typer.Option("--stop", metavar="JOB", help="Stop this job; a training writes a checkpoint first"),
    ] = None,
    status: Annotated[str | None, typer.Option("--status", metavar="JOB", help="Show the jobs of this name")] = None,
    as_json: Json = False,
) -> None:
    """Run a verb on a cluster and follow it. Example: ddpm launch --target kuberay train +experiment=digits name=first

    Runs are identified by name: launching the same command again follows a running job and resumes one that has ended.
    Settings of the launch are overrides: launch.image=… (see docs/clusters.md).
    """
    from pipelines.launch import overrides_of, parse_command, with_addresses
    from pipelines.stack.connect import without_secrets

    given = words or []
    named = stop or status
    if named is not None:
        if target == "aws":
            raise typer.BadParameter(
                "use the dashboard of a cluster on EC2: `ray dashboard cluster.yaml`, then "
                f"`ddpm launch --target ray {'--stop' if stop else '--status'} {named} "
                "cluster.address=http://127.0.0.1:8265`"
            )
        _look_or_stop(target, named, given, stop=stop is not None, as_json=as_json)
        return
    if not given:
        raise typer.BadParameter("name a verb, such as `ddpm launch --target ray train +experiment=digits`")
    config, _ = without_secrets(compose([f"launch={target}", *overrides_of(given)]))
    config = with_addresses(config, os.environ)
    command = parse_command(given, config)
    if target == "kuberay":
        _to_kuberay(command, dry_run=dry_run, detach=detach, as_json=as_json)
    elif target == "aws":
        _to_aws(command, to, dry_run=dry_run, as_json=as_json)
    else:
        _to_ray(command, dry_run=dry_run, detach=detach, as_json=as_json)


def _to_kuberay(command: ClusterCommand, *, dry_run: bool, detach: bool, as_json: bool) -> None:
    from pipelines.launch import kubectl, kuberay

    kuberay.require_memory(command)
    if dry_run:
        if as_json:
            answer_json(True, kuberay.rayjob(command))
        else:
            typer.echo(kuberay.manifest(command), nl=False)
        return
    kubectl.apply(command, terminal.stage)
    state = None if detach else kubectl.follow(kubectl.kubectl_of(command), command.object_name, terminal.stage)
    answer_json(as_json, {"rayjob": command.object_name, "status": state.status if state else None})
    if state is not None and not state.ok:
        raise typer.Exit(1)


def _to_aws(command: ClusterCommand, to: Path | None, *, dry_run: bool, as_json: bool) -> None:
    """Write or print the files of a cluster on EC2."""
    from pipelines.launch import aws

    files = aws.files(command)
    if dry_run:
        for name, text in files.items():
            typer.echo(f"# --- {name}\n{text}", nl=False)
        return
    if to is None:
        raise typer.BadParameter("name a folder for the files, such as --to cluster, or print them with --dry-run")
    to.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (to / name).write_text(text)
    terminal.stage("launch", f"{to} holds {', '.join(files)}")
    for line in aws.next_steps(command, to):
        terminal.stage("next", line)
    answer_json(as_json, {"files": [str(to / name) for name in files]})


def _to_ray(command: ClusterCommand, *, dry_run: bool, detach: bool, as_json: bool) -> None:
    launch = _ray_launch(command.config)
    config, home = _find_ray(command.config)

    from pipelines.launch import ray_jobs, require_reachable

    if home is None:
        require_reachable(config, share_folders=True)
    program = ray_jobs.program_of(launch, local=home is not None)
    variables = ray_jobs.job_variables(command, home)
    if dry_run:
        plain = {"submission_id": command.name, "entrypoint": command.shell(program), "env_vars": variables}
        answer_json(True, {"address": config.cluster.address, **plain})
        return
    jobs = _jobs(config)
    job, is_new = jobs.submit(command, program, variables)
    said = f"submitted {job.id} to" if is_new else f"{job.id} is already running on"
    terminal.stage("launch", f"{said} {jobs.address}: `ddpm launch --stop {command.name}` stops it")
    state = None if detach else jobs.follow(job.id, _write, terminal.stage)
    if state is not None:
        terminal.stage("launch", str(state))
    answer_json(as_json, {"id": job.id, "submitted": is_new, "status": (state or job).status})
    if state is not None and state.status == "FAILED":
        raise typer.Exit(1)


def _look_or_stop(target: str, name: str, given: list[str], *, stop: bool, as_json: bool) -> None:
    image = ["launch.image=none"] if target == "kuberay" else []  # required, but not used here
    config = compose([f"launch={target}", *image, *given])
    if target == "kuberay":
        _in_kubernetes(config, name, stop=stop, as_json=as_json)
        return
    launch = _ray_launch(config)
    jobs = _jobs(_find_ray(config)[0])

    from pipelines.launch import LaunchError

    found = jobs.named(name)
    if not found:
        raise LaunchError(f"the Ray cluster at {jobs.address} has no job named '{name}'")
    if stop and not found[-1].ended:
        terminal.stage("launch", f"stopping {found[-1].id}; a training writes a checkpoint first")
        found[-1] = jobs.stop(found[-1].id, launch.stop_wait_s)
    for job in found:
        terminal.stage("launch", str(job))
    answer_json(as_json, {"name": name, "jobs": [{"id": job.id, "status": job.status} for job in found]})


def _in_kubernetes(config: Config, name: str, *, stop: bool, as_json: bool) -> None:
    from pipelines.config import KubeRayLaunch
    from pipelines.launch import LaunchError, kubectl
    from pipelines.launch.command import object_name

    assert isinstance(config.launch, KubeRayLaunch)
    client, job = kubectl.Kubectl(config.launch.namespace), object_name(name)
    state = kubectl.stop(client, job, terminal.stage) if stop else client.get(job)
    if state is None:
        raise LaunchError(f"there is no RayJob {job} in namespace {config.launch.namespace}")
    terminal.stage("launch", f"RayJob {job}: {state}")
    answer_json(as_json, {"rayjob": job, "deployment": state.deployment, "status": state.status})


def _find_ray(config: Config) -> tuple[Config, Path | None]:
    """Return the configuration with the address of the Ray cluster, and the folder of the local stack if that is it."""
    from pipelines import stack

    found = find_running(config, ["ray"])
    state = stack.read_state()
    local = state is not None and found.cluster.address == state.ray_address
    return found, state.home if state is not None and local else None


def _jobs(config: Config) -> RayJobs:
    from pipelines.launch.ray_jobs import RayJobs

    assert config.cluster.address is not None
    return RayJobs.connect(config.cluster.address, _ray_launch(config).patience_s)


def _ray_launch(config: Config) -> RayLaunch:
    from pipelines.config import RayLaunch

    assert isinstance(config.launch, RayLaunch)
    return config.launch


def _write(text: str) -> None:
    """Show the output of a job on stderr, because stdout is for the answer of this verb."""
    sys.stderr.write(text)
    sys.stderr.flush()
