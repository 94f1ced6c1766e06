"""Shared parts of the verbs: the terminal, argument types, access to the services, and the JSON answer."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.terminal import Terminal

if TYPE_CHECKING:
    from ddpm.image_size import ImageSize
    from pipelines.config import Config
    from pipelines.registry import Verdict
    from pipelines.shards.audit.recorded import TarReading

terminal = Terminal()
SERVICES = ("s3", "mlflow", "ray")  # as in pipelines.stack, which `ddpm --help` does not import
MODEL = "runs:/ID[/IMAGES|/best][/sigma_rel=WIDTH], models:/NAME@alias, models:/NAME/VERSION or a folder"


def check_address(uri: str) -> str:
    """Return the address of a folder without a trailing slash.

    Raises:
        BadParameter: no storage backend opens it.
    """
    from pipelines.storage import StorageError, address_forms
    from pipelines.storage import check_address as check

    try:
        check(uri.rstrip("/"))
    except StorageError:
        raise typer.BadParameter(f"{uri} is not an address: write {address_forms('/PATH')}") from None
    return uri.rstrip("/")


def finite(value: float | None) -> float | None:
    """Return a number after checking that it is finite.

    Raises:
        BadParameter: the number is infinite or NaN.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


LARGEST_SEED = (1 << 63) - 1
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Hydra overrides, such as +experiment=digits optim.lr=1e-3")
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SOURCE] [budget=TIME] [OVERRIDES]...", help="Images, a time, Hydra overrides"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors and problems of the training.")]
Folder = Annotated[str, typer.Argument(callback=check_address, help="s3://BUCKET/PATH or file:///PATH of the shards")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Shards that this process reads at a time; default: Ray tasks, else twice the cores"),
]


def connect(config: Config, services: Sequence[str]) -> Config:
    """Return the configuration with every address filled in; start missing services of the local stack.

    Args:
        services: the services of "s3", "mlflow" and "ray" that the verb needs.
    """
    from pipelines.stack.connect import connect as connect_services

    with terminal.services() as notice:
        return connect_services(config, os.environ, services, notice=notice)


def find_running(config: Config, services: Sequence[str], optional: Sequence[str] = ()) -> Config:
    """Return the configuration with every address filled in, and start nothing.

    Args:
        services: the services of "s3", "mlflow" and "ray" that the verb needs.
        optional: services that it uses if they are running.
    """
    from pipelines.stack.connect import find_running as find_running_services

    return find_running_services(config, os.environ, services, optional=optional)


def compose_running(
    overrides: list[str] | None, *, name: str | None = None, services: Sequence[str], optional: Sequence[str] = ()
) -> Config:
    """Return the configuration of these overrides, connected to services that are running already.

    Args:
        name: name of the run that the verb is about.
    """
    from pipelines.config import quoted_override

    named = [] if name is None else [quoted_override("name", name)]
    return find_running(compose([*(overrides or []), *named]), services, optional)


def compose(overrides: Sequence[str] | None) -> Config:
    """Return the configuration of these overrides; see `pipelines.config.compose`, which imports torch."""
    from pipelines.config import compose as compose_config

    return compose_config(overrides or [])


