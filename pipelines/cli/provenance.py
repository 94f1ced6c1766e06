"""`ddpm seen`: which models were trained on a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import Json, Overrides, Threads, answer_json, check_address, compose_running, terminal


def seen(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PICTURE|KEY|DIGEST",
            help="A picture (a path or s3://…), the key of a sample, or the SHA-256 of an image or of its pixels",
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[list[str] | None, typer.Option(help="Folder of a further dataset to search; repeatable")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look for no near-duplicates")] = False,
    statement: Annotated[
        Path | None, typer.Option(help="Write a signed statement of the answer to this file, and FILE.sig")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say which datasets hold a picture, and which models were trained on it. Example: ddpm seen photo.jpg"""
    folders = [check_address(uri) for uri in data or []]
    config = compose_running(overrides, services=["s3"], optional=["mlflow"])

    from pipelines.provenance.find import Query
    from pipelines.provenance.seen import look, write_statement
    from pipelines.shards.audit.recorded import InThreads, TarReading
    from pipelines.signing import Signer
    from pipelines.storage import Storage

    query = Query.parse(what, Storage.of(config))
    signer = Signer.of(config.registry) if statement is not None else None
    notice = partial(terminal.stage, "seen")

    def reading() -> TarReading:
        return TarReading(InThreads(threads), terminal.counter("seen", "MiB"), notice)

    with terminal.live():
        found = look(query, config, reading, data=folders, near=not exact)
    for line in found.lines():
        notice(line)
    if statement is not None and signer is not None:
        paths = write_statement(found, statement, signer)
        notice(f"statement: {paths[0]}, signed by {signer.key} in {paths[1]}")
    answer_json(as_json, found.to_dict())
