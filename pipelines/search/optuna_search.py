"""Optuna in a study: the records as its past, and Ray Tune's search algorithm that continues from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.search.parameters import Choice, Int, Log, Params, Uniform, Value
from pipelines.search.study import TrialRecord, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig


def past_of(study: StudyConfig, records: Iterable[TrialRecord], storage: Any = None) -> Any:
    """An Optuna study that knows the records: what TPE learns from, and what the pictures are made of.

    Args:
        storage: Optuna's; None for memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    past = optuna.create_study(
        storage=storage or optuna.storages.InMemoryStorage(),
        study_name="study",
        directions=["minimize" if DIRECTIONS[o] == "min" else "maximize" for o in study.objectives],
    )
    for record in records:
        values = [record.scores.get(metric, math.nan) for metric in study.objectives]
        judged = record.state in ("finished", "stopped") and all(map(math.isfinite, values))
        state = optuna.trial.TrialState.COMPLETE if judged else optuna.trial.TrialState.FAIL
        if record.state == "running":
            continue
        past.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values if judged else None,
                params=dict(record.params),
                distributions={path: _distribution(study, path) for path in record.params},
                user_attrs={"trial": record.trial},
            )
        )
    return past


def searcher(
    study: StudyConfig, base: Config, records: Sequence[TrialRecord], folder: Path, first: Sequence[Params] = ()
) -> Any:
    """Ray Tune's `OptunaSearch` (TPE, multivariate) that goes on from the records.

    Args:
        records: of this study: those that have ended are its past, those that were running come first.
        folder: for Optuna's journal, as long as the search lasts: Ray Tune pickles what it is given.
        first: tried before anything else, such as the best of earlier studies or the present default.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray.tune.search.optuna import OptunaSearch

    ended = [record for record in records if record.state != "running"]
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    past_of(study, ended, storage)
    tried = {record.trial for record in ended}
    again = [dict(r.params) for r in records if r.state == "running"]
    modes = [DIRECTIONS[objective] for objective in study.objectives]
    points = again + [dict(p) for p in first if trial_name(p) not in tried | {trial_name(a) for a in again}]
    return OptunaSearch(
        space=partial(_suggest, study, base),
        metric=list(study.objectives) if len(study.objectives) > 1 else study.objectives[0],
        mode=modes if len(modes) > 1 else modes[0],
        points_to_evaluate=points or None,
        sampler=sampler(study.seed + len(ended), study.random_trials),
        study_name="study",
        storage=storage,
    )


def sampler(seed: int, random_trials: int) -> Any:
    """Optuna's tree-structured Parzen estimator as studies use it.

    Args:
        random_trials: before it takes over, what has ended included.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group` and `constant_liar`
        return optuna.samplers.TPESampler(
            multivariate=True,
            group=True,  # conditional parameters: each group of those that exist together has a model of its own
            seed=seed,
            n_startup_trials=random_trials,
            constant_liar=True,  # trials that run at a time do not all try the same
        )


def _suggest(study: StudyConfig, base: Config, trial: Any) -> dict[str, Value]:
    return study.suggest(trial, base)


def _distribution(study: StudyConfig, path: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    parameter = study.space[path]
    if isinstance(parameter, Uniform):
        return FloatDistribution(*parameter.uniform)
    if isinstance(parameter, Log):
        return FloatDistribution(*parameter.log, log=True)
    if isinstance(parameter, Int):
        return IntDistribution(*parameter.bounds)
    assert isinstance(parameter, Choice)
    return CategoricalDistribution(parameter.choice)
