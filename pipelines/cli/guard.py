"""`ddpm guard`: aliases stay where the gate let them go."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from pipelines.cli.common import Json, Overrides, answer_json, compose_running, finite, terminal


def guard(
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end")] = False,
    every: Annotated[float, typer.Option(min=0.1, callback=finite, help="Seconds between two looks")] = 2.0,
    as_json: Json = False,
) -> None:
    """Put aliases back that were moved without the gate, until Ctrl-C. Example: ddpm guard --once"""
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines.registry import Guard, Logs, Trust, watch
    from pipelines.storage import Storage

    say, uri = partial(terminal.stage, "guard"), config.tracking.uri
    assert uri is not None
    logs = Logs(config.storage.root, Storage.of(config), Trust.of(config.registry), say)
    guarding = Guard(uri, logs, (config.registry.model, config.registry.alias), say)
    if once:
        guarding.settle()
    else:
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            say(f"aliases in MLflow at {uri}, by the verdicts at {logs.folder}; Ctrl-C ends it")
            watch(guarding, every)
    say(f"{len(guarding.corrections)} corrections; guarded: {', '.join(map('/'.join, sorted(guarding.guarded)))}")
    answer_json(
        as_json,
        {
            "guarded": ["/".join(alias) for alias in sorted(guarding.guarded)],
            "corrections": [asdict(done) for done in guarding.corrections],
        },
    )
