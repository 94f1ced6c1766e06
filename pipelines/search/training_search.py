"""The study behind `ddpm search training`: each trial is a distributed Ray Train run, judged by its samples.

Losses of different schedules are not comparable, so a trial is judged by the Frechet distance of samples with fixed
seeds and by the variational bound. Both are computed within the training, at rungs of growing numbers of images. ASHA
stops trials that are behind at a rung, and Optuna chooses the parameters of the next trial.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from pipelines.config import Config
from pipelines.scratch import scratch_folder
from pipelines.search.observer import Observer, identify
from pipelines.search.optuna_search import searcher
from pipelines.search.parameters import Params
from pipelines.search.study import StudyError, TrialRecord, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig
from pipelines.search.training_trial import Shared, TrainingTrial, rungs

# Tune's own tables and log files are switched off: a study has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Tune would take Ctrl-C for the end of the trials, and the study would be concluded; it is broken off, to be resumed.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")


class StopBehind(AsyncHyperBandScheduler):
    """ASHA, which stops the trials that are behind at a rung, but for one that trains to its end.

    Args:
        spared: name of that trial.
        records: trials of the study that have ended, with which others are compared at the rungs.
        options: of ASHA.
    """

    def __init__(self, spared: str, records: Iterable[TrialRecord] = (), **options: Any) -> None:
        super().__init__(**options)
        self.spared, self.last_rung = spared, options["max_t"]
        for record in records:
            trial = SimpleNamespace(trial_id=record.trial)  # all that ASHA asks of it
            self.on_trial_add(None, trial)
            for scores in record.history:
                super().on_trial_result(None, trial, scores)
            self.on_trial_remove(None, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return what becomes of a trial at a report; its score counts at the rung in any case."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if result.get("images_seen", 0) < self.last_rung and identify(trial)[0] == self.spared:
            return str(self.CONTINUE)
        return action


def text_width(study: StudyConfig, base: Config) -> int:
    """Return the width of the embeddings of captions that trials take; 0 where none is on text."""
    return max(int(width or 0) for width in (base.model.text_dim, *study.values("model.text_dim", base)))


def concurrency(study: StudyConfig, base: Config, resources: Mapping[str, float]) -> int:
    """Return how many trials the cluster can run at a time, each with all its workers.

    Raises:
        StudyError: the cluster has no room for one trial.
    """
    cluster = base.cluster
    workers = cluster.max_workers
    needed = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    room = min(int(resources.get(kind, 0) // need) for kind, need in needed.items() if need)
    if room < 1:
        listed = ", ".join(f"{need:g} {k} needed, {resources.get(k, 0):g} there" for k, need in needed.items() if need)
        raise StudyError(f"the Ray cluster has no room for one trial of {workers} workers: {listed}")
    return min(room, study.concurrent or room)


def run_trials(
    shared: Shared, records: Sequence[TrialRecord], observer: Observer, first: Sequence[Params] = ()
) -> None:
    """Run the trials that the study still lacks; the observer records them.

    Args:
        records: the trials so far.
        first: parameters to try after the values of the configuration and before any other.
    """
    study, base = shared.study, shared.base
    ended = [record for record in records if record.state != "running"]
    left = study.trials - len(ended)
    if left <= 0:
        return
    at = rungs(base.images, base.batch_size, study)
    # A trial itself needs no CPU, because its workers reserve their own resources.
    trainable = tune.with_resources(tune.with_parameters(TrainingTrial, shared=shared), {"cpu": 0, "memory": 1 << 20})
    with tempfile.TemporaryDirectory(prefix="tune-", dir=scratch_folder(), ignore_cleanup_errors=True) as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher(study, base, records, Path(scratch), first=[study.nearest(base), *first]),
                scheduler=StopBehind(
                    # The confirmation compares with the configuration as it stands, so that has to be trained.
                    trial_name(study.nearest(base)),
                    ended,  # those that were running report again
                    time_attr="images_seen",
                    metric=study.objectives[0],
                    mode=DIRECTIONS[study.objectives[0]],
                    max_t=at[-1],
                    grace_period=at[0],
                    reduction_factor=study.reduction,
                ),
                num_samples=left,
                max_concurrent_trials=concurrency(study, base, ray.cluster_resources()),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
