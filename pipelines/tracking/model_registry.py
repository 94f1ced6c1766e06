"""The model registry: models-from-code pyfuncs, their versions, and the aliases that point to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pipelines.storage.retry import PATIENCE_S
from pipelines.tracking.client import TrackingError, ask, authenticate, pages
from pipelines.tracking.run import Tracker
from pipelines.tracking.scoring import table_signature

if TYPE_CHECKING:
    from mlflow import MlflowClient


PYFUNC = "model"
"""Name of the logged model that a version is made from."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered model version.

    Attributes:
        run_id: the run that it came from.
        aliases: aliases that point to it now.
    """

    name: str
    version: str
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION."""
        return f"models:/{self.name}/{self.version}"

    @classmethod
    def of(cls, found: Any, aliases: Iterable[str]) -> ModelVersion:
        """Return a version as MLflow describes it, with aliases, which MLflow does not always name."""
        return cls(found.name, str(found.version), found.run_id or "", dict(found.tags), tuple(aliases))


@dataclass(frozen=True)
class Pyfunc:
    """The parts of a models-from-code pyfunc.

    Attributes:
        artifacts: name -> file or folder that the pyfunc receives.
        code: module that defines it.
        packages: source folders that are packaged with it.
        requirements: pip requirements.
        columns: column of the input table -> type; see `table_signature`.
        output: example of the output.
        params: parameter -> (type, default).
    """

    artifacts: Mapping[str, Path]
    code: Path
    packages: tuple[Path, ...]
    requirements: tuple[str, ...]
    columns: Mapping[str, str]
    output: NDArray[Any]
    params: Mapping[str, tuple[str, Any]]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that MLflow's functions for saving and logging share."""
        return {
            "python_model": str(self.code),
            "artifacts": {name: str(path) for name, path in self.artifacts.items()},
            "code_paths": [str(path) for path in self.packages],
            "pip_requirements": list(self.requirements),
            "signature": table_signature(self.columns, self.output, self.params),
        }


def log_pyfunc(tracker: Tracker, pyfunc: Pyfunc, images_seen: int) -> str:
    """Store a pyfunc with its files in the run; return the ID of the logged model.

    MLflow shows the run's metrics at `images_seen` as those of the model. Logged models of earlier calls without a
    version, because the process was killed in between, are deleted.

    Args:
        images_seen: by the model.
    """
    import mlflow

    authenticate()

    def log(client: MlflowClient) -> str:
        mlflow.set_tracking_uri(tracker.uri)
        _delete_unregistered(client, tracker.run_id)
        # MLflow's hints (types, input examples, nullable integers) are for authors of models, not for users.
        with warnings.catch_warnings(), mlflow.start_run(run_id=tracker.run_id, log_system_metrics=False):
            warnings.simplefilter("ignore")
            info = mlflow.pyfunc.log_model(name=PYFUNC, step=images_seen, **pyfunc.arguments())
        return str(info.model_id)

    # MLflow starts and ends the run for this; the run may be training, or may have been stopped.
    before = str(ask(tracker.uri, lambda client: client.get_run(tracker.run_id)).info.status)
    try:
        model_id = ask(tracker.uri, log)
    except BaseException:  # Ctrl-C too
        with suppress(TrackingError):
            replace(tracker, patience_s=0).status(before)
        raise
    tracker.status(before)
    return model_id


def _delete_unregistered(client: MlflowClient, run_id: str) -> None:
    wanted = f"source_run_id = '{run_id}' AND name = '{PYFUNC}'"
    experiment = client.get_run(run_id).info.experiment_id
    logged = list(pages(lambda token: client.search_logged_models([experiment], wanted, page_token=token)))
    made = pages(lambda token: client.search_model_versions(f"run_id = '{run_id}'", page_token=token)) if logged else ()
    sources = {version.source for version in made}
    for model in logged:
        if f"models:/{model.model_id}" not in sources:
            client.delete_logged_model(model.model_id)


