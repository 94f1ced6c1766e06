"""Who watches a study from the driver: records each trial, logs it to MLflow, and knows the best so far."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from pipelines import tracking
from pipelines.search.parameters import Value
from pipelines.search.study import StudyStore, TrialRecord, best, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.tracking import Tracker, TrackingError

OnChange = Callable[["Observer"], None]
"""Called with the observer after every change of a trial, to show it."""
AXIS = {"training": "images_seen", "guidance": "samples"}
"""What a trial's reports are counted in: the steps of its curves."""


class Observer(Callback):
    """Ray Tune's callback of a study; the only writer of its records.

    MLflow may be away: the records are the truth, and what could not be logged is logged by the next call of `settle`.

    Args:
        store: of the records.
        study: that is run.
        tracker: the study's own MLflow run, the parent of its trials'.
        experiment: of all of them.
        length: at which value of its axis a trial is finished; one that ends before was stopped.
        on_change: called after every change of a trial.
    """

    def __init__(
        self,
        store: StudyStore,
        study: StudyConfig,
        tracker: Tracker,
        experiment: str,
        length: float,
        on_change: OnChange = lambda observer: None,
    ) -> None:
        self.store, self.study, self.tracker, self.experiment = store, study, tracker, experiment
        self.length, self.on_change = length, on_change
        self.name = store.uri.rsplit("/", 1)[-1]
        self.records: dict[str, TrialRecord] = {}
        self.unlogged: set[str] = set()
        self.began = time.monotonic()
        self.before = 0

    def begin(self, records: Sequence[TrialRecord]) -> None:
        """Take over what is recorded already."""
        self.records = {record.trial: record for record in records}
        self.before = len([r for r in records if r.state != "running"])
        self.on_change(self)

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its callbacks, to restore what is never restored here; a terminal does not pickle."""
        return {name: value for name, value in self.__dict__.items() if name != "on_change"}

    # --- what Ray Tune tells ---------------------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        name, params = self._identify(trial)
        known = self.records.get(name)
        if known is None or known.state != "running":
            known = TrialRecord(name, params, "running")
        self._keep(known)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        name, _ = self._identify(trial)
        numbers = {
            key: float(value)
            for key, value in result.items()
            if key in _SCORES and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._keep(self.records[name].reported(numbers))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ends, by itself or because others are better."""
        name, _ = self._identify(trial)
        record = self.records[name]
        whole = record.scores.get(AXIS[self.study.kind], 0) >= self.length
        if not all(math.isfinite(record.scores.get(objective, math.nan)) for objective in self.study.objectives):
            self._keep(record.ended("failed", "its scores are not finite: the training diverged"))
        else:
            self._keep(record.ended("finished" if whole else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial fails; the study goes on."""
        name, params = self._identify(trial)
        record = self.records.get(name) or TrialRecord(name, params, "running")
        self._keep(record.ended("failed", _reason(trial)))

    # --- MLflow ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Log what MLflow could not take before.

        Raises:
            TrackingError: it is still away.
        """
        for name in sorted(self.unlogged):
            self._log(self.records[name])

    @property
    def best(self) -> TrialRecord | None:
        """The best so far."""
        return best(self.records.values(), self.study.objectives[0])

    def _keep(self, record: TrialRecord) -> None:
        self.records[record.trial] = record
        if record.run_id is None:
            # Before MLflow hears of it: whoever is killed in between asks for the trial again, and finds its run.
            self.store.record(record)
        try:
            self._log(record)
        except TrackingError:
            self.unlogged.add(record.trial)
        self.store.record(self.records[record.trial])
        self.on_change(self)

    def _log(self, record: TrialRecord) -> None:
        """Params at its beginning, curves by its axis, state and scores at its end; nothing twice."""
        run_name = f"{self.name}-{record.trial}"
        if record.run_id is None:
            parent = {"mlflow.parentRunId": self.tracker.run_id, "ddpm.study": self.name}
            tracker, _ = tracking.open_run(self.tracker.uri, self.experiment, run_name, parent)
            tracker.tags(parent)
            tracker.params(record.params)
            record = self.records[record.trial] = replace(record, run_id=tracker.run_id)
        tracker = Tracker(self.tracker.uri, str(record.run_id))
        axis = AXIS[self.study.kind]
        logged = max((step for step, _ in tracker.metric("search/frechet_distance")), default=-1)
        for scores in record.history:
            step = int(scores.get(axis, 0))
            if step > logged:
                finite = {f"search/{k}": v for k, v in scores.items() if math.isfinite(v)}
                tracker.metrics(finite, step)
        if record.state != "running":
            tracker.tags({"ddpm.state": record.state, **({"ddpm.error": record.error} if record.error else {})})
            tracker.status({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[record.state])
        self.unlogged.discard(record.trial)

    @staticmethod
    def _identify(trial: Any) -> tuple[str, dict[str, Value]]:
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
    """The last line of what a trial's process said, without the name of the error's class."""
    try:
        text = Path(trial.error_file).read_text() if trial.error_file else ""
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])[:500] if lines else "its process ended without a word"


def describe_params(params: Mapping[str, Value]) -> str:
    """A trial in a line: the last part of each path, or two where that tells too little, numbers short."""
    lasts = [path.split(".")[-1] for path in params]
    short = {
        ".".join(path.split(".")[-2:]) if last.isdecimal() or lasts.count(last) > 1 else last: value
        for (path, value), last in zip(params.items(), lasts, strict=True)
    }
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={json.dumps(v)}" for k, v in short.items())
