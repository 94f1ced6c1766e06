"""`ddpm seen` and `forget`: which models were trained on a picture, and taking it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import (
    Json,
    Overrides,
    Threads,
    answer_json,
    check_address,
    check_file,
    compose,
    compose_running,
    connect_for_model,
    names_cluster,
    tar_reading,
    terminal,
)

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.shards.audit.recorded import TarReading

What = Annotated[
    str,
    typer.Argument(
        metavar="PICTURE|KEY|DIGEST|LIST",
        help="A picture (a path or s3://…), the key of a sample, the SHA-256 of an image or of its pixels, or a .txt "
        "file with one of these in each line",
    ),
]
Data = Annotated[list[str] | None, typer.Option(help="Folder of a further dataset to search; repeatable")]


def _folders(data: Sequence[str] | None) -> list[str]:
    return [check_address(uri) for uri in data or []]


def _reading(verb: str, config: Config, overrides: list[str] | None, threads: int | None) -> Callable[[], TarReading]:
    """Return how tars are read: as Ray tasks where the user names a cluster and no number of threads."""
    over_ray = threads is None and names_cluster(compose(overrides))
    return tar_reading(verb, config, [config.storage.root], threads, over_ray=over_ray)


def seen(
    what: What,
    overrides: Overrides = None,
    data: Data = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look for no near-duplicates")] = False,
    statement: Annotated[
        Path | None, typer.Option(help="Write a signed statement of the answer to this file, and FILE.sig")
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Take the picture for a sample of this model: show what it is nearest to"),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="With --of: HTML file of the pictures; default: nearest-NAME.html")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say which datasets hold a picture, and which models were trained on it. Example: ddpm seen photo.jpg"""
    if of is not None:
        others = {"--data": data, "--exact": exact, "--statement": statement}
        if given := [name for name, value in others.items() if value]:
            raise typer.BadParameter(
                f"{' and '.join(given)}: not with --of, which compares with the data of one model and says what is near"
            )
        _show_nearest(what, of, page, overrides, threads, as_json=as_json)
        return
    if page is not None:
        raise typer.BadParameter("--page: only with --of MODEL, whose nearest training images it shows")
    folders = _folders(data)
    config = compose_running(overrides, services=["s3"], optional=["mlflow"])

    from pipelines.provenance.find import Query
    from pipelines.provenance.seen import look, write_statement
    from pipelines.signing import Signer
    from pipelines.storage import Storage

    query = Query.parse(what, Storage.of(config))
    signer = Signer.of(config.registry) if statement is not None else None
    with terminal.live():
        reading = _reading("seen", config, overrides, threads)
        found = look(query, config, reading, data=folders, near=not exact)
    for line in found.lines():
        terminal.stage("seen", line)
    if statement is not None and signer is not None:
        path, signature = write_statement(found, statement, signer)
        terminal.stage("seen", f"statement: {path}, signed by {signer.key} in {signature}")
    answer_json(as_json, found.to_dict())


def _show_nearest(
    what: str, of: str, page: Path | None, overrides: list[str] | None, threads: int | None, *, as_json: bool
) -> None:
    """Show the training images that are nearest to a sample of a model."""
    page = page or Path(f"nearest-{Path(what).stem}.html")
    check_file("--page", page, "nearest.html")
    config = connect_for_model(of, overrides, more=["s3"])

    from pipelines.checkpoints.references import open_model
    from pipelines.provenance.find import Query
    from pipelines.provenance.nearest import nearest
    from pipelines.storage import Storage

    query = Query.parse(what, Storage.of(config))
    resolved = open_model(of, config)
    with terminal.live():
        found = nearest(query, resolved, config, _reading("seen", config, overrides, threads))
    page.write_text(found.page(), encoding="utf-8")
    for line in found.lines():
        terminal.stage("seen", line)
    terminal.stage("seen", f"side by side: {page}")
    answer_json(as_json, found.to_dict() | {"page": str(page)})


def forget(
    what: What,
    overrides: Overrides = None,
    data: Data = None,
    near: Annotated[bool, typer.Option("--near", help="Take near-duplicates out as well")] = False,
    reason: Annotated[str, typer.Option(help="Why, to be recorded; name nobody")] = "",
    erase: Annotated[bool, typer.Option("--erase", help="Overwrite its bytes in the shards as well")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Take a picture out of all datasets, and aliases away from models trained on it. Example: ddpm forget photo.jpg"""
    folders = _folders(data)
    config = compose_running(overrides, services=["s3", "mlflow"], optional=["ray"])

    from pipelines.provenance.find import Query
    from pipelines.provenance.forget import forget as forget_picture
    from pipelines.provenance.seen import look
    from pipelines.storage import Storage
    from pipelines.training.resources import connect_ray

    query = Query.parse(what, Storage.of(config))
    with terminal.live():
        found = look(query, config, _reading("forget", config, overrides, threads), data=folders, near=near)
        done = forget_picture(
            found,
            config,
            terminal,
            lambda: connect_ray(config),
            reason=reason,
            erase_bytes=erase,
            dry_run=dry_run,
            notice=partial(terminal.stage, "forget"),
        )
    for line in done.lines():
        terminal.stage("forget", line)
    answer_json(as_json, done.to_dict())
