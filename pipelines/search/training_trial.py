"""One trial of a training study: a distributed Ray Train run that is judged at rungs of growing numbers of images."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.config import Config, ConfigError
from pipelines.search.judge import RungJudge
from pipelines.search.space import Params, Value, apply
from pipelines.search.study import TrialRecord, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import Trial
from pipelines.storage import Storage, join, layout
from pipelines.training import driver
from pipelines.training.errors import TrainingError
from pipelines.training.goodput import Session
from pipelines.training.ledger import read_sessions
from pipelines.training.prepare import prepare_run
from pipelines.training.ray_train.monitor import request_stop
from pipelines.training.ray_train.reusable_workers import ReusableWorkers

# Ray Train looks at its workers every two seconds by default, and so notices the end of a trial that much later.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

STOP_S = 120.0
"""Seconds that a run may take to stop: at most its start, a step, and a checkpoint."""


def rungs(images: int, batch_size: int, study: StudyConfig) -> tuple[int, ...]:
    """Return the images seen at which trials are judged: the whole length, and it divided by powers of `reduction`.

    Raises:
        ConfigError: the first rung would come before the end of the first batch.
    """
    found = [images // study.reduction**i // batch_size * batch_size for i in range(study.rungs - 1, 0, -1)]
    if found and found[0] < batch_size:
        raise ConfigError(
            f"search.rungs = {study.rungs} with search.reduction = {study.reduction} puts the first rung before the "
            f"first batch: use fewer rungs, or more images than {images:,}"
        )
    return (*found, -(-images // batch_size) * batch_size)


def trial_config(study: StudyConfig, base: Config, name: str, params: Params) -> Config:
    """Return the configuration of a trial's run: no sample grids, and one checkpoint, from the first rung on.

    At its end a run publishes its checkpoint, whose averaged weights the confirmation loads.

    Args:
        name: of the study.
    """
    config = apply(base, params)
    first = rungs(config.images, config.batch_size, study)[0]
    return config.model_copy(
        update={
            "name": f"{name}-{trial_name(params)}",
            "tracking": config.tracking.model_copy(update={"grid_every": None}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every": first, "keep": 1, "publish_every": 2 * config.images, "keep_best": None}
            ),
            "evaluation": config.evaluation.model_copy(update={"every": None}),  # the rungs are scored
            # A failure of the trial itself, such as a loss that is not finite, would repeat.
            "cluster": config.cluster.model_copy(update={"max_failures": min(1, config.cluster.max_failures)}),
        }
    )


class TrainingTrial(Trial):
    """A Ray Tune trial that runs a training and reports its scores; the actor and its workers are reused.

    The run trains in a thread. A trial that ASHA stops is asked to stop at a step boundary, as by Ctrl-C, before the
    next one begins. If the actor were killed instead, Ray would free its workers and their resources only later.
    """

    thread: threading.Thread
    reported: float
    error: BaseException | None

    def setup(
        self,
        config: dict[str, Value],
        *,
        study: StudyConfig,
        base: Config,
        lineage: Mapping[str, Any],
        tags: Mapping[str, str],
        judge: RungJudge,
    ) -> None:
        """Create the workers of this actor, and begin the first trial.

        Args:
            base: the configuration that the trials vary.
            lineage: which code runs, see `pipelines.environment.lineage`.
            tags: of the MLflow runs of trials, by which they belong to the study.
            judge: of all trials, but for a trial's rungs and the folder of its scores.
        """
        self.study, self.base, self.name, self.judge = study, base, tags["ddpm.study"], judge
        self.lineage, self.below = dict(lineage), dict(tags)
        self.workers = ReusableWorkers(self.name)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """End the present trial, and begin another with the same workers."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next scores and return them; the last ones are returned when the run has ended.

        Raises:
            TrainingError: the run failed.
        """
        while True:
            ended = not self.thread.is_alive()
            if self.error is not None:
                self.workers.close()
                raise self.error
            unreported = self._scores_above(self.reported)
            last = bool(unreported) and unreported[0]["images_seen"] >= self.judge.rungs[-1]
            if unreported and (ended or not last):
                self.reported = unreported[0]["images_seen"]
                return {**unreported[0], "done": last}
            if ended:
                raise TrainingError(f"run '{self.run_config.name}' ended before its last score")
            self.thread.join(0.5)

    def cleanup(self) -> None:
        """Stop the run and the workers at the end of the actor."""
        super().cleanup()
        self._end()
        self.workers.close()

    def _begin(self, params: Params) -> None:
        """Start the run of a trial in a thread."""
        config = self.run_config = trial_config(self.study, self.base, self.name, params)
        at = rungs(config.images, config.batch_size, self.study)
        self.judge = replace(
            self.judge, rungs=at, uri=join(layout.run_folder(config.storage.root, config.name), layout.RUNG_SCORES)
        )
        self.reported, self.error = -1.0, None
        self.thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        """Train the run to its end; an error is kept for `step`."""
        try:
            run = prepare_run(self.run_config, self.lineage, self.below)
            driver.train(replace(run, job=replace(run.job, evaluation_hook=self.judge)), workers=self.workers.provide)
        except BaseException as error:  # noqa: BLE001 - it is raised in Tune's own thread
            self.error = error

    def _scores_above(self, images_seen: float) -> list[dict[str, float]]:
        """Return the scores of rungs above a number of images, in order."""
        # The files are named by images seen, so that earlier ones need not be read.
        storage = self.judge.storage
        names = sorted(entry.uri for entry in storage.list(self.judge.uri))
        found = [uri for uri in names if int(uri.rsplit("/", 1)[-1].removesuffix(".json")) > images_seen]
        return [json.loads(storage.read(uri)) for uri in found]

    def _end(self) -> None:
        """Stop the run and wait until it has.

        Raises:
            TrainingError: it does not stop within `STOP_S`.
        """
        deadline = time.monotonic() + STOP_S
        while self.thread.is_alive():
            # Repeated, because a run that is only starting has no monitor yet that could be asked.
            request_stop(self.run_config)
            self.thread.join(0.5)
            if time.monotonic() > deadline:
                raise TrainingError(f"run '{self.run_config.name}' does not stop")


# --- where the wall time went --------------------------------------------------------------------------------


def trial_seconds(record: TrialRecord, sessions: Sequence[Session]) -> dict[str, float] | None:
    """Return how the wall time of a finished trial divides, in the order of time.

    Args:
        record: the trial.
        sessions: the ledger of its run.

    Returns:
        Seconds by what they were spent on; None where the trial did not finish, or was interrupted.
    """
    attempts = [attempt for session in sessions for attempt in session.attempts]
    if record.state != "finished" or len(attempts) != 1:
        return None
    (attempt,) = attempts
    spent = attempt.seconds
    return {
        "placement": attempt.began - record.began,
        "start-up": spent["startup"],
        "training": spent["step"] + spent["data"],
        "judging": spent["grid"],
        "checkpoints": spent["checkpoint"],
        "teardown": record.began + record.seconds - attempt.ended,
    }


def trial_sessions(record: TrialRecord, config: Config, name: str) -> Sequence[Session]:
    """Return the ledger of a trial's run in the study of this name."""
    return read_sessions(Storage.of(config), layout.run_folder(config.storage.root, f"{name}-{record.trial}"))


def median_seconds(records: Sequence[TrialRecord], config: Config, name: str) -> dict[str, float]:
    """Return the medians of `trial_seconds` over a study's trials; empty where no trial finished in one go."""
    found = [trial_seconds(record, trial_sessions(record, config, name)) for record in records]
    spent = [seconds for seconds in found if seconds is not None]
    return {part: statistics.median(s[part] for s in spent) for part in spent[0]} if spent else {}
