"""The study behind `ddpm search training`: each trial is a distributed Ray Train run, judged by its samples.

Losses of different schedules are not comparable, so a trial is judged by the Frechet distance of samples with fixed
seeds and by the variational bound. Both are computed within the training, at rungs of growing numbers of images. ASHA
stops trials that are behind at a rung, and Optuna chooses the parameters of the next trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from pipelines.config import Config
from pipelines.search.observer import Observer, identify
from pipelines.search.parameters import Params
from pipelines.search.study import StudyError, TrialRecord, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig
from pipelines.search.training_trial import Shared, TrainingTrial, rungs
from pipelines.search.tune_trials import run_trials


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


def run_all(shared: Shared, records: Sequence[TrialRecord], observer: Observer, first: Sequence[Params] = ()) -> None:
    """Run the trials that the study still lacks; see `run_trials`."""
    study, base = shared.study, shared.base
    at, concurrent = rungs(base.images, base.batch_size, study), concurrency(study, base, ray.cluster_resources())
    scheduler = StopBehind(
        # The confirmation compares with the configuration as it stands, so that has to be trained.
        trial_name(study.nearest(base)),
        [record for record in records if record.state != "running"],  # those that were running report again
        time_attr="images_seen",
        metric=study.objectives[0],
        mode=DIRECTIONS[study.objectives[0]],
        max_t=at[-1],
        grace_period=at[0],
        reduction_factor=study.reduction,
    )
    trainable = tune.with_parameters(TrainingTrial, shared=shared)
    # A trial itself needs no CPU, because its workers reserve their own resources.
    needs = {"cpu": 0, "memory": 1 << 20}
    run_trials(trainable, needs, study, base, records, observer, concurrent, first, scheduler=scheduler)
