"""What the verbs share: the terminal, argument types, access to the services, and the JSON answer."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.terminal import Terminal

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.registry import Verdict

terminal = Terminal()
SERVICES = ("s3", "mlflow", "ray")  # those of pipelines.stack, which `ddpm --help` does not import
MODEL = "runs:/ID[/IMAGES|/best][/sigma_rel=WIDTH], models:/NAME@alias, models:/NAME/VERSION or a folder"


def check_address(uri: str) -> str:
    """Return the address of a folder without a slash at its end.

    Raises:
        BadParameter: no storage backend opens it.
    """
    from pipelines.storage import StorageError, address_forms
    from pipelines.storage import check_address as check

    try:
        check(uri.rstrip("/"))
    except StorageError:
        raise typer.BadParameter(f"{uri} is no address: write {address_forms('/PATH')}") from None
    return uri.rstrip("/")


def finite(value: float | None) -> float | None:
    """Return a number that is neither infinite nor none at all.

    Raises:
        BadParameter: it is.
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
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show nothing but errors, and what does not work in the training.")
]
Folder = Annotated[str, typer.Argument(callback=check_address, help="s3://BUCKET/PATH or file:///PATH of the shards")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Shards to read at a time; default twice the cores, at most 32")
]


def connect(config: Config, services: Sequence[str]) -> Config:
    """Return the configuration with every address filled in; start what is missing of the local stack.

    Args:
        services: of "s3", "mlflow" and "ray", those that the verb needs.
    """
    from pipelines.stack.connect import connect as connect_services

    with terminal.services() as notice:
        return connect_services(config, os.environ, services, notice=notice)


def find_running(config: Config, services: Sequence[str], optional: Sequence[str] = ()) -> Config:
    """Return the configuration with every address filled in, and start nothing.

    Args:
        services: of "s3", "mlflow" and "ray", those that the verb needs.
        optional: those that it uses where they are running.
    """
    from pipelines.stack.connect import find_running as find_running_services

    return find_running_services(config, os.environ, services, optional=optional)


def compose_running(
    overrides: list[str] | None, *, name: str | None = None, services: Sequence[str], optional: Sequence[str] = ()
) -> Config:
    """Return the configuration of these overrides, connected to services that are running already.

    Args:
        name: of the run that the verb is about.
    """
    from pipelines.config import quoted_override

    named = [] if name is None else [quoted_override("name", name)]
    return find_running(compose([*(overrides or []), *named]), services, optional)


def compose(overrides: Sequence[str] | None) -> Config:
    """Return the configuration of these overrides; see `pipelines.config.compose`, which imports torch."""
    from pipelines.config import compose as compose_config

    return compose_config(overrides or [])


def compose_connected(overrides: list[str] | None) -> Config:
    """Return the configuration of these overrides, connected to S3, MLflow and Ray."""
    return connect(compose(overrides), SERVICES)


def connect_to_folder(uri: str, overrides: list[str] | None) -> Config:
    """Return the configuration of these overrides, connected to S3 where the folder is there."""
    return connect(compose(overrides), ["s3"] if uri.startswith("s3://") else [])


def connect_for_model(
    model: str, overrides: list[str] | None, others: Iterable[object] = (), more: Sequence[str] = ()
) -> Config:
    """Return the configuration of these overrides, connected to the services that MODEL references need.

    Args:
        others: further values, of which some may be MODEL references.
        more: further services that the verb needs.

    Raises:
        ReferenceFormError: a reference is none, which is said before any service is asked.
    """
    from pipelines.checkpoints.lookup import check_form

    for reference in (model, *others):
        check_form(str(reference))
    kinds = {str(reference).partition(":/")[0] for reference in (model, *others)}
    needed = {*more, *(["s3"] if "runs" in kinds else []), *(["mlflow"] if kinds & {"runs", "models"} else [])}
    return connect(compose(overrides), [service for service in SERVICES if service in needed])


