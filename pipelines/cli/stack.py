"""`ddpm up`, `down` and `status`: the local stack; `ddpm doctor`: checks of this machine and the services."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from pipelines.cli.common import Json, Overrides, answer_json, terminal
from pipelines.cli.terminal import Terminal

HINTS = {
    "s3": "S3 endpoint",
    "mlflow": "MLflow page",
    "ray": "Ray dashboard; its token is in .ddpm/ray-token",
    "dagster": "Dagster page",
}


Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--shared",
        help="Keep other users of this machine out, or let them in; default: as last started, at first --shared.",
        show_default=False,
    ),
]


def up(
    private: Private = None,
    orchestrator: Annotated[
        bool,
        typer.Option(
            "--orchestrator", help="Also start Dagster, with the stages as assets and their sensor and schedule"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the local stack: S3 (SeaweedFS), MLflow, a Ray head. Example: ddpm up --private"""
    from pipelines import stack

    services = (*stack.SERVICES, *stack.ORCHESTRATOR) if orchestrator else stack.SERVICES
    with terminal.services() as notice:
        state = stack.up(services=services, private=private, notice=notice)
    if stack.read_private(state.home):
        terminal.stage("access", f"this user only; MLflow's user and password are in {state.mlflow_credentials_file}")
    else:
        terminal.stage(
            "access",
            "other users of this machine can read and change the data in MLflow and S3: "
            "if there are any, `ddpm down`, then `ddpm up --private`",
        )
    _show_status(as_json, {"home": str(state.home)}, terminal)


def down(as_json: Json = False) -> None:
    """Stop the services started by `ddpm up`; data is kept. Example: ddpm down"""
    from pipelines import stack

    stopped = stack.down(notice=terminal.stage)
    if not stopped:
        terminal.stage("stack", "nothing is running")
    answer_json(as_json, {"stopped": stopped})


def status(as_json: Json = False) -> None:
    """Show the local stack and the URLs to open. Example: ddpm status"""
    _show_status(as_json, {}, _answering(as_json))


def doctor(
    overrides: Overrides = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Test the GPUs of this machine instead, in about two minutes.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes of --gpu; default: one per GPU, or 2 on a CPU.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a training lacks here and how to fix it; starts nothing. Example: ddpm doctor"""
    if gpu:
        _test_gpus(overrides, ranks, as_json)
        return
    if ranks is not None:
        raise typer.BadParameter("--ranks is an option of --gpu")
    from pipelines.doctor import answer, examine, left_running

    checks = examine(overrides or [], os.environ)
    _answering(as_json).checks([(check.status, check.name, check.found, check.fix) for check in checks])
    found = answer(checks)
    answer_json(as_json, found)
    if left_running():
        sys.stdout.flush()
        os._exit(1)  # Python would wait for the thread pools of the S3 client
    if not found["ok"]:
        raise typer.Exit(1)


def _test_gpus(overrides: list[str] | None, ranks: int | None, as_json: bool) -> None:
    """Run the selftest of GPUs: a line per check, and what a report of a fault needs."""
    if overrides:
        raise typer.BadParameter(f"--gpu tests the machine, whatever the settings: leave out {' '.join(overrides)}")
    from pipelines.doctor.check import answer
    from pipelines.doctor.gpu import ranks_of_machine, selftest
    from pipelines.doctor.gpu.facts import report_section
    from pipelines.presentation import markdown

    try:
        processes = ranks_of_machine(ranks)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shown, checks = _answering(as_json), []
    for check in selftest(processes):
        checks.append(check)
        shown.checks([(check.status, check.name, check.found, check.fix)])
    report = markdown.section(report_section(os.environ))
    shown.console.print(f"\n{report}", markup=False)
    found = answer(checks)
    answer_json(as_json, found | {"report": report})
    if not found["ok"]:
        raise typer.Exit(1)


def _answering(as_json: bool) -> Terminal:
    """Return the terminal for a verb's result: on stdout, or on stderr if stdout is for JSON."""
    return terminal if as_json else Terminal(stderr=False)


def _show_status(as_json: bool, extra: dict[str, Any], shown: Terminal) -> None:
    """Show every service of the local stack with its URL; `extra` is added to the JSON answer."""
    from pipelines import stack

    services = stack.status()
    for service in services:
        state = "healthy" if service.healthy else "running, does not answer" if service.running else "not running"
        where = f"  {service.url}  ({HINTS[service.name]})" if service.url else ""
        shown.stage(service.name, f"{state}{where}")
    plain = {s.name: {"running": s.running, "healthy": s.healthy, "url": s.url, "log": str(s.log)} for s in services}
    answer_json(as_json, {**extra, "services": plain})
