"""The one door to MLflow: runs, metrics, pictures, artifacts and the model registry.

One training run is one MLflow run, found again by its name whatever crashed in between; steps are images seen. MLflow
is imported where it is first used: a worker that restarts is at its next step before a thread of its own needs it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from pipelines.errors import PipelineError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)

RUN_TAG = "ddpm.run"
KIND = "custom_model_development"
MONITOR_AFTER_S = 10.0
PATIENCE_S = 300.0
T = TypeVar("T")


class TrackingError(PipelineError):
    """MLflow cannot be reached, or does not have what was asked for; says how to fix it."""


class UnreachableError(TrackingError):
    """The server did not answer, or could not do now what it was asked for: worth another try."""


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


@dataclass(frozen=True)
class Tracker:
    """One MLflow run. Pickles, so that driver, workers and evaluation write to the same one."""

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client per process."""
        return _client(self.uri)

    @property
    def url(self) -> str:
        """The page of the run."""
        return f"{self.uri}/#/experiments/{self.client.get_run(self.run_id).info.experiment_id}/runs/{self.run_id}"

    def params(self, params: Mapping[str, Any]) -> None:
        """Record flat parameters; those that are recorded already with the same value stay."""
        from mlflow.entities import Param

        def write() -> None:
            with _reporting(self.uri):
                known = self.client.get_run(self.run_id).data.params
                fresh = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
                for i in range(0, len(fresh), 100):
                    self.client.log_batch(self.run_id, params=fresh[i : i + 100])

        patiently(write)

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int | None = None) -> None:
        """Points of curves at `step` images seen; sent twice with the same time, they are there once.

        Raises:
            UnreachableError: at once; `MetricLog` waits.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000) if at_ms is None else at_ms
        with _reporting(self.uri):
            self.client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def last_steps(self) -> dict[str, int]:
        """The last step of every curve by its name, and of every picture by images/KEY."""
        with _reporting(self.uri):
            run = self.client.get_run(self.run_id)
            # A run knows each curve's newest point; its history may be long. MLflow's own monitor reads it there too.
            steps = {m.key: m.step for m in run.data._metric_objs}
            for info in self.client.list_artifacts(self.run_id, "images"):
                key, word, step, *_ = f"{info.path}+++".split("+")
                if word == "step":
                    steps[key] = max(int(step), steps.get(key, -1))
        return steps

    def metric(self, key: str) -> list[tuple[int, float]]:
        """A recorded curve as (step, value)."""
        return [(m.step, m.value) for m in self.client.get_metric_history(self.run_id, key)]

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """A picture, uint8 [H, W, C], under a key whose pictures the page shows with a step slider."""
        with _reporting(self.uri):
            self.client.log_image(self.run_id, pixels, key=key, step=step, synchronous=True)

    def text(self, text: str, name: str) -> None:
        """A text file as an artifact."""

        def write() -> None:
            with _reporting(self.uri):
                self.client.log_text(self.run_id, text, name)

        patiently(write)

    def file(self, data: bytes, name: str) -> None:
        """A file as an artifact; its name may have folders."""
        folder, _, last = name.rpartition("/")

        def write() -> None:
            with tempfile.TemporaryDirectory(prefix="ddpm-artifact-") as scratch, _reporting(self.uri):
                (Path(scratch) / last).write_bytes(data)
                self.client.log_artifact(self.run_id, str(Path(scratch) / last), folder or None)

        patiently(write)

    def read_text(self, name: str) -> str:
        """A text artifact."""

        def read() -> str:
            with tempfile.TemporaryDirectory(prefix="ddpm-artifact-") as scratch, _reporting(self.uri):
                return Path(self.client.download_artifacts(self.run_id, name, scratch)).read_text()

        return patiently(read)

    def names(self, folder: str) -> list[str]:
        """Artifact paths in a folder."""

        def read() -> list[str]:
            with _reporting(self.uri):
                return [info.path for info in self.client.list_artifacts(self.run_id, folder)]

        return patiently(read)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        def write() -> None:
            with _reporting(self.uri):
                self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

        patiently(write)

    def tag(self, key: str) -> str | None:
        """A tag's value."""
        return self.client.get_run(self.run_id).data.tags.get(key)

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """The dataset that the run reads, as MLflow's page shows it; once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if not self.client.get_run(self.run_id).inputs.dataset_inputs:
            described = Dataset(name, digest[:36], "s3", source, profile=json.dumps(profile))
            self.client.log_inputs(
                self.run_id, [DatasetInput(described, [InputTag("mlflow.data.context", "training")])]
            )

    def status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        from mlflow.entities import RunStatus

        def write() -> None:
            with _reporting(self.uri):
                if status == "RUNNING":
                    self.client.update_run(self.run_id, status=status)
                else:
                    self.client.set_terminated(self.run_id, status=RunStatus.to_string(RunStatus.from_string(status)))

        patiently(write)


def patiently(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Repeat a call while the server does not answer.

    Raises:
        UnreachableError: it did not for `patience_s` seconds.
    """
    return Retrying(
        retry=retry_if_exception_type(UnreachableError),
        wait=wait_exponential_jitter(multiplier=0.5, max=10),
        stop=stop_after_delay(patience_s),
        reraise=True,
    )(call)