def names_cluster(config: Config) -> bool:
    """Return whether Ray does the work; without an address of a cluster this process does, and nothing is started."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def tar_reading(
    verb: str, config: Config, addresses: Sequence[str], threads: int | None, *, over_ray: bool
) -> Callable[[], TarReading]:
    """Return how the tars of datasets are read, to be called where progress is shown.

    Args:
        addresses: of what is read and written.
        threads: of this process, where that reads.
        over_ray: let Ray read where its nodes see the addresses; it is connected to.
    """
    from pipelines.shards.audit.recorded import InThreads, Runner, TarReading

    notice = partial(terminal.stage, verb)
    runner: Runner = InThreads(threads)
    if over_ray:
        from pipelines.remote.spread import OverRay, obstacle_to_tasks
        from pipelines.training.resources import connect_ray

        connect_ray(config)
        obstacle = obstacle_to_tasks(addresses)
        runner = OverRay("read tars", notice) if obstacle is None else InThreads(because=obstacle)
    return lambda: TarReading(runner, terminal.counter(verb, "MiB"), notice)


def compose_connected(overrides: list[str] | None) -> Config:
    """Return the configuration of these overrides, connected to S3, MLflow and Ray."""
    return connect(compose(overrides), SERVICES)


def connect_for_model(
    model: str, overrides: list[str] | None, others: Iterable[object] = (), more: Sequence[str] = ()
) -> Config:
    """Return the configuration of these overrides, connected to the services that MODEL references need.

    Args:
        others: further values, some of which may be MODEL references.
        more: further services that the verb needs.

    Raises:
        ReferenceFormError: a reference is malformed; raised before any service is contacted.
    """
    from pipelines.checkpoints.lookup import check_form

    for reference in (model, *others):
        check_form(str(reference))
    kinds = {str(reference).partition(":/")[0] for reference in (model, *others)}
    needed = {*more, *(["s3"] if "runs" in kinds else []), *(["mlflow"] if kinds & {"runs", "models"} else [])}
    return connect(compose(overrides), [service for service in SERVICES if service in needed])


def read_arguments(arguments: Sequence[str] | None) -> tuple[str | None, str | None, list[str]]:
    """Return source, budget and Hydra overrides from the arguments of a verb; None for a missing source or budget.

    Raises:
        BadParameter: there are two sources or two budgets, or the source is ambiguous.
    """
    given = arguments or []
    sources = [text for text in given if "=" not in text and not text.startswith("~")]
    budgets = [text.partition("=")[2] for text in given if text.startswith("budget=")]
    if "" in budgets:
        raise typer.BadParameter("budget= has no value: write budget=30m, 2h or 1h30m")
    if len(sources) > 1 or len(budgets) > 1:
        twice = sources if len(sources) > 1 else [f"budget={text}" for text in budgets]
        raise typer.BadParameter(f"{' and '.join(twice)}: give only one; settings are written KEY=VALUE")
    overrides = [text for text in given if text not in sources and not text.startswith("budget=")]
    if sources:
        check_source(sources[0])
    return sources[0] if sources else None, budgets[0] if budgets else None, overrides


def check_source(source: str) -> None:
    """Refuse the name of scikit-learn's digits if a folder has the same name, because the source is ambiguous.

    Raises:
        BadParameter: there is such a folder.
    """
    if source == "digits" and Path(source).exists():
        raise typer.BadParameter(
            "digits is the name of scikit-learn's digits and of a folder here. Write ./digits for the folder; "
            "for scikit-learn's digits, rename the folder or work in another one"
        )


def check_there(source: str | None) -> None:
    """Refuse a source that is missing on this machine, before any service is contacted.

    Args:
        source: source of images; None if there is none.

    Raises:
        NoSourceError: the source does not exist, or is of an unknown kind.
    """
    if source not in (None, "digits"):
        from pipelines.shards.ingest.places import check_there as check

        check(source)


def check_file(option: str, path: Path, example: str) -> None:
    """Check, before any work, that the file named by an option can be written.

    Args:
        example: example of a file name, for the message.

    Raises:
        BadParameter: the folder is missing, the path is a folder, or this user may not write there.
    """
    folder = path.absolute().parent  # os.path answers where Path raises because this user has no access
    if not os.path.isdir(folder):
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}: create it, or choose another")
    if os.path.isdir(path):
        raise typer.BadParameter(f"{option} {path} is a folder: give a file name, such as {path / example}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise typer.BadParameter(f"{option} {path} cannot be written by this user: choose another path")


def new_folder(path: Path | None) -> Path | None:
    """Return an output folder after checking that it can be created, by creating it for a moment.

    Raises:
        BadParameter: it is a file, or cannot be created or written.
    """
    if path is None:
        return None
    made, folder = [], path.absolute()
    while not os.path.lexists(folder):
        made.append(folder)
        folder = folder.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "this user may not write into it")
    except OSError as error:
        why = "a file has this name" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise typer.BadParameter(f"{path} cannot be created or written ({why}): choose another folder") from error
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
    return path


def image_size_option(given: str | None) -> ImageSize | None:
    """Return an image size as it is given on the command line; None if there is none.

    Raises:
        BadParameter: it is no size.
    """
    from ddpm.image_size import parse_image_size

    try:
        return None if given is None else parse_image_size(given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--image-size") from error


def class_names(given: str | None) -> list[str] | None:
    """Return class names from a comma-separated list; None if there is none.

    Raises:
        BadParameter: a name is empty or appears twice.
    """
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise typer.BadParameter(f"--classes {given}: write names separated by commas, each only once")
    return names


def show_verdict(verdict: Verdict, *, failed_only: bool = False) -> None:
    """Show the gate's decision and its table, or only the rows of it that do not pass."""
    for row in [row for row in verdict.rows if not (failed_only and row.passed)]:
        mark = "ok" if row.passed else "NO"
        terminal.stage("gate", f"{mark}  {row.name}: {row.figure} (required: {row.bound})")
    terminal.stage("gate", str(verdict))


def answer_json(as_json: bool, answer: dict[str, Any]) -> None:
    """With `--json`, print the answer of a verb as one line of JSON, the last line of stdout.

    Ray reports lost nodes on stdout, from its own thread, even if logging is off.
    """
    if as_json:
        print(json.dumps(answer), flush=True)
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            sys.stdout = sys.stderr
