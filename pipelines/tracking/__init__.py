"""Recording of runs and models: the only package that talks to MLflow, apart from the served model itself.

`run` is one MLflow run, `note` its description, `links` the addresses of pages, `model_registry` the versions and
aliases, `scoring` the protocol of model servers, `run_log` the log of rank 0 during training, which is sent to every
sink through its own `outbox`. A sink is a class in one file and one line in `run_log.SINKS`.
"""

from pipelines.tracking.client import (
    FIRST_ANSWER_S,
    TrackingError,
    UnreachableError,
    authenticate,
    environment,
    warn_on_error,
)
from pipelines.tracking.logged_models import (
    CheckpointModel,
    checkpoint_models,
    enter_checkpoint_model,
    log_scores,
    starting_points,
    tag_checkpoint_model,
)
from pipelines.tracking.model_registry import (
    ModelVersion,
    Pyfunc,
    aliases,
    all_versions,
    delete_alias,
    describe_version,
    download_version,
    log_pyfunc,
    register,
    set_alias,
    set_version_tags,
    version,
    version_description,
    versions,
)
from pipelines.tracking.note import describe, pictures_at, pictures_of
from pipelines.tracking.run import (
    ID_TAG,
    Tracker,
    find_run,
    get_run,
    open_run,
    recorded_config,
    runs_of,
    to_json,
)
from pipelines.tracking.run_list import ENDED, RunRecord, delete_run, list_runs, retire_run
from pipelines.tracking.run_log import RunLog
from pipelines.tracking.scoring import Scoring, version_of_mlflow
from pipelines.tracking.sink import Destination, Sink
from pipelines.tracking.system_metrics import system_metrics

__all__ = [
    "ENDED",
    "FIRST_ANSWER_S",
    "ID_TAG",
    "CheckpointModel",
    "Destination",
    "ModelVersion",
    "Pyfunc",
    "RunLog",
    "RunRecord",
    "Scoring",
    "Sink",
    "Tracker",
    "TrackingError",
    "UnreachableError",
    "aliases",
    "all_versions",
    "authenticate",
    "checkpoint_models",
    "delete_alias",
    "delete_run",
    "describe",
    "describe_version",
    "download_version",
    "enter_checkpoint_model",
    "environment",
    "find_run",
    "get_run",
    "list_runs",
    "log_pyfunc",
    "log_scores",
    "open_run",
    "pictures_at",
    "pictures_of",
    "recorded_config",
    "register",
    "retire_run",
    "runs_of",
    "set_alias",
    "set_version_tags",
    "starting_points",
    "system_metrics",
    "tag_checkpoint_model",
    "to_json",
    "version",
    "version_description",
    "version_of_mlflow",
    "versions",
    "warn_on_error",
]