@contextmanager
def system_metrics(tracker: Tracker, node: str) -> Iterator[None]:
    """Log this machine's processor, memory, disk, network and GPUs to a run while the block runs, as system/NODE/…"""
    ending = threading.Event()
    monitors: list[Any] = []

    def watch() -> None:
        # What the monitor imports would hold up the first steps.
        if ending.wait(MONITOR_AFTER_S):
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow's monitor ends when the server is away for a moment: it is started again then.
        while not ending.is_set():
            try:
                monitor = SystemMetricsMonitor(
                    tracker.run_id, resume_logging=True, node_id=node, tracking_uri=tracker.uri
                )
                monitors.append(monitor)
                monitor.monitor()
            except Exception as error:  # noqa: BLE001 - whatever it is, training matters more
                logger.warning("system metrics of %s: %s", node, error)
            ending.wait(30)

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        for monitor in monitors[-1:]:
            monitor._shutdown_event.set()


def open_run(uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> tuple[Tracker, bool]:
    """The run of a name in an experiment and whether it was there before; opened where there is none.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    found_experiment = _answering(uri, client.get_experiment_by_name, experiment)
    if found_experiment is None:
        try:
            # The kind that opens the pages on training runs and charts, not on language-model traces.
            experiment_id = client.create_experiment(experiment, tags={"mlflow.experimentKind": KIND})
        except MlflowException:  # another run was faster
            experiment_id = client.get_experiment_by_name(experiment).experiment_id
    else:
        experiment_id = found_experiment.experiment_id
    found = _named(client, [experiment_id], name)
    if found is not None:
        return Tracker(uri, found), True
    run = client.create_run(experiment_id, run_name=name, tags={**tags, RUN_TAG: name})
    return Tracker(uri, run.info.run_id), False


def find_run(uri: str, experiment: str, name: str) -> Tracker | None:
    """The run of a name, if there is one."""
    client = _client(uri)
    found_experiment = _answering(uri, client.get_experiment_by_name, experiment)
    run_id = None if found_experiment is None else _named(client, [found_experiment.experiment_id], name)
    return None if run_id is None else Tracker(uri, run_id)


def get_run(uri: str, run_id: str) -> Tracker:
    """The run of an ID.

    Raises:
        TrackingError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        _client(uri).get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"no run {run_id} at {uri}: {error.message}") from error
    return Tracker(uri, run_id)


