"""One MLflow run: parameters, metrics, pictures, artifacts, tags.

A training run is one MLflow run, which is found by name after any crash; steps are images seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from numpy.typing import NDArray

from pipelines.environment.scratch import temporary_folder
from pipelines.storage import layout
from pipelines.storage.retry import PATIENCE_S
from pipelines.tracking.client import FIRST_ANSWER_S, TrackingError, ask, first_answer, import_mlflow, warn_on_error
from pipelines.tracking.links import run_page

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "ddpm.run"
ID_TAG = "ddpm.id"
"""Tag of a training run with its id, which is also stored in its folder."""
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
T = TypeVar("T")


@dataclass(frozen=True)
class Tracker:
    """One MLflow run; picklable, so that driver, workers and evaluation write to the same run.

    Methods wait for an unavailable server for `patience_s` seconds and then raise `UnreachableError`; they raise
    `TrackingError` if the server refuses.

    Attributes:
        uri: address of the server.
        run_id: MLflow's ID of the run.
        patience_s: seconds for which a call waits for an unavailable server; 0 for a single try.
    """

    uri: str
    run_id: str
    patience_s: float = PATIENCE_S

    @property
    def url(self) -> str:
        """The page of the run in MLflow's view for training, or that of the server if it does not answer."""
        try:
            info = ask(self.uri, lambda client: client.get_run(self.run_id), patience_s=0).info
        except TrackingError:
            return self.uri
        return f"{self.uri}/{run_page(info.experiment_id, self.run_id)}"

    def experiment_id(self) -> str:
        """Return MLflow's ID of the run's experiment."""
        return str(self._ask(lambda client: client.get_run(self.run_id)).info.experiment_id)

    def params(self, params: Mapping[str, Any]) -> None:
        """Record flat parameters; recording the same value again has no effect."""
        entities = import_mlflow().entities

        def write(client: MlflowClient) -> None:
            known = client.get_run(self.run_id).data.params
            fresh = [entities.Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
            for i in range(0, len(fresh), 100):
                client.log_batch(self.run_id, params=fresh[i : i + 100])

        self._ask(write)

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int | None = None) -> None:
        """Record metrics at `step` images seen; recording them again with the same time has no effect.

        Args:
            at_ms: time of the points in milliseconds since the epoch; default: now.
        """
        entities = import_mlflow().entities

        now = int(time.time() * 1000) if at_ms is None else at_ms
        points = [entities.Metric(k, float(v), now, step) for k, v in values.items()]
        self._ask(lambda client: client.log_batch(self.run_id, metrics=points))

    def last_steps(self) -> dict[str, int]:
        """Return the last step of every curve by its name."""
        # A run has the newest point of each metric; histories may be long.
        run = self._ask(lambda client: client.get_run(self.run_id))
        return {m.key: m.step for m in run.data._metric_objs}

    def last_pictures(self) -> dict[str, int]:
        """Return the last step of every picture by images/KEY."""
        steps: dict[str, int] = {}
        for key, step in self._pictures():
            steps[key] = max(step, steps.get(key, -1))
        return steps

    def has_picture(self, key: str, step: int) -> bool:
        """Return whether a picture is recorded under a key at `step` images seen."""
        return (f"images/{key}", step) in self._pictures()

    def _pictures(self) -> list[tuple[str, int]]:
        named = [f"{name}+++".split("+")[:3] for name in self.names("images")]
        return [(key, int(step)) for key, word, step in named if word == "step"]

    def is_finished(self) -> bool:
        """Return whether the run's status says that it has seen all its images."""
        return bool(self._ask(lambda client: client.get_run(self.run_id)).info.status == "FINISHED")

    def is_deleted(self) -> bool:
        """Return whether the run is in MLflow's trash."""
        run = self._ask(lambda client: client.get_run(self.run_id))
        return bool(run.info.lifecycle_stage == "deleted")

    def metric(self, key: str) -> list[tuple[int, float]]:
        """Return a recorded curve as (step, value)."""
        return [(m.step, m.value) for m in self._ask(lambda client: client.get_metric_history(self.run_id, key))]

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Record a picture, uint8 [H, W, C], under a key; the page shows the pictures of a key with a step slider."""
        self._ask(lambda client: client.log_image(self.run_id, pixels, key=key, step=step, synchronous=True))

    def text(self, text: str, name: str) -> None:
        """Store a text file as an artifact."""
        self._ask(lambda client: client.log_text(self.run_id, text, name))

    def file(self, data: bytes, name: str) -> None:
        """Store a file as an artifact; its name may have folders."""
        folder, _, last = name.rpartition("/")

        def write(client: MlflowClient) -> None:
            with temporary_folder("artifact") as scratch:
                (scratch / last).write_bytes(data)
                client.log_artifact(self.run_id, str(scratch / last), folder or None)

        self._ask(write)

    def read_file(self, name: str) -> bytes:
        """Return the content of an artifact."""

        def read(client: MlflowClient) -> bytes:
            with temporary_folder("artifact") as scratch:
                return Path(client.download_artifacts(self.run_id, name, str(scratch))).read_bytes()

        return self._ask(read)

    def read_text(self, name: str) -> str:
        """Return a text artifact."""
        return self.read_file(name).decode()

    def names(self, folder: str | None = None) -> list[str]:
        """Return the artifact paths in a folder, or those at the top."""
        return [info.path for info in self._ask(lambda client: client.list_artifacts(self.run_id, folder))]

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        entities = import_mlflow().entities

        listed = [entities.RunTag(k, str(v)) for k, v in tags.items()]
        self._ask(lambda client: client.log_batch(self.run_id, tags=listed))

    def tag(self, key: str) -> str | None:
        """Return the value of a tag; None if it is not set."""
        return self._ask(lambda client: client.get_run(self.run_id)).data.tags.get(key)

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record the dataset that the run reads, as MLflow's page shows it; once."""
        entities = import_mlflow().entities

        described = entities.Dataset(name, digest[:36], urlsplit(source).scheme, source, profile=json.dumps(profile))

        def write(client: MlflowClient) -> None:
            if not client.get_run(self.run_id).inputs.dataset_inputs:
                tags = [entities.InputTag("mlflow.data.context", "training")]
                client.log_inputs(self.run_id, [entities.DatasetInput(described, tags)])

        self._ask(write)

    def status(self, status: str) -> None:
        """Set the run's status: RUNNING, FINISHED, FAILED or KILLED."""
        statuses = import_mlflow().entities.RunStatus

        def write(client: MlflowClient) -> None:
            if status == "RUNNING":
                client.update_run(self.run_id, status=status)
            else:
                client.set_terminated(self.run_id, status=statuses.to_string(statuses.from_string(status)))

        self._ask(write)

    def _ask(self, call: Callable[[MlflowClient], T]) -> T:
        return ask(self.uri, call, self.patience_s)


