"""`ddpm serve`: models behind HTTP."""

from __future__ import annotations

import importlib.util
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import MODEL, SERVICES, Json, answer_json, compose, connect, terminal

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.serving.service import ModelService

Arguments = Annotated[list[str], typer.Argument(help=f"One or several MODELs ({MODEL}), and overrides, KEY=VALUE")]


def serve(
    arguments: Arguments,
    no_token: Annotated[bool, typer.Option("--no-token", help="Answer requests without a token")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an application of the same name on the Ray cluster")
    ] = False,
    page: Annotated[bool, typer.Option("--page", help="Also serve a web page to try the models")] = False,
    as_json: Json = False,
) -> None:
    """Serve models over HTTP until Ctrl-C. Example: ddpm serve models:/digits@champion serving.port=8000"""
    needed = ["fastapi", "grpc_reflection", "prometheus_client", *(["gradio"] if page else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise typer.BadParameter(f"{', '.join(missing)} is not installed: pip install 'ddpm-pipelines[serve]'")
    from pipelines.stack.connect import anywhere

    # The replicas run in folders of their own.
    models = list(dict.fromkeys(anywhere(argument) for argument in arguments if not is_override(argument)))
    if not models:
        raise typer.BadParameter(f"name a model to serve: {MODEL}", param_hint="MODEL")
    config = compose([argument for argument in arguments if is_override(argument)])

    from pipelines.checkpoints import lookup

    for model in models:  # before anything starts
        lookup.check_form(model)
        lookup.check_exists(model, None)
    kinds = {model.partition(":/")[0] for model in models}
    needs = {"ray", *(["s3"] if "runs" in kinds else []), *(["mlflow"] if kinds & {"runs", "models"} else [])}
    config = connect(config, [service for service in SERVICES if service in needs])

    from pipelines.serving.service import ModelService
    from pipelines.serving.token import server_token
    from pipelines.stack import default_home
    from pipelines.training.resources import connect_ray

    for model in models:
        lookup.check_exists(model, config.tracking.uri)
    token = None if no_token else server_token(config.serving.token_file, default_home())
    connect_ray(config)
    service = ModelService(models, config, lambda text: terminal.stage("serve", text))
    for number in (signal.SIGINT, signal.SIGTERM):  # background processes of a shell ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        service.start(None if token is None else token.digest, replace=replace)
        terminal.stage("serve", f"{', '.join(models)} at {service.url}/v1/images, described at {service.url}/docs")
        if token is None:
            terminal.stage("serve", "no token is required: anyone who reaches this address may send requests")
        else:
            shown = f" {token.text}" if sys.stderr.isatty() else ""  # it does not belong into a log
            terminal.stage("serve", f"token{shown} (from {token.source}); Ctrl-C stops the server")
        answer = {"url": service.url, "models": models, "token": None if token is None else token.source}
        if page:
            answer["page"] = _add_page(service, config, None if token is None else token.digest)
            terminal.stage("serve", f"the page is at {answer['page']}")
        answer_json(as_json, answer)
        sys.stdout.flush()
        service.watch()
    except KeyboardInterrupt:
        terminal.stage("serve", "stopping: waiting requests are answered first")
    finally:
        service.stop()
    terminal.stage("serve", "ended")


def _add_page(service: ModelService, config: Config, token_digest: str | None) -> str:
    from pipelines.serving.limits import Limits
    from pipelines.serving.page import page_application

    page = page_application(service.front, service.models(), Limits.of(config.serving), token_digest)
    return f"{service.add_page(page)}/"


def is_override(argument: str) -> bool:
    """Return whether an argument is an override: unlike a MODEL, it has a = before any slash."""
    return "=" in argument.partition("/")[0]