def log_pyfunc(
    tracker: Tracker,
    folder: Path,
    code: Path,
    packages: Iterable[Path],
    requirements: list[str],
    example: Any,
) -> str:
    """Store a models-from-code pyfunc with a model folder in the run; the ID of the logged model.

    Args:
        folder: the model folder, the artifact "model" of the pyfunc.
        code: the module that defines the pyfunc.
        packages: source folders that travel with it.
        example: (inputs, outputs, params) from which the signature is inferred.
    """
    import mlflow
    from mlflow.models import infer_signature

    inputs, outputs, params = example
    mlflow.set_tracking_uri(tracker.uri)
    # MLflow's hints (types, input examples, nullable integers) are for who writes the model, not for who trains.
    with warnings.catch_warnings(), mlflow.start_run(run_id=tracker.run_id, log_system_metrics=False):
        warnings.simplefilter("ignore")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code),
            artifacts={"model": str(folder)},
            code_paths=[str(p) for p in packages],
            pip_requirements=requirements,
            signature=infer_signature(inputs, outputs, params=params),
        )
    tracker.status("FINISHED")
    return str(info.model_id)


def register(tracker: Tracker, name: str, model_id: str, tags: Mapping[str, str]) -> ModelVersion:
    """A new version of a registered model, from what `log_pyfunc` stored."""
    from mlflow.exceptions import MlflowException

    client = tracker.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id=tracker.run_id,
        model_id=model_id,
        tags={k: str(v)[:4900] for k, v in tags.items()},
    )
    return ModelVersion(name, str(created.version), tracker.run_id, dict(tags), ())


def version(uri: str, name: str, *, alias: str | None = None, number: str | None = None) -> ModelVersion | None:
    """A version by alias or number, None where there is none."""
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(f"cannot read {name} from the registry at {uri}: {error.message}") from error
    return ModelVersion(name, str(found.version), found.run_id, dict(found.tags), tuple(found.aliases))


def versions(uri: str, name: str) -> list[ModelVersion]:
    """Every version of a registered model, newest first."""
    found = _client(uri).search_model_versions(f"name = '{name}'")
    numbered = sorted(found, key=lambda v: -int(v.version))
    return [ModelVersion(name, str(v.version), v.run_id, dict(v.tags), tuple(v.aliases)) for v in numbered]


def set_alias(uri: str, name: str, alias: str, number: str) -> None:
    """Move an alias."""
    _client(uri).set_registered_model_alias(name, alias, number)


def set_version_tags(uri: str, name: str, number: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        _client(uri).set_model_version_tag(name, number, key, value)


def download_version(uri: str, found: ModelVersion, folder: Path) -> Path:
    """The model folder inside a registered pyfunc, fetched below `folder`."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    local = mlflow.artifacts.download_artifacts(found.uri, dst_path=str(folder))
    return Path(local) / "artifacts" / "model"


def to_json(value: Any) -> str:
    """JSON as artifacts hold it."""
    return json.dumps(value, indent=1, sort_keys=True)


@lru_cache(maxsize=4)
def _client(uri: str) -> MlflowClient:
    # A server that is away must not hold a command for MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _named(client: MlflowClient, experiments: list[str], name: str) -> str | None:
    from mlflow.entities import ViewType

    runs = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{name}'", ViewType.ACTIVE_ONLY, max_results=1)
    return runs[0].info.run_id if runs else None


@contextmanager
def _reporting(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a `TrackingError`."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except requests.RequestException as error:
        raise UnreachableError(f"no answer from MLflow at {uri}: {error}") from error
    except MlflowException as error:
        message = error.message.splitlines()[0]
        kind = UnreachableError if error.get_http_status_code() >= 500 else TrackingError
        raise kind(f"MLflow at {uri}: {message}") from error


def _answering(uri: str, call: Any, *args: Any) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return call(*args)
    except MlflowException as error:
        raise TrackingError(
            f"no answer from MLflow at {uri}: {error.message.splitlines()[0]}. "
            "Check tracking.uri and MLFLOW_TRACKING_URI, or start the local stack with `ddpm up`"
        ) from error
