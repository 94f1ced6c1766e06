"""Ray Tune's callback of a study: it records each trial and logs it to MLflow."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from pipelines import tracking
from pipelines.config import Config
from pipelines.search.space import Value
from pipelines.search.study import StudyStore, TrialRecord, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.search.watch import TrialWatch
from pipelines.storage import layout
from pipelines.tracking import ID_TAG, Tracker, TrackingError
from pipelines.training.errors import TrainingError
from pipelines.training.run_id import given_id

logger = logging.getLogger(__name__)
OnChange = Callable[["Observer"], None]
"""Called with the observer after every change of a trial, to show it."""
AXIS = {"training": "images_seen", "guidance": "samples"}
"""The score that counts how far a trial is, by kind of study; the step of its curves in MLflow."""


class Observer(Callback):
    """Ray Tune's callback of a study, and the only writer of its records.

    A training opens its MLflow run itself. Two that opened it at the same time would make two of it, so a training
    trial is logged from its first report on. One that is refused before has a run made here, with the id by which the
    trial finds it when it is tried again.

    MLflow may not answer while a study runs. Ray Tune's callbacks do not wait for it: trials that could not be logged
    are logged by `settle`, now or when the study is resumed.

    Args:
        store: holds the records.
        study: the settings of the study.
        tracker: the study's MLflow run, the parent of the trials' runs.
        config: names the MLflow experiment, and says after how many images a training trial is finished.
        on_change: called after every change of a trial.
        watch: ends trials whose process stands still.
    """

    def __init__(
        self,
        store: StudyStore,
        study: StudyConfig,
        tracker: Tracker,
        config: Config,
        on_change: OnChange = lambda observer: None,
        watch: TrialWatch | None = None,
    ) -> None:
        self.store, self.study, self.tracker, self.experiment = store, study, tracker, config.tracking.experiment
        self.root = config.storage.root
        # Of the axis, see `AXIS`: a trial that ends before was stopped.
        self.length = config.images if study.kind == "training" else study.samples
        self.on_change, self.watch = on_change, watch
        self.records: dict[str, TrialRecord] = {}
        self.unlogged: set[str] = set()
        self.began = time.monotonic()
        self.before = 0

    def begin(self, records: Sequence[TrialRecord]) -> None:
        """Start with the trials that are recorded already."""
        self.records = {record.trial: record for record in records}
        ended = [record.trial for record in records if record.state != "running"]
        self.before, self.unlogged = len(ended), set(ended)
        self.on_change(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what shows something: Ray Tune pickles its callbacks, and a terminal cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name not in ("on_change", "watch")}

    # --- callbacks of Ray Tune -------------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End trials whose process stands still; Ray Tune calls this all the time."""
        if self.watch is not None:
            self.watch.look(trials, lambda trial: identify(trial)[0])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial begins."""
        name, params = identify(trial)
        known = self.records.get(name)
        if known is None or known.state != "running":
            known = TrialRecord(name, params, "running")
        # One that was broken off reports again what it had reported: it starts anew, or its scores are stored.
        self._keep(replace(known, scores={}, history=[]), log=self.study.kind != "training")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record the scores that a trial reports."""
        scores = {name: float(result[name]) for name in _SCORES if name in result}
        self._keep(self.records[identify(trial)[0]].reported(scores))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ends, by itself or because other trials are better."""
        record = self.records[identify(trial)[0]]
        complete = record.scores.get(AXIS[self.study.kind], 0) >= self.length
        if not all(math.isfinite(record.scores.get(objective, math.nan)) for objective in self.study.objectives):
            self._keep(record.ended("failed", "its scores are not finite: the training diverged"))
        else:
            self._keep(record.ended("finished" if complete else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial fails; the study continues."""
        name, params = identify(trial)
        record = self.records.get(name) or TrialRecord(name, params, "running")
        stood_still = None if self.watch is None else self.watch.failed.get(trial.trial_id)
        self._keep(record.ended("failed", stood_still or _reason(trial)))

    # --- MLflow ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Log the trials that could not be logged before; a study whose trials have ended does not fail for it."""
        try:
            for name in sorted(self.unlogged):
                self._log(self.records[name], self.tracker.patience_s)
        except (TrackingError, TrainingError) as error:
            logger.warning(
                "%d trials are not logged to MLflow: %s; `ddpm search` with --resume does it", len(self.unlogged), error
            )

    def _keep(self, record: TrialRecord, log: bool = True) -> None:
        """Write a record, log it, and report the change."""
        self.records[record.trial] = record
        if log and record.run_id is None:
            # Recorded before its MLflow run is opened: a driver that is killed in between resumes the trial and finds
            # that run again.
            self.store.record(record)
        try:
            if log:
                self._log(record, patience_s=0)
        except (TrackingError, TrainingError) as error:
            logger.warning("trial %s is logged to MLflow later: %s", record.trial, error)
            self.unlogged.add(record.trial)
        self.store.record(self.records[record.trial])
        self.on_change(self)

    def _log(self, record: TrialRecord, patience_s: float) -> None:
        """Log what MLflow does not have yet: parameters, scores by axis, and the state of an ended trial."""
        if record.run_id is None:
            parent = {"mlflow.parentRunId": self.tracker.run_id, "ddpm.study": self.store.name}
            name, opened = f"{self.store.name}-{record.trial}", parent
            if self.study.kind == "training":
                opened = {**parent, ID_TAG: given_id(self.store.storage, layout.run_folder(self.root, name))}
            tracker, _ = tracking.open_run(self.tracker.uri, self.experiment, name, opened, patience_s)
            tracker = replace(tracker, patience_s=patience_s)
            tracker.tags(parent)
            tracker.params(record.params)
            record = self.records[record.trial] = replace(record, run_id=tracker.run_id)
        tracker = Tracker(self.tracker.uri, str(record.run_id), patience_s)
        if record.state != "running" and tracker.tag("ddpm.state") == record.state:
            self.unlogged.discard(record.trial)  # by an earlier driver of the study
            return
        axis = AXIS[self.study.kind]
        logged = max((step for step, _ in tracker.metric("search/frechet_distance")), default=-1)
        for scores in record.history:
            step = int(scores.get(axis, 0))
            if step > logged:
                finite = {f"search/{k}": v for k, v in scores.items() if math.isfinite(v)}
                tracker.metrics(finite, step)
        if record.state != "running":
            tracker.status({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[record.state])
            tracker.tags({"ddpm.state": record.state, **({"ddpm.error": record.error} if record.error else {})})
        self.unlogged.discard(record.trial)


def identify(trial: Any) -> tuple[str, dict[str, Value]]:
    """Return name and parameters of a Ray Tune trial."""
    params = {path: value for path, value in trial.config.items() if not path.startswith("_")}
    return trial_name(params), params


_SCORES = (
    "frechet_distance",
    "standard_error",
    "bits_per_dim",
    "samples",
    "images_seen",
    "evaluations",
    "class_accuracy",
    "precision",
    "recall",
)


def _reason(trial: Any) -> str:
    """Return the last line of a failed trial's error file, without the name of the error's class."""
    try:
        text = Path(trial.error_file).read_text() if trial.error_file else ""
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])[:500] if lines else "its process ended without an error message"


def describe_params(params: Mapping[str, Value]) -> str:
    """Return parameters in one line, with short numbers.

    A parameter is named by the last part of its path, or by the last two where that is ambiguous.
    """
    lasts = [path.split(".")[-1] for path in params]
    short = {
        ".".join(path.split(".")[-2:]) if last.isdecimal() or lasts.count(last) > 1 else last: value
        for (path, value), last in zip(params.items(), lasts, strict=True)
    }
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={json.dumps(v)}" for k, v in short.items())
