"""`ddpm VERB [key=value …]`: one command per verb, no logic. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.config import Config, ConfigError, compose, read_config
from pipelines.errors import PipelineError
from pipelines.terminal import Terminal

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
terminal = Terminal()
search_app = typer.Typer(no_args_is_help=True, help="Search hyperparameters with Ray Tune and Optuna.")
app.add_typer(search_app, name="search")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Hydra overrides, such as +experiment=digits optim.lr=1e-3")
]
MODEL = "runs:/ID[/IMAGES|/best][/sigma_rel=WIDTH], models:/NAME@alias, models:/NAME/VERSION or a folder"
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]


def _address(uri: str) -> str:
    if not uri.rstrip("/").startswith(("s3://", "file:///")):
        raise typer.BadParameter(f"{uri} is no address: write s3://BUCKET/PATH or file:///PATH")
    return uri.rstrip("/")


Folder = Annotated[str, typer.Argument(callback=_address, help="s3://BUCKET/PATH or file:///PATH of the shards")]
Threads = Annotated[int | None, typer.Option(min=1, help="Shards read at once; default twice the cores, at most 32")]


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 bad usage or configuration."""
    try:
        app(standalone_mode=True)
    except PipelineError as error:
        terminal.error("configuration error" if isinstance(error, ConfigError) else "error", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal.console.print("aborted")
        sys.exit(130)


@app.command()
def up(as_json: Json = False) -> None:
    """Start the local stack: S3 (SeaweedFS), MLflow, a Ray head. Example: ddpm up"""
    from pipelines import stack

    with terminal.services() as notice:
        state = stack.up(notice=notice)
    _show_status(as_json, {"home": str(state.home)})


@app.command()
def down(as_json: Json = False) -> None:
    """Stop what `ddpm up` started; data stays. Example: ddpm down"""
    from pipelines import stack

    ended = stack.down(notice=terminal.stage)
    if not ended:
        terminal.stage("stack", "nothing is running")
    _finish(as_json, {"stopped": ended})


@app.command()
def status(as_json: Json = False) -> None:
    """Show the local stack and the URLs to open. Example: ddpm status"""
    _show_status(as_json, {})


@app.command()
def ingest(
    source: Annotated[
        str, typer.Argument(help="`digits`, a folder, a .zip, or a .csv or .jsonl of paths; a path or s3://…")
    ],
    to: Annotated[str, typer.Option("--to", callback=_address, help="s3://BUCKET/PATH or file:///PATH to write to")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write images as WebDataset shards. Example: ddpm ingest photos/ --to s3://ddpm/datasets/photos"""
    # No network is made here; one of a single level fits images of any size.
    folder = ["data=folder", "data.num_classes=1", "model.channels=[32]", "model.attention=[false]"]
    defaults = ["data=digits"] if source == "digits" else folder
    config = compose([*defaults, *_set("data.source", source), *_set("data.uri", to), *(overrides or [])])
    # A cluster that is named writes the shards; the local stack has no more cores than the threads of this process.
    over_ray = bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))
    config = _connect(config, ["s3"] if any(end.startswith("s3://") for end in (source, to)) else [])

    from pipelines import flow
    from pipelines.storage import Storage

    storage = Storage.of(config)
    if over_ray:
        from pipelines.training.resources import connect_ray

        connect_ray(config, storage)
    with terminal.live():
        done = flow.write_dataset(config, storage, terminal)
    dataset = done.dataset
    counts = {split: dataset.samples(split) for split in dataset.splits}
    _finish(
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


@app.command()
def index(
    uri: Folder,
    split: Annotated[list[str] | None, typer.Option(help="NAME=PATTERN of paths, or NAME for all; repeatable")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names, comma-separated; default the numbers")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width; default the first image's")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write an index again that is there already")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List what is bad instead of refusing it")] = False,
    threads: Threads = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Describe WebDataset tars that others wrote. Example: ddpm index s3://ddpm/datasets/birds --split train"""
    from pipelines.shards.audit.foreign import SplitRule, index_tars
    from pipelines.storage import Storage

    try:
        rules = [SplitRule.parse(text) for text in split or []]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--split") from error
    config = _connect(compose(overrides or []), ["s3"] if uri.startswith("s3://") else [])
    with terminal.live():
        done = index_tars(
            uri,
            Storage.of(config),
            rules=rules,
            classes=classes.split(",") if classes else (),
            image_size=image_size,
            replace=replace,
            quarantine=quarantine,
            threads=threads,
            progress=terminal.counter("index", "MiB"),
        )
    for line in done.lines():
        terminal.stage("index", line)
    _finish(as_json, done.to_dict())


@app.command()
def check(
    uri: Folder,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Write quarantine.json: what to leave out")] = False,
    threads: Threads = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Verify every byte and sample of a dataset. Example: ddpm check s3://ddpm/datasets/birds --quarantine"""
    config = _connect(compose(overrides or []), ["s3"] if uri.startswith("s3://") else [])

    from pipelines.shards.audit import check as checking
    from pipelines.storage import Storage

    storage = Storage.of(config)
    with terminal.live():
        report = checking.check(uri, storage, threads=threads, progress=terminal.counter("check", "MiB"))
    if quarantine:
        report = checking.write_quarantine(report, storage)
    checking.show(report, terminal.console, terminal.stage)
    _finish(as_json, report.to_dict())
    if report.problems:
        raise typer.Exit(1)


@app.command()
def train(
    overrides: Overrides = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A whole configuration, such as a run's config.json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, or resume the run of that name. Example: ddpm train +experiment=digits name=first"""
    if config_file is None:
        config = _connected(overrides)
    else:
        config = _connect(read_config(config_file, overrides or []), ["s3", "mlflow", "ray"])

    from pipelines import flow
    from pipelines.storage import Storage

    with terminal.live():
        result = flow.train_stage(config, Storage.of(config), _lineage(), terminal)
    terminal.stage("train", f"{result.status} at {result.images_seen:,} images; runs:/{result.tracker.run_id}")
    published = dataclasses.asdict(result.published) if result.published else None
    _finish(
        as_json,
        {
            "status": result.status,
            "run_id": result.tracker.run_id,
            "images_seen": result.images_seen,
            "published": published,
            "goodput": result.goodput.to_dict() if result.goodput else None,
            "mlflow": result.tracker.url,
        },
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score a model against the real test split. Example: ddpm evaluate models:/digits@champion guidance.scale=2"""
    config = _connected(overrides)

    from pipelines import flow, models
    from pipelines.storage import Storage

    storage = Storage.of(config)
    resolved = models.resolve(model, tracking_uri=config.tracking.uri, storage=storage)
    chosen = any(o.lstrip("+").startswith(("guidance", "sampler")) for o in overrides or [])
    settings = models.sampling_settings(config) if chosen else resolved.model.spec.sampling
    with terminal.live():
        scores, _ = flow.evaluate_stage(resolved, settings, config, storage, terminal)
    _show_scores(scores)
    _finish(as_json, dataclasses.asdict(scores))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNGs and grid.png")],
    labels: Annotated[str | None, typer.Option(help="Class names or indices, comma-separated; default all")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per label (in all, for a model without classes)")] = 1,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; default the model's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network evaluations; default the model's")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once; does not change them")] = 64,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw images. Example: ddpm sample models:/digits@champion --labels 0,1,2 --guidance 2 --steps 50 --out samples"""
    wanted = {"runs": ["s3", "mlflow"], "mode": ["mlflow"]}.get(model[:4], [])
    config = _connect(compose(overrides or []), wanted)

    from pipelines import models
    from pipelines.sampling import write_samples
    from pipelines.storage import Storage

    resolved = models.resolve(model, tracking_uri=config.tracking.uri, storage=Storage.of(config))
    files = write_samples(
        resolved.model,
        out,
        labels=labels,
        count=count,
        guidance=guidance,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
    )
    terminal.stage("sample", f"{len(files) - 1} images and {files[-1]}")
    _finish(as_json, {"files": [str(f) for f in files]})


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION")],
    alias: Annotated[str, typer.Option(help="The alias to move")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version if the gate allows it. Example: ddpm promote models:/digits/2 --alias champion"""
    config = _connect(compose(overrides or []), ["mlflow"])

    from pipelines import registry, tracking

    assert config.tracking.uri is not None
    name, _, number = model.removeprefix("models:/").partition("/")
    version = tracking.version(config.tracking.uri, name, number=number) if number.isdigit() else None
    if version is None:
        raise registry.RegistryError(f"{model} is not a registered version; write models:/NAME/VERSION")
    verdict = registry.promote(config.tracking.uri, version, alias)
    terminal.stage("gate", f"{'passed' if verdict.passed else 'refused'}: {verdict.reason}")
    _finish(as_json, dataclasses.asdict(verdict))
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def flow(
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw a grid of the registered model into this folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ingest, train, evaluate, register; finished stages are skipped. Example: ddpm flow +experiment=digits"""
    config = _connected(overrides)

    from pipelines import flow as whole
    from pipelines import models
    from pipelines.sampling import write_samples
    from pipelines.storage import Storage

    with terminal.live():
        result = whole.run(config, _lineage(), terminal)
    _show_scores(result.scores)
    verdict = f"{'passed' if result.verdict.passed else 'refused'}: {result.verdict.reason}"
    terminal.stage("gate", verdict)
    terminal.stage("registry", f"{result.version.uri}, alias {config.registry.alias} {verdict.split(':')[0]}")
    answer: dict[str, Any] = {
        "scores": dataclasses.asdict(result.scores),
        "model": result.version.uri,
        "gate": dataclasses.asdict(result.verdict),
        "skipped": result.skipped,
        "run_id": result.tracker.run_id,
        "mlflow": result.tracker.url,
    }
    if out is not None:
        resolved = models.resolve(result.version.uri, tracking_uri=config.tracking.uri, storage=Storage.of(config))
        answer["grid"] = str(write_samples(resolved.model, out, count=8)[-1])
        terminal.stage("grid", answer["grid"])
    terminal.stage("mlflow", result.tracker.url)
    _finish(as_json, answer)


Study = Annotated[str | None, typer.Option(help="Name of the study; default that of the space and the run or model")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the study of that name")]
After = Annotated[list[str] | None, typer.Option(help="Begin with the best of an earlier study; repeatable")]


@search_app.command("guidance")
def search_guidance(
    model: Annotated[str, typer.Option(help=MODEL)],
    space: Annotated[str, typer.Option(help="A study of conf/search/, or a YAML file")] = "guidance",
    study: Study = None,
    resume: Resume = False,
    after: After = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Search guidance and sampler of a model. Example: ddpm search guidance --model models:/digits@champion"""
    chosen, config = _study(space, "guidance", overrides)
    config = _connect(config, ["s3", "mlflow", "ray"])

    from pipelines.search import studies

    name = study or f"guidance-{config.name}"
    study_of = partial(studies.guidance_study, config, model, name, chosen)
    _watch_study(partial(study_of, resume=resume, after=after or [], notice=terminal.stage), as_json)


@search_app.command("training")
def search_training(
    space: Annotated[str, typer.Option(help="A study of conf/search/, or a YAML file")] = "schedule",
    study: Study = None,
    resume: Resume = False,
    after: After = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Search what needs training. Example: ddpm search training +experiment=digits images=25600 search.trials=16"""
    chosen, config = _study(space, "training", overrides)
    config = _connect(config, ["s3", "mlflow", "ray"])

    from pipelines.search import studies

    name = study or f"{space}-{config.name}"
    study_of = partial(studies.training_study, config, name, chosen, _lineage())
    _watch_study(partial(study_of, resume=resume, after=after or [], notice=terminal.stage), as_json)


@search_app.command("status")
def search_status(
    study: Annotated[str, typer.Argument(help="Name of the study")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show a study, running or ended. Example: ddpm search status guidance-digits"""
    config = _connect(compose(overrides or []), ["s3"])

    from pipelines.search import studies, table
    from pipelines.search.space import StudyConfig
    from pipelines.search.study import StudyStore

    store = StudyStore.of(config, study)
    described = store.description()
    records = store.records()
    kind = StudyConfig.model_validate({**described["space"], "trials": described["trials"]})
    terminal.console.print(table.table(kind, records))
    terminal.stage("study", f"{len(records)} of {described['trials']} trials have begun")
    _finish(as_json, {"study": study, "trials": studies.count_states(records)})


def _study(space: str, kind: str, overrides: list[str] | None) -> tuple[Any, Config]:
    """The study and the configuration that its trials share; overrides of the former begin with `search.`."""
    from pipelines.search.space import load_study

    lines = overrides or []
    chosen = load_study(space, [line for line in lines if line.startswith("search.")])
    if chosen.kind != kind:
        raise ConfigError(f"the space '{space}' is for `ddpm search {chosen.kind}`, not for `ddpm search {kind}`")
    return chosen, compose([line for line in lines if not line.startswith("search.")])


def _watch_study(run: Any, as_json: bool) -> None:
    """Run a study under its live table, then say what it came to."""
    from pipelines.search import table

    with table.shown(terminal.console, terminal.stage) as on_change:
        found = run(on_change=on_change)
    if found.best is not None:
        terminal.stage("best", table.line(found.best))
    terminal.stage("page", found.page)
    terminal.stage("mlflow", found.tracker.url)
    _finish(as_json, found.answer)


def _connected(overrides: list[str] | None) -> Config:
    """Compose, and have S3, MLflow and Ray at hand."""
    return _connect(compose(overrides or []), ["s3", "mlflow", "ray"])


def _connect(config: Config, services: list[str]) -> Config:
    """Every address explicit; what of the local stack is needed and not running is started."""
    from pipelines.connect import connect

    with terminal.services() as notice:
        return connect(config, os.environ, services, notice=notice)


def _show_status(as_json: bool, extra: dict[str, Any]) -> None:
    from pipelines import stack

    services = stack.status()
    hints = {
        "s3": "S3 endpoint",
        "mlflow": "MLflow page",
        "ray": "Ray dashboard; its token is in .ddpm/ray-token",
    }
    for service in services:
        state = "healthy" if service.healthy else "running, does not answer" if service.running else "not running"
        where = f"  {service.url}  ({hints[service.name]})" if service.url else ""
        terminal.stage(service.name, f"{state}{where}")
    plain = {s.name: {"running": s.running, "healthy": s.healthy, "url": s.url, "log": str(s.log)} for s in services}
    _finish(as_json, {**extra, "services": plain})


def _show_scores(scores: Any) -> None:
    if scores.class_accuracy is not None:
        terminal.stage(
            "accuracy", f"{scores.class_accuracy:.4f} of {scores.n} samples (real test: {scores.real_accuracy:.4f})"
        )
    ratio = scores.frechet_distance / scores.floor
    terminal.stage(
        "distance",
        f"Frechet {scores.frechet_distance:.2f} = {ratio:.2f} times the floor {scores.floor:.2f} of real test images "
        f"(noise: {scores.ceiling:.0f})",
    )


def _finish(as_json: bool, answer: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(answer))


def _lineage() -> dict[str, Any]:
    """Which code trains: the git commit of the checkout, or the release."""
    from importlib.metadata import version

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = commit and git("status", "--porcelain", "--untracked-files=no")
    return {"code_version": version("ddpm-pipelines"), "git_commit": f"{commit}-dirty" if dirty else commit or None}


def _set(key: str, value: str) -> Iterator[str]:
    """An override whose value may hold any character."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    yield f"{key}='{escaped}'"
