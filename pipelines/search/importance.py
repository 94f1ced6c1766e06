"""How much each parameter of a study matters (fANOVA, Hutter et al. 2014), and how far that can be trusted.

A forest that is fitted to few trials finds importances in noise as well, and they always add up to 1. So it is fitted
again to resampled trials (the bootstrap), and what these fits disagree about is shown; below a number of trials for
each parameter nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna

from ddpm.quality import Interval
from pipelines.search.study import TrialRecord, loss
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import past_of

TRIALS_PER_PARAMETER = 6
"""Finished trials for each parameter, below which importances are not shown.

Measured on 12 studies each with three parameters: scores of noise had one that "matters most" in none at 18 trials and
in one at 40; a parameter with four fifths of the variance was named in 10 and in 12.
"""
REFITS = 12
TREES = 16
COVERAGE = 0.9


@dataclass(frozen=True)
class Importances:
    """The importances of the parameters that all finished trials have.

    Attributes:
        shares: of the variance of the scores that a parameter explains, 0..1, by parameter, the largest first; the
            interval holds `COVERAGE` of those in fits to resampled trials. Empty where there are too few trials to say
            anything.
        remark: how far they can be trusted, or why there are none, in a sentence or two.
    """

    remark: str
    shares: dict[str, Interval] = field(default_factory=dict)


def importances(study: StudyConfig, records: Sequence[TrialRecord]) -> Importances:
    """Return the importances for a study's first objective.

    Trials that were stopped count for nothing: their scores are of less training, or of fewer samples.
    """
    judged = [r for r in records if r.state == "finished" and math.isfinite(loss(r, study.objectives[0]))]
    # fANOVA can only compare parameters that all trials have.
    shared = sorted(set.intersection(*(set(r.params) for r in judged))) if judged else []
    varied = [path for path in shared if len({repr(r.params[path]) for r in judged}) > 1]
    needed = TRIALS_PER_PARAMETER * max(len(varied), 1)
    if not varied or len(judged) < needed:
        why = f"their {len(varied)} parameters need at least {needed}" if varied else "no parameter varies among them"
        return Importances(f"How much each parameter matters cannot be told from {len(judged)} finished trials: {why}.")
    rng = np.random.default_rng(0)
    resampled = [[judged[i] for i in rng.integers(len(judged), size=len(judged))] for _ in range(REFITS)]
    fits = [fit for i, some in enumerate([judged, *resampled]) if (fit := _fanova(study, some, varied, seed=i))]
    if len(fits) < 2:
        return Importances("All trials have the same score: no parameter matters.")
    ends = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    spread = {path: np.quantile([fit[path] for fit in fits[1:]], ends).tolist() for path in varied}
    shares = {path: Interval(fits[0][path], low, high, (len(judged),)) for path, (low, high) in spread.items()}
    first, *others = ordered = sorted(varied, key=lambda path: -shares[path].value)
    level = [path for path in others if shares[path].high >= shares[first].low]
    remark = f"Of {len(judged)} finished trials; the bars hold {COVERAGE:.0%} of {REFITS} fits to resampled trials."
    if level:
        remark += f" {', '.join([first, *level])}: which of these matters most cannot be told from so few trials."
    elif others:
        remark += f" {first} matters most in all of them."
    return Importances(remark, {path: shares[path] for path in ordered})


def _fanova(study: StudyConfig, records: Sequence[TrialRecord], paths: list[str], seed: int) -> dict[str, float]:
    """Return the importances by one forest; nothing where all scores, or all values of a parameter, are equal."""
    past = past_of(study, records, study.objectives[:1])
    fanova = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
    try:
        found = optuna.importance.get_param_importances(past, evaluator=fanova, params=paths)
    except (RuntimeError, ValueError):  # there is no variance to explain
        return {}
    return {path: float(found.get(path, 0.0)) for path in paths}
