"""The trials of a study: Optuna proposes them, Ray Tune runs them, and what becomes of each is for the observer."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.tune.result import TRIAL_INFO
from ray.tune.search.optuna import OptunaSearch

from pipelines.config import Config
from pipelines.environment.scratch import scratch_folder
from pipelines.search.observer import AXIS, Observer
from pipelines.search.space import Params
from pipelines.search.study import TrialRecord, ended, trial_name
from pipelines.search.study_config import DIRECTIONS, Objective, StudyConfig
from pipelines.search.watch import Beats

# A study shows a failed trial in one line of its own; Tune would add the stack traces of all actors.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
# Tune's own tables and log files are switched off: a study has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Tune would take Ctrl-C for the end of the trials, and the study would be concluded; it is broken off, to be resumed.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")


class Trial(tune.Trainable):
    """A trial that Ray Tune keeps no checkpoints of: what it has found is recorded, and a training run has its own.

    While its process runs it says so, see `TrialWatch`.
    """

    beats: Beats | None = None

    def __init__(self, config: dict[str, Any], storage: Any = None) -> None:
        self.beats = Beats(config[TRIAL_INFO].trial_id)  # before `setup`, which may stand still too
        super().__init__(config, storage)

    def cleanup(self) -> None:
        """Beat no more: the actor ends."""
        if self.beats is not None:
            self.beats.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


@dataclass(frozen=True)
class Trials:
    """How Ray Tune runs the trials of a study.

    Attributes:
        trainable: of Tune, with whatever the trials share.
        resources: that a trial itself reserves, by Tune's names.
        concurrent: trials at a time.
        stop, scheduler: of Tune, which end trials early.
    """

    trainable: Any
    resources: Mapping[str, float]
    concurrent: int
    stop: Callable[[str, dict[str, Any]], bool] | None = None
    scheduler: Any = None


def run_trials(
    trials: Trials,
    study: StudyConfig,
    base: Config,
    records: Sequence[TrialRecord],
    observer: Observer,
    first: Sequence[Params] = (),
) -> None:
    """Run the trials that the study still lacks; the observer records them.

    Args:
        records: the trials so far.
        first: parameters to try after the values of the configuration and before any other.
    """
    left = study.trials - len(ended(records))
    if left <= 0:
        return
    # Tune needs a folder for its own state, which is not used: the records are the state of the study.
    with tempfile.TemporaryDirectory(prefix="tune-", dir=scratch_folder(), ignore_cleanup_errors=True) as scratch:
        tune.Tuner(
            tune.with_resources(trials.trainable, dict(trials.resources)),
            tune_config=tune.TuneConfig(
                search_alg=searcher(study, base, records, Path(scratch), first=[study.nearest(base), *first]),
                scheduler=trials.scheduler,
                num_samples=left,
                max_concurrent_trials=trials.concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                stop=trials.stop,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


def past_of(
    study: StudyConfig,
    records: Iterable[TrialRecord],
    objectives: Sequence[Objective] | None = None,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """Return an Optuna study that holds the ended trials: TPE learns from it, and figures are drawn from it.

    Args:
        objectives: of the Optuna study; None for all of the study.
        storage: None for one in memory.
    """
    objectives = objectives or study.objectives
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    past = optuna.create_study(
        storage=storage,
        study_name="study",
        directions=["minimize" if DIRECTIONS[objective] == "min" else "maximize" for objective in objectives],
    )
    for record in records:
        if record.state == "running":
            continue
        values = [record.scores.get(metric, math.nan) for metric in objectives]
        judged = record.state in ("finished", "stopped") and all(map(math.isfinite, values))
        tried = optuna.trial.FixedTrial(record.params)
        for path in record.params:
            study.space[path].ask(tried, path)
        past.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if judged else TrialState.FAIL,
                values=values if judged else None,
                params=tried.params,
                distributions=tried.distributions,
                user_attrs={"trial": record.trial},
                intermediate_values={
                    int(report[AXIS[study.kind]]): report[objectives[0]]
                    for report in record.history
                    if {AXIS[study.kind], objectives[0]} <= report.keys()
                },
            )
        )
    return past


def searcher(
    study: StudyConfig, base: Config, records: Sequence[TrialRecord], folder: Path, first: Sequence[Params] = ()
) -> Any:
    """Return Ray Tune's `OptunaSearch` (multivariate TPE) that continues from the records of a study.

    Args:
        records: trials of this study; TPE learns from those that have ended, and those that were running come first.
        folder: for Optuna's journal while the search lasts; Ray Tune pickles the storage, so it cannot be in memory.
        first: parameters to try before any other, such as the best of earlier studies or the present default; those of
            which there is a trial already are not tried again.
    """
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    past = past_of(study, records, storage=storage)
    again = [r.params for r in records if r.state == "running"]
    # What a point leaves open is drawn, so that the trial that is made of it has more parameters, and another name.
    new = [p for p in first if not any(p.items() <= record.params.items() for record in records)]
    modes = [DIRECTIONS[objective] for objective in study.objectives]
    points = {trial_name(p): dict(p) for p in (*again, *new)}  # each once
    return OptunaSearch(
        space=partial(study.suggest, base=base),
        metric=list(study.objectives) if len(study.objectives) > 1 else study.objectives[0],
        mode=modes if len(modes) > 1 else modes[0],
        points_to_evaluate=list(points.values()) or None,
        sampler=sampler(study.seed + len(past.trials), study.random_trials),
        study_name="study",
        storage=storage,
    )


def sampler(seed: int, random_trials: int) -> Any:
    """Return Optuna's tree-structured Parzen estimator (TPE) with the options of studies.

    Args:
        random_trials: number of trials, ended ones included, after which it stops drawing at random.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # `group` and `constant_liar` are experimental
        return optuna.samplers.TPESampler(
            multivariate=True,
            group=True,  # one model for each group of conditional parameters that exist together
            seed=seed,
            n_startup_trials=random_trials,
            constant_liar=True,  # so that concurrent trials differ
        )