def register(tracker: Tracker, name: str, model_id: str, tags: Mapping[str, str]) -> ModelVersion:
    """Create a version of a registered model from the result of `log_pyfunc`, or return the existing one."""
    from mlflow.exceptions import MlflowException

    before: list[set[Any]] = []  # the versions that each try has found

    def create(mlflow: MlflowClient) -> Any:
        try:
            mlflow.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model_id}"

        def made() -> list[Any]:
            found = mlflow.search_model_versions(f"name = '{name}' and run_id = '{tracker.run_id}'")
            return sorted((each for each in found if each.source == source), key=lambda each: int(each.version))

        there = made()
        before.append({each.version for each in there})
        # If an answer was lost, the version exists already.
        if not there:
            mlflow.create_model_version(
                name,
                source,
                run_id=tracker.run_id,
                model_id=model_id,
                tags={k: str(v) for k, v in tags.items()},
            )
            there = made()
        # MLflow's client repeats the request if the server is slow, which then creates two versions.
        first, *others = there
        for other in others:
            if other.version not in before[0]:
                mlflow.delete_model_version(name, other.version)
        return first

    created = ask(tracker.uri, create)
    return ModelVersion(name, str(created.version), tracker.run_id, dict(tags), ())


def version(uri: str, name: str, *, alias: str | None = None, number: str | None = None) -> ModelVersion | None:
    """Return a version by alias or number; None if there is none."""

    def find(mlflow: MlflowClient) -> Any:
        return mlflow.get_model_version_by_alias(name, alias) if alias else mlflow.get_model_version(name, number)

    found = _if_there(uri, find)
    return None if found is None else ModelVersion.of(found, found.aliases)


def versions(uri: str, name: str) -> list[ModelVersion]:
    """Return every version of a registered model, newest first."""
    found = ask(uri, lambda mlflow: mlflow.search_model_versions(f"name = '{name}'"))
    return [ModelVersion.of(v, v.aliases) for v in sorted(found, key=lambda v: -int(v.version))]


def aliases(uri: str, name: str) -> dict[str, str]:
    """Return alias -> version of a registered model, in one try; empty if there is no such model."""
    found = _if_there(uri, lambda mlflow: mlflow.get_registered_model(name), patience_s=0)
    return {} if found is None else {alias: str(number) for alias, number in found.aliases.items()}


def _if_there(uri: str, find: Callable[[MlflowClient], Any], patience_s: float = PATIENCE_S) -> Any:
    """Return what the server finds; None where it has no such thing."""
    from mlflow.exceptions import MlflowException

    def look(mlflow: MlflowClient) -> Any:
        try:
            return find(mlflow)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    return ask(uri, look, patience_s)


def set_alias(uri: str, name: str, alias: str, number: str) -> None:
    """Make an alias point to a version."""
    ask(uri, lambda mlflow: mlflow.set_registered_model_alias(name, alias, number))


def delete_alias(uri: str, name: str, alias: str) -> None:
    """Delete an alias, if it exists."""
    ask(uri, lambda mlflow: mlflow.delete_registered_model_alias(name, alias))


def version_description(uri: str, name: str, number: str) -> str:
    """Return the description of a version."""
    return str(ask(uri, lambda mlflow: mlflow.get_model_version(name, number)).description or "")


def describe_version(uri: str, name: str, number: str, text: str) -> None:
    """Set the description of a version, Markdown that its page shows."""
    ask(uri, lambda mlflow: mlflow.update_model_version(name, number, description=text))


def set_version_tags(uri: str, name: str, number: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""

    def write(mlflow: MlflowClient) -> None:
        for key, value in tags.items():
            mlflow.set_model_version_tag(name, number, key, value)

    ask(uri, write)


def download_version(uri: str, found: ModelVersion, folder: Path) -> Path:
    """Download a registered pyfunc below `folder` and return its folder; its parts are in `artifacts/`."""
    import mlflow

    def download(_: MlflowClient) -> str:
        authenticate()
        mlflow.set_tracking_uri(uri)
        return str(mlflow.artifacts.download_artifacts(found.uri, dst_path=str(folder)))

    return Path(ask(uri, download))


def all_versions(uri: str) -> list[ModelVersion]:
    """Return every version of every registered model."""

    def read(mlflow: MlflowClient) -> tuple[list[Any], list[Any]]:
        models = pages(lambda token: mlflow.search_registered_models(max_results=1000, page_token=token))
        found = pages(lambda token: mlflow.search_model_versions(max_results=1000, page_token=token))
        return list(models), list(found)

    models, found = ask(uri, read)
    # MLflow's search omits the aliases of versions, but not those of models.
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, str(number)), []).append(alias)
    return [ModelVersion.of(v, sorted(aliases.get((v.name, str(v.version)), []))) for v in found]