def read_arguments(arguments: Sequence[str] | None) -> tuple[str | None, str | None, list[str]]:
    """Return the source, the budget and the Hydra overrides among the arguments of a verb; None for what is not there.

    Raises:
        BadParameter: two sources or two budgets, or a source that may be one of two things.
    """
    given = arguments or []
    sources = [text for text in given if "=" not in text and not text.startswith("~")]
    budgets = [text.partition("=")[2] for text in given if text.startswith("budget=")]
    if "" in budgets:
        raise typer.BadParameter("budget= names no time: write budget=30m, 2h or 1h30m")
    if len(sources) > 1 or len(budgets) > 1:
        twice = sources if len(sources) > 1 else [f"budget={text}" for text in budgets]
        raise typer.BadParameter(f"{' and '.join(twice)}: one is enough; settings are written KEY=VALUE")
    overrides = [text for text in given if text not in sources and not text.startswith("budget=")]
    if sources:
        check_source(sources[0])
    return sources[0] if sources else None, budgets[0] if budgets else None, overrides


def check_source(source: str) -> None:
    """Refuse the name of scikit-learn's digits where a folder has it too: one of the two would be taken for the other.

    Raises:
        BadParameter: there is such a folder.
    """
    if source == "digits" and Path(source).exists():
        raise typer.BadParameter(
            "digits: scikit-learn's digits have this name, and so has a folder here. Write ./digits for the folder; "
            "for the others, rename it or work in another folder"
        )


def check_there(source: str | None) -> None:
    """Refuse a source that is not on this machine, before any service is asked for what is needed beside it.

    Args:
        source: None where there is none.

    Raises:
        NoSourceError: there is no such source, or it is of no kind that is known.
    """
    if source not in (None, "digits"):
        from pipelines.shards.ingest.trees import check_there as check

        check(source)


def check_file(option: str, path: Path, example: str) -> None:
    """Check, before any work, that the file can be written that an option names.

    Args:
        example: of the name of such a file.

    Raises:
        BadParameter: its folder is not there, it is a folder itself, or this user may not write it.
    """
    folder = path.absolute().parent  # os.path answers for what this user may not look at, where Path raises
    if not os.path.isdir(folder):
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}: make it, or name another")
    if os.path.isdir(path):
        raise typer.BadParameter(f"{option} {path} is a folder: name a file, such as {path / example}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise typer.BadParameter(f"{option} {path} cannot be written by this user: name another place")


def new_folder(path: Path | None) -> Path | None:
    """Return a folder that is written later and need not be there yet, after making it for a moment.

    Raises:
        BadParameter: it is a file, or cannot be made or written.
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
        why = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise typer.BadParameter(f"{path} cannot be made or written ({why}): name another folder") from error
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
    return path


def class_names(given: str | None) -> list[str] | None:
    """Return the names of classes that are given comma-separated; None where nothing is.

    Raises:
        BadParameter: a name is empty, or there twice.
    """
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise typer.BadParameter(f"--classes {given}: write names with a comma between each two, each of them once")
    return names


def show_verdict(verdict: Verdict, *, failed_only: bool = False) -> None:
    """Show the gate's decision below its table, or below those lines of it that do not pass."""
    for row in [row for row in verdict.rows if not (failed_only and row.passed)]:
        mark = "ok" if row.passed else "NO"
        terminal.stage("gate", f"{mark}  {row.name}: {row.figure} (asked for: {row.bound})")
    terminal.stage("gate", str(verdict))


def answer_json(as_json: bool, answer: dict[str, Any]) -> None:
    """Print the answer of a verb as one line of JSON where `--json` asks for it, the last line of stdout.

    Ray tells on stdout, from a thread of its own, of nodes that were lost, even where it is asked for no logs.
    """
    if as_json:
        print(json.dumps(answer), flush=True)
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            sys.stdout = sys.stderr
