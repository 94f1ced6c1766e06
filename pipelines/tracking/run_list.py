"""The runs of a server, as a list, and their deletion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.tracking.client import as_tracking_errors, client, first_answer, pages
from pipelines.tracking.run import ID_TAG, RUN_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY_TAG = "ddpm.study"
RETIRED_TAG = "ddpm.removed_run"
"""Tag of a run whose files were removed, with its former name."""
ENDED = ("FINISHED", "FAILED", "KILLED")
_PAGE = 500


@dataclass(frozen=True)
class RunRecord:
    """MLflow's record of a run of this project.

    Attributes:
        name: name of the run.
        experiment: name of its experiment.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        deleted: whether it is in MLflow's trash.
        began: start, in seconds since the epoch.
        ended: end, in seconds since the epoch; None if it has not ended.
        study: name of its study, for studies and their trials; else None.
        id: id of the training run, also stored in its folder; None for other runs, and in earlier releases.
        metrics: metric -> newest (value, step).
    """

    run_id: str
    name: str
    experiment: str
    status: str
    deleted: bool = False
    began: float = 0.0
    ended: float | None = None
    study: str | None = None
    id: str | None = None
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def of(self, experiment: str) -> bool:
        """Return whether `ddpm train` in an experiment would resume this run."""
        return not self.deleted and self.experiment == experiment


def list_runs(uri: str, name: str | None = None) -> list[RunRecord]:
    """Return the runs of this project in all experiments of a server, newest first, including deleted ones.

    Args:
        name: name of a run; None for all runs.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    from mlflow.entities import ViewType

    experiments = {
        str(e.experiment_id): e.name
        for e in first_answer(uri, lambda mlflow: list(pages(_experiments_of(mlflow, ViewType.ALL))))
    }
    wanted = f"tags.`{RUN_TAG}` LIKE '%'" if name is None else f"tags.`{RUN_TAG}` = '{name}'"

    def page(token: str | None) -> Any:
        return client(uri).search_runs(list(experiments), wanted, ViewType.ALL, _PAGE, page_token=token)

    with as_tracking_errors(uri):
        found = [_record(run, experiments) for run in pages(page)] if experiments else []
    return sorted(found, key=lambda record: -record.began)


def delete_run(uri: str, run_id: str) -> None:
    """Move a run into MLflow's trash, from which `mlflow gc` deletes it, unless it is there already."""
    with as_tracking_errors(uri):
        if client(uri).get_run(run_id).info.lifecycle_stage != "deleted":
            client(uri).delete_run(run_id)


def retire_run(uri: str, run_id: str) -> None:
    """Move the name of a run to another tag, so that no training finds it by that name; the MLflow run is kept."""
    mlflow = client(uri)
    with as_tracking_errors(uri):
        name = mlflow.get_run(run_id).data.tags.get(RUN_TAG)
        if name is not None:
            mlflow.set_tag(run_id, RETIRED_TAG, name)
            mlflow.delete_tag(run_id, RUN_TAG)


def _experiments_of(mlflow: MlflowClient, view: int) -> Callable[[str | None], Any]:
    return lambda token: mlflow.search_experiments(view, _PAGE, page_token=token)


def _record(run: Any, experiments: Mapping[str, str]) -> RunRecord:
    info, tags = run.info, run.data.tags
    return RunRecord(
        run_id=info.run_id,
        name=tags[RUN_TAG],
        experiment=experiments[str(info.experiment_id)],
        status=info.status,
        deleted=info.lifecycle_stage == "deleted",
        began=(info.start_time or 0) / 1000,
        ended=info.end_time / 1000 if info.end_time else None,
        study=tags.get(STUDY_TAG),
        id=tags.get(ID_TAG),
        metrics={m.key: (m.value, m.step) for m in run.data._metric_objs},
    )
