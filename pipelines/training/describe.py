"""The page of a run in MLflow: its settings, lineage and dataset, and a description in words."""

from __future__ import annotations

import getpass
import os

from pipelines import tracking
from pipelines.config import Config
from pipelines.training.loop.shell import Job


def describe_run(job: Job) -> None:
    """Write the run's page anew and set its status to running."""
    config, tracker = job.config, job.tracker
    tracker.status("RUNNING")
    tracker.params(config.identity() | {"images": config.images, "name": config.name})
    commit = str(job.lineage.get("git_commit") or "unknown")
    tracker.tags(
        {
            "dataset_digest": job.dataset.digest,
            "dataset_uri": job.dataset.uri,
            "git_commit": commit,
            "code_version": str(job.lineage.get("code_version")),
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": f"ddpm train name={config.name}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": user_name(),
            "mlflow.note.content": _description(job),
        }
    )
    counts = {split: job.dataset.samples(split) for split in job.dataset.splits}
    tracker.dataset(job.dataset.uri.rsplit("/", 1)[-1], job.dataset.digest, job.dataset.uri, counts)
    tracker.text(tracking.to_json(config.model_dump(mode="json")), "config.json")


def user_name() -> str:
    """Return the name of this process's user, or its number where it has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def workers_text(config: Config) -> str:
    """Return the number of workers in words, such as "2 workers" or "1 to 4 workers"."""
    least, most = config.cluster.min_workers, config.cluster.max_workers
    return f"{most} workers" if least == most else f"{least} to {most} workers"


def _description(job: Job) -> str:
    """Return the text at the top of the run's page."""
    config = job.config
    return (
        f"{config.images:,} images of `{job.dataset.uri}` in batches of {config.batch_size} "
        f"on {workers_text(config)}: {config.objective.prediction}-prediction, "
        f"{config.schedule.kind} schedule. Steps of all curves are images seen. Sample grids are under *Artifacts*, "
        "`images/`, and, with a step slider, at the end of *Model metrics*. "
        f"Resume with `ddpm train … name={config.name}`; "
        f"sample with `ddpm sample runs:/{job.tracker.run_id} --out DIR`."
    )
