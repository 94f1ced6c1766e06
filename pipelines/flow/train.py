"""The stage that trains: a new run, or one that goes on, until it has seen all its images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pipelines import checkpoints
from pipelines.checkpoints import newest_checkpoint
from pipelines.config import Config
from pipelines.flow.stage import TRAIN, Results, Site, Stage, StageSpec, StageStatus, digest, there
from pipelines.presentation.progress import Display, Notice, Report, TimeBreakdown, no_report
from pipelines.shards.index import Dataset
from pipelines.shards.joined import read_data, with_sources
from pipelines.shards.quarantine import Quarantine, read_quarantine, stream_digest
from pipelines.storage import Storage, join, layout
from pipelines.training import driver
from pipelines.training.describe import workers_text
from pipelines.training.driver import TrainingResult
from pipelines.training.errors import TrainingError
from pipelines.training.evaluations import has_outstanding
from pipelines.training.prepare import PreparedRun, prepare_run
from pipelines.training.run_id import find_training_run

LEAST_SHARE = 0.25
"""Share of the configured seconds that a training gets, however late it begins."""


@dataclass(frozen=True)
class Train(Stage[TrainingResult]):
    """Train the run of the configuration's name to its end."""

    spec: ClassVar[StageSpec] = TRAIN

    @property
    def output(self) -> str:
        """Address of the run's checkpoints."""
        return checkpoints.run_folder(self.config)

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digests of the data with their quarantine, and of the settings that decide the loss trace."""
        dataset = there(given.dataset)
        return {
            "data": stream_digest(*self._data(site, dataset)),
            "settings": digest({**self.config.identity(), "images": self.config.images}),
        }

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[TrainingResult]:
        """Look whether the run has seen all its images, and MLflow has all of it.

        Raises:
            ModelError: the run has other settings or data.
            TrainingError: the MLflow run of its name is that of a run in another folder.
        """
        config, storage = self.config, site.storage
        state = checkpoints.newest_checkpoint(config)
        if state is None:
            return StageStatus(None, f"run '{config.name}' has no checkpoint")
        checkpoints.check_resumable(state, config, *self._data(site, there(given.dataset)))
        length = state.ends_at(config)
        if state.images_seen < length:
            return StageStatus(None, f"run '{config.name}' has seen {state.images_seen:,} of {length:,} images")
        seen = f"run '{config.name}' has seen its {state.images_seen:,} images already"
        tracker = find_training_run(config)
        waits = storage.exists(join(self.output, layout.UNSENT))
        if tracker is None or waits or not tracker.is_finished():
            return StageStatus(None, f"{seen}, and MLflow does not have all of it")
        published = checkpoints.list_published(tracker)
        if not published:
            return StageStatus(None, f"{seen}, and MLflow names no published checkpoint")
        if has_outstanding(tracker, config, length):
            return StageStatus(None, f"{seen}, and a published checkpoint is not scored")
        return StageStatus(TrainingResult(tracker, "complete", state.images_seen, published[-1], None), seen)

    def _data(self, site: Site, dataset: Dataset) -> tuple[Dataset, Quarantine | None]:
        """Return what is trained on: the dataset of the flow, or a mixture that it judges, with what is left out."""
        return with_sources(self.config.data, dataset, read_quarantine(dataset.uri, site.storage), site.storage)

    def fills_time(self, site: Site) -> bool:
        """Return whether the run is to end at a time."""
        return site.training_ends is not None and self.config.training_s is not None

    def run(self, site: Site, given: Results) -> TrainingResult:
        """Train the run.

        Raises:
            TrainingError: it was stopped before it saw all its images, or MLflow does not name its checkpoint.
        """
        result = driver.train(*begin(self.config, site.lineage, site.display, site.training_ends))
        show_end(result, site.display)
        if result.status == "stopped":
            raise TrainingError(f"stopped at {result.images_seen} images; the same command goes on from there")
        if result.published is None:
            raise TrainingError(
                "MLflow does not name the run's published checkpoint yet; the same command goes on from here"
            )
        return result


def begin(
    config: Config, lineage: Mapping[str, Any], display: Display, ends: float | None = None
) -> tuple[PreparedRun, Report, Notice]:
    """Prepare a run, and say whether it is new, resumed or complete.

    Args:
        ends: as `Site.training_ends`.

    Returns:
        What `driver.train` takes.
    """

    def notice(text: str) -> None:
        display.stage("train", text)

    run = prepare_run(config, dict(lineage), notice=notice)
    if ends is not None and config.training_s is not None and run.resumes_at == 0:
        # What came before took more or less time than was expected.
        training_s = max(LEAST_SHARE * config.training_s, ends - time.monotonic())
        config = config.model_copy(update={"training_s": training_s})
        run = replace(run, job=replace(run.job, config=config))
    if run.complete:
        display.stage("train", f"skipped: run '{config.name}' has seen its {run.resumes_at:,} images already")
    elif run.resumes_at:
        display.stage("train", f"resuming run '{config.name}' at {run.resumes_at:,} of {run.length:,} images")
    else:
        timed = "" if config.training_s is None else f", or what fits {config.training_s:,.0f} s"
        display.stage("train", f"new run '{config.name}', {config.images:,} images{timed}, {workers_text(config)}")
    if not run.complete:
        display.stage("train", f"follow it at {run.job.tracker.url}")
    report = no_report if run.complete else display.training(run.length, run.resumes_at)
    return run, report, notice


def show_end(result: TrainingResult, display: Display) -> None:
    """Show where a training that was stopped goes on, and where the time of a run went."""
    if result.status == "stopped":
        display.stage("train", f"stopped with a checkpoint at {result.images_seen:,} images")
    if result.goodput is not None and result.status != "complete":
        goodput = result.goodput
        title = f"goodput {goodput.fraction:.1%}"
        display.breakdown(TimeBreakdown("goodput", title, goodput.parts(), goodput.wall_s, goodput.lines()))


def for_data(config: Config) -> Config:
    """Return the configuration whose run is of the data that are there now, because a run goes on with its own only.

    That is the given one where its run is of these data, may go on with others (`data.allow_changed`), or is not there
    yet; else one with the name NAME-DIGEST, the same for the same data. The registered model stays the same.

    Raises:
        DatasetError: there is no dataset.
        ModelError: none of the run's checkpoints is complete.
    """
    storage = Storage.of(config)
    state = newest_checkpoint(config)
    digest = stream_digest(*read_data(config.data, storage))
    if state is None or state.stream_digest == digest or config.data.allow_changed:
        return config
    return config.model_copy(update={"name": f"{config.name}-{digest[:8]}"})
