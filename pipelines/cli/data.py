"""`ddpm ingest`, `index` and `check`: datasets of WebDataset shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import (
    Folder,
    Json,
    Overrides,
    Threads,
    answer_json,
    check_address,
    check_source,
    check_there,
    class_names,
    compose,
    connect,
    image_size_option,
    names_cluster,
    tar_reading,
    terminal,
)

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.shards.audit.recorded import TarReading
    from pipelines.storage import Storage


def ingest(
    source: Annotated[
        str, typer.Argument(help="`digits`, a folder, a .zip, .csv, .jsonl, .parquet or .tar; a path or s3://…")
    ],
    to: Annotated[
        str, typer.Option("--to", callback=check_address, help="s3://BUCKET/PATH or file:///PATH to write to")
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write images as WebDataset shards. Example: ddpm ingest photos/ --to s3://ddpm/datasets/photos"""
    check_source(source)
    config = _compose_ingest(source, to, overrides or [])
    check_there(config.data.source)
    over_ray = names_cluster(config)
    config = connect(config, ["s3"] if any(end.startswith("s3://") for end in (source, to)) else [])

    from pipelines.flow.ingest import write_dataset

    if over_ray:
        from pipelines.training.resources import connect_ray

        connect_ray(config)
    with terminal.live():
        done = write_dataset(config, terminal)
    dataset = done.dataset
    counts = {split: dataset.samples(split) for split in dataset.splits}
    answer_json(
        as_json,
        {
            "uri": dataset.uri,
            "digest": dataset.digest,
            "samples": counts,
            "left_out": len(done.bad),
            "changed": done.report.changes,
            "reused_shards": done.reused_shards,
        },
    )


def _open(
    verb: str, uri: str, overrides: list[str] | None, threads: int | None
) -> tuple[Callable[[], TarReading], Storage]:
    """Return how the tars of a dataset are read, to be called where progress is shown, and its storage.

    Ray reads them where a cluster is named that sees them, and no number of threads is given.
    """
    from pipelines.storage import Storage

    config = compose(overrides)
    over_ray = threads is None and names_cluster(config)
    config = connect(config, ["s3"] if uri.startswith("s3://") else [])
    return tar_reading(verb, config, [uri], threads, over_ray=over_ray), Storage.of(config)


def _compose_ingest(source: str, to: str, overrides: list[str]) -> Config:
    """Return the configuration of an ingest, of the shipped digits or of a folder of unknown images."""
    from pipelines.config import quoted_override

    # No network is built here; one with a single level is valid for images of any size.
    folder = ["data=folder", "data.num_classes=1", "model.channels=[32]", "model.attention=[false]"]
    defaults = ["data=digits"] if source == "digits" else folder
    return compose([*defaults, quoted_override("data.source", source), quoted_override("data.uri", to), *overrides])


def index(
    uri: Folder,
    split: Annotated[list[str] | None, typer.Option(help="NAME=PATTERN of paths, or NAME for all; repeatable")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names, comma-separated; default: their numbers")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Such as 64 or 48x64 (height x width); default: the first image's")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing index")] = False,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Leave bad samples out instead of refusing the dataset"),
    ] = False,
    threads: Threads = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Index WebDataset tars written by other tools. Example: ddpm index s3://ddpm/datasets/birds --split train"""
    from pipelines.shards.audit.foreign import SplitRule, index_tars

    try:
        rules = [SplitRule.parse(text) for text in split or []]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--split") from error
    reading, storage = _open("index", uri, overrides, threads)
    with terminal.live():
        done = index_tars(
            uri,
            storage,
            rules=rules,
            classes=class_names(classes) or (),
            image_size=image_size_option(image_size),
            replace=replace,
            quarantine=quarantine,
            reading=reading(),
        )
    for line in done.lines():
        terminal.stage("index", line)
    answer_json(as_json, done.to_dict())


def check(
    uri: Folder,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Write quarantine.json, so that training leaves bad samples out"),
    ] = False,
    threads: Threads = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Verify every byte and sample of a dataset. Example: ddpm check s3://ddpm/datasets/birds --quarantine"""
    from pipelines.shards.audit import check as checking

    reading, storage = _open("check", uri, overrides, threads)
    with terminal.live():
        report = checking.check(uri, storage, reading=reading())
    if quarantine:
        report = checking.write_quarantine(report, storage)
    checking.show(report, terminal.console, terminal.stage)
    answer_json(as_json, report.to_dict())
    if report.problems:
        raise typer.Exit(1)
