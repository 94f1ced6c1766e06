"""The runs of a server, as a list, and their deletion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.tracking.client import client, first_answer, pages, reporting
from pipelines.tracking.run import ID_TAG, RUN_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY_TAG = "ddpm.study"
RETIRED_TAG = "ddpm.removed_run"
"""Of a run whose files were removed: the name that it had."""
ENDED = ("FINISHED", "FAILED", "KILLED")
_PAGE = 500


@dataclass(frozen=True)
class RunRecord:
    """What MLflow knows of a run of this project.

    Attributes:
        name: of the run, under which the same command finds it again.
        experiment: name of its experiment.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        deleted: whether it lies in MLflow's trash.
        began: seconds since the epoch.
        ended: seconds since the epoch; None for one that has not ended.
        study: the study that it is, or is a trial of; None for others.
        id: of the training run, which its folder has too; None for others, and in earlier releases.
        metrics: newest (value, step) of every curve by name.
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
        """Return whether `ddpm train` would resume this run of its name in an experiment."""
        return not self.deleted and self.experiment == experiment


def list_runs(uri: str, name: str | None = None) -> list[RunRecord]:
    """Return the runs of this project in all experiments of a server, the newest first, deleted ones included.

    Args:
        name: of the only run that is asked for; None for all.

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

    with reporting(uri):
        found = [_record(run, experiments) for run in pages(page)] if experiments else []
    return sorted(found, key=lambda record: -record.began)


def delete_run(uri: str, run_id: str) -> None:
    """Move a run into MLflow's trash, where `mlflow gc` deletes it for good; nothing happens where it is there."""
    with reporting(uri):
        if client(uri).get_run(run_id).info.lifecycle_stage != "deleted":
            client(uri).delete_run(run_id)


def retire_run(uri: str, run_id: str) -> None:
    """Take its name from a run, which stays: no training finds it by that name any more."""
    mlflow = client(uri)
    with reporting(uri):
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
