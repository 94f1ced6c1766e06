"""The page of a run in MLflow: its settings, lineage and dataset, and a description in words."""

from __future__ import annotations

import getpass
import os

from ddpm.image_size import in_words
from pipelines import tracking
from pipelines.config import Config
from pipelines.presentation import html
from pipelines.presentation.blocks import Section, Table
from pipelines.shards.index import Dataset
from pipelines.shards.joined import weight_in_words
from pipelines.storage import layout
from pipelines.tracking import Tracker, links
from pipelines.training.goodput import Goodput
from pipelines.training.loop.context import Job

GOODPUT_PAGE = "goodput.html"
"""The artifact of a run with the table of its ledger."""


def describe_run(job: Job) -> None:
    """Write the run's page again and set its status to running."""
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
        }
    )
    counts = {split: job.dataset.samples(split) for split in job.dataset.splits}
    tracker.dataset(job.dataset.uri.rsplit("/", 1)[-1], job.dataset.digest, job.dataset.uri, counts)
    tracker.text(tracking.to_json(config.model_dump(mode="json")), layout.CONFIG)
    resume = (
        f"resume with `ddpm train … name={config.name}`, sample with `ddpm sample runs:/{tracker.run_id} --out DIR`."
    )
    tracking.describe(tracker, {"Training": training_text(config, job.dataset), "Commands": resume})


def report_goodput(tracker: Tracker, goodput: Goodput, images_seen: int) -> None:
    """Record where the time of a run went: its goodput as a curve, all of it as a table among the artifacts."""
    tracker.metrics(goodput.metrics(), images_seen)
    tracker.text(goodput_page(goodput), GOODPUT_PAGE)
    table = links.run_page(tracker.experiment_id(), tracker.run_id, f"artifacts/{GOODPUT_PAGE}")
    tracking.describe(tracker, {"Goodput": f"{goodput_text(goodput)} [Where the time went]({table})"})


def goodput_text(goodput: Goodput) -> str:
    """Return the goodput of a run as a sentence."""
    lost = f", {goodput.recomputed_images:,} images were computed twice" if goodput.recomputed_images else ""
    return (
        f"{goodput.fraction:.1%}: {goodput.productive_s:,.0f} of {goodput.wall_s - goodput.idle_s:,.0f} s with a "
        f"driver were spent on steps that were kept{lost}."
    )


def goodput_page(goodput: Goodput) -> str:
    """Return the table of a run's ledger as HTML."""
    table = Table(("", "time", "what that is"), goodput.table(), frozenset([1]))
    return html.page("Where the time of the run went", "", [Section("time", "Goodput", [table])], "")


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


def training_text(config: Config, dataset: Dataset) -> str:
    """Return a sentence on the network, the data and the workers of a training."""
    classes = len(dataset.classes)
    pictures = f"{in_words(dataset.image_size)}{f', {classes} classes' if classes > 1 else ''}"
    classifier = config.task == "classifier"
    what = (
        f"a classifier of noisy images{' by caption' if config.model.text_dim else ''}"
        if classifier
        else f"{config.model.kind}, {config.objective.prediction}-prediction"
    )
    length = f"{config.images:,} images" if config.training_s is None else f"{config.training_s:,.0f} s on images"
    names = ", ".join(f"`{source.uri}` (weight {weight_in_words(source.weights)})" for source in dataset.sources)
    return (
        f"{what}, {config.schedule.kind} schedule, {length} of {names or f'`{dataset.uri}`'} ({pictures}; "
        f"{dataset.samples('train'):,} different ones) in batches of {config.batch_size} on {workers_text(config)}."
    )
