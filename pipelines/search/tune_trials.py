"""The trials of a study, run by Ray Tune; what becomes of each is for the observer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from pipelines.config import Config
from pipelines.scratch import scratch_folder
from pipelines.search.observer import Observer
from pipelines.search.optuna_search import searcher
from pipelines.search.parameters import Params
from pipelines.search.study import TrialRecord, ended
from pipelines.search.study_config import StudyConfig

# Tune's own tables and log files are switched off: a study has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Tune would take Ctrl-C for the end of the trials, and the study would be concluded; it is broken off, to be resumed.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")


def run_trials(
    trainable: Any,
    resources: Mapping[str, float],
    study: StudyConfig,
    base: Config,
    records: Sequence[TrialRecord],
    observer: Observer,
    concurrent: int,
    first: Sequence[Params] = (),
    *,
    stop: tune.Stopper | None = None,
    scheduler: Any = None,
) -> None:
    """Run the trials that the study still lacks; the observer records them.

    Args:
        trainable: of Tune, with whatever the trials share.
        resources: that a trial itself reserves, by Tune's names.
        records: the trials so far.
        concurrent: trials at a time.
        first: parameters to try after the values of the configuration and before any other.
        stop, scheduler: of Tune, which end trials early.
    """
    left = study.trials - len(ended(records))
    if left <= 0:
        return
    # Tune needs a folder for its own state, which is not used: the records are the state of the study.
    with tempfile.TemporaryDirectory(prefix="tune-", dir=scratch_folder(), ignore_cleanup_errors=True) as scratch:
        tune.Tuner(
            tune.with_resources(trainable, dict(resources)),
            tune_config=tune.TuneConfig(
                search_alg=searcher(study, base, records, Path(scratch), first=[study.nearest(base), *first]),
                scheduler=scheduler,
                num_samples=left,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                stop=stop,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
