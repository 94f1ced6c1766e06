"""Optuna in a study: the records as its past, and Ray Tune's search algorithm that continues from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.search.parameters import Params
from pipelines.search.study import TrialRecord, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig


def past_of(study: StudyConfig, records: Iterable[TrialRecord], storage: Any = None) -> Any:
    """Return an Optuna study that holds the ended trials: TPE learns from it, and figures are drawn from it.

    Args:
        storage: an Optuna storage; None for one in memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    past = optuna.create_study(
        storage=storage or optuna.storages.InMemoryStorage(),
        study_name="study",
        directions=["minimize" if DIRECTIONS[o] == "min" else "maximize" for o in study.objectives],
    )
    for record in records:
        if record.state == "running":
            continue
        values = [record.scores.get(metric, math.nan) for metric in study.objectives]
        judged = record.state in ("finished", "stopped") and all(map(math.isfinite, values))
        tried = optuna.trial.FixedTrial(record.params)
        for path in record.params:
            study.space[path].ask(tried, path)
        past.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if judged else optuna.trial.TrialState.FAIL,
                values=values if judged else None,
                params=tried.params,
                distributions=tried.distributions,
                user_attrs={"trial": record.trial},
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
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray.tune.search.optuna import OptunaSearch

    ended = [record for record in records if record.state != "running"]
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    past_of(study, ended, storage)
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
        sampler=sampler(study.seed + len(ended), study.random_trials),
        study_name="study",
        storage=storage,
    )


def sampler(seed: int, random_trials: int) -> Any:
    """Return Optuna's tree-structured Parzen estimator (TPE) with the options of studies.

    Args:
        random_trials: number of trials, ended ones included, after which it stops drawing at random.
    """
    import optuna

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