def open_run(
    uri: str, experiment: str, name: str, tags: Mapping[str, str], patience_s: float = FIRST_ANSWER_S
) -> tuple[Tracker, bool]:
    """Find or create the run of a name in an experiment; return it and whether it existed.

    Args:
        patience_s: seconds to wait for the first answer; more for an address that was used before.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    experiment_id = _experiment_id(uri, experiment, patience_s)

    def find_or_create(client: MlflowClient) -> tuple[str, bool]:
        found = _named(client, [experiment_id], name)
        if found is not None:
            return found, True
        run = client.create_run(experiment_id, run_name=name, tags={**tags, RUN_TAG: name})
        return str(run.info.run_id), False

    run_id, existed = ask(uri, find_or_create)
    return Tracker(uri, run_id), existed


def find_run(uri: str, experiment: str, name: str) -> Tracker | None:
    """Return the newest run of a name in an experiment; None if there is none.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    found = runs_of(uri, experiment, name)
    return found[0][0] if found else None


def runs_of(
    uri: str, experiment: str, name: str, patience_s: float = FIRST_ANSWER_S
) -> list[tuple[Tracker, str | None]]:
    """Return the runs of a name in an experiment, newest first, with their ids; None for runs of earlier releases.

    Args:
        patience_s: seconds to wait for the first answer.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    found = first_answer(uri, lambda client: client.get_experiment_by_name(experiment), patience_s)
    if found is None:
        return []
    runs = ask(uri, lambda client: _all_named(client, [str(found.experiment_id)], name))
    return [(Tracker(uri, run.info.run_id), run.data.tags.get(ID_TAG)) for run in runs]


def get_run(uri: str, run_id: str) -> Tracker:
    """Return the run of an ID.

    Raises:
        TrackingError: there is none.
    """
    try:
        first_answer(uri, lambda client: client.get_run(run_id))
    except TrackingError as error:
        if error.status in (400, 404):
            raise TrackingError(f"no run {run_id} at {uri}: {error}", error.status) from error
        raise
    return Tracker(uri, run_id)


def recorded_config(tracker: Tracker) -> dict[str, Any]:
    """Return the recorded configuration of a training run.

    Raises:
        TrackingError: it has none.
    """
    config: dict[str, Any] = json.loads(tracker.read_text(layout.CONFIG))
    return config


def to_json(value: Any) -> str:
    """Return a value as JSON text for an artifact."""
    return json.dumps(value, indent=1, sort_keys=True)


def _experiment_id(uri: str, experiment: str, patience_s: float) -> str:
    """Return the ID of an experiment, which is created if it does not exist.

    Its kind makes MLflow show training runs and charts; a kind that a user has chosen is kept.
    """
    found = first_answer(uri, lambda client: client.get_experiment_by_name(experiment), patience_s)
    if found is None:
        try:
            return str(ask(uri, lambda client: client.create_experiment(experiment, tags={KIND_TAG: KIND})))
        except TrackingError as error:
            found = ask(uri, lambda client: client.get_experiment_by_name(experiment))
            if found is None:  # else another run was faster
                raise error
    experiment_id, kind = str(found.experiment_id), found.tags.get(KIND_TAG, "")
    if kind in ("", "no_inferred_type") or kind.endswith("_inferred"):  # guessed by MLflow's page
        with warn_on_error(f"the kind of experiment '{experiment}'"):
            ask(uri, lambda client: client.set_experiment_tag(experiment_id, KIND_TAG, KIND), patience_s=0)
    return experiment_id


def _named(client: MlflowClient, experiments: list[str], name: str) -> str | None:
    runs = _all_named(client, experiments, name)
    return runs[0].info.run_id if runs else None


def _all_named(client: MlflowClient, experiments: list[str], name: str) -> list[Any]:
    active = import_mlflow().entities.ViewType.ACTIVE_ONLY
    return list(client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{name}'", active))
