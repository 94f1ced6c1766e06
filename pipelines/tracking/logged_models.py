"""The checkpoints of a run as MLflow's logged models, which carry their scores; the weights stay on storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines.tracking.client import ask, import_mlflow, pages
from pipelines.tracking.run import RUN_TAG, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

IMAGES_TAG = "ddpm.images_seen"
_EXTERNAL = {"mlflow.model.isExternal": "true"}
"""MLflow's marker of a model whose weights are stored elsewhere."""


@dataclass(frozen=True)
class CheckpointModel:
    """The logged model of a checkpoint.

    Attributes:
        model_id: MLflow's ID of the logged model.
        tags: tags of the checkpoint.
    """

    model_id: str
    images_seen: int
    tags: Mapping[str, str]


def checkpoint_models(tracker: Tracker) -> dict[int, CheckpointModel]:
    """Return the logged models of a run's checkpoints by images seen."""

    def read(client: MlflowClient) -> list[Any]:
        experiment = client.get_run(tracker.run_id).info.experiment_id
        return _of_run(client, experiment, tracker.run_id)

    # If two processes created one at the same time, the older counts.
    found = sorted(ask(tracker.uri, read, tracker.patience_s), key=lambda model: -int(model.creation_timestamp))
    models = [CheckpointModel(m.model_id, int(m.tags[IMAGES_TAG]), dict(m.tags)) for m in found if IMAGES_TAG in m.tags]
    return {model.images_seen: model for model in models}


def enter_checkpoint_model(tracker: Tracker, images_seen: int, tags: Mapping[str, str]) -> CheckpointModel:
    """Create the logged model of a checkpoint with these tags, or return the existing one."""
    entities = import_mlflow().entities

    def enter(client: MlflowClient) -> str:
        run = client.get_run(tracker.run_id)
        experiment, at = run.info.experiment_id, {IMAGES_TAG: str(images_seen)}
        found = _of_run(client, experiment, tracker.run_id, f" AND tags.`{IMAGES_TAG}` = '{images_seen}'")
        if found:
            model = min(found, key=lambda model: int(model.creation_timestamp))
            client.set_logged_model_tags(model.model_id, dict(tags))
        else:
            model = client.create_logged_model(
                experiment,
                name=f"checkpoint-{images_seen:012d}",
                source_run_id=tracker.run_id,
                tags={**_EXTERNAL, **at, **tags},
                model_type="checkpoint",
            )
        if str(model.status) != entities.LoggedModelStatus.READY.value:
            client.finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY.value)
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            client.log_outputs(tracker.run_id, [entities.LoggedModelOutput(model.model_id, step=images_seen)])
        return str(model.model_id)

    model_id = ask(tracker.uri, enter, tracker.patience_s)
    return CheckpointModel(model_id, images_seen, {IMAGES_TAG: str(images_seen), **tags})


def tag_checkpoint_model(tracker: Tracker, model: CheckpointModel, tags: Mapping[str, str]) -> CheckpointModel:
    """Set tags of a logged model, and return it with them."""
    ask(tracker.uri, lambda client: client.set_logged_model_tags(model.model_id, dict(tags)), tracker.patience_s)
    return replace(model, tags={**model.tags, **tags})


def log_scores(
    tracker: Tracker, model: CheckpointModel, scores: Mapping[str, float], dataset: tuple[str, str], at_ms: int
) -> None:
    """Record the scores of a checkpoint in its run and on its logged model; recording them twice has no effect.

    Args:
        dataset: (name, digest) of the dataset.
        at_ms: time of the evaluation, in milliseconds since the epoch.
    """
    entities, (name, digest) = import_mlflow().entities, dataset
    points = [
        entities.Metric(
            key,
            float(value),
            at_ms,
            model.images_seen,
            model_id=model.model_id,
            dataset_name=name,
            dataset_digest=digest[:36],  # MLflow's limit
        )
        for key, value in scores.items()
    ]
    ask(tracker.uri, lambda client: client.log_batch(tracker.run_id, metrics=points), tracker.patience_s)


def starting_points(uri: str, run_id: str) -> list[str]:
    """Return the MODEL references to a run with which other runs of the server were started (`init_from`)."""

    def read(client: MlflowClient) -> list[Any]:
        experiments = [e.experiment_id for e in pages(lambda token: client.search_experiments(page_token=token))]
        wanted = f"params.init_from LIKE 'runs:/{run_id}%' AND tags.`{RUN_TAG}` LIKE '%'"
        return list(pages(lambda token: client.search_runs(experiments, wanted, page_token=token)))

    return [str(run.data.params["init_from"]) for run in ask(uri, read)]


def _of_run(client: MlflowClient, experiment: str, run_id: str, further: str = "") -> list[Any]:
    wanted = f"source_run_id = '{run_id}'{further}"
    return list(pages(lambda token: client.search_logged_models([experiment], wanted, page_token=token)))
