"""How much a parameter matters, and when nobody can tell."""

import numpy as np
import pytest

from pipelines.search import importance
from pipelines.search.importance import importances
from pipelines.search.study import TrialRecord, trial_name
from pipelines.search.study_config import StudyConfig

SPACE = {name: {"uniform": [0.0, 1.0]} for name in ("guidance.scale", "guidance.rescale", "sampler.eta")}
STUDY = StudyConfig.model_validate({"kind": "guidance", "trials": 8, "space": SPACE})


@pytest.fixture(autouse=True)
def few_fits(monkeypatch):
    monkeypatch.setattr(importance, "TREES", 6)
    monkeypatch.setattr(importance, "REFITS", 8)


def trials(count, score, state="finished", seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        params = {name: float(rng.uniform()) for name in SPACE}
        scores = {"frechet_distance": float(score(params, rng)), "evaluations": 10.0}
        made.append(TrialRecord(trial_name(params), params, state, scores, began=float(i)))
    return made


def by_scale(params, rng):
    return 10 * params["guidance.scale"] + 0.1 * rng.normal()


def test_the_parameter_that_decides_the_score_comes_first_beyond_the_spread_of_refits():
    found = importances(STUDY, trials(24, by_scale))
    first, *others = found.shares
    assert first == "guidance.scale"
    assert found.shares[first].low > max(found.shares[path].high for path in others)
    assert "guidance.scale matters most in all of them" in found.remark
    assert all(0 <= share.low <= share.high <= 1 for share in found.shares.values())


def test_importances_in_noise_are_said_to_be_no_more_than_that():
    found = importances(STUDY, trials(24, lambda params, rng: 5 + rng.normal(), seed=1))
    assert sum(share.value for share in found.shares.values()) == pytest.approx(1)
    assert "cannot be told from so few trials" in found.remark


def test_six_trials_say_nothing_of_three_parameters():
    found = importances(STUDY, trials(6, by_scale))
    assert found.shares == {}
    assert found.remark == (
        "How much each parameter matters cannot be told from 6 finished trials: their 3 parameters need at least 18."
    )
    assert "no parameter varies" in importances(STUDY, []).remark


def test_trials_that_were_stopped_at_a_lower_fidelity_are_left_out():
    stopped = trials(30, lambda params, rng: 1000 * params["sampler.eta"], state="stopped", seed=2)
    finished = trials(18, by_scale)
    assert importances(STUDY, [*finished, *stopped]) == importances(STUDY, finished)
    assert not importances(STUDY, [*finished[:6], *stopped]).shares


def test_a_parameter_that_not_all_trials_have_or_that_never_varies_is_no_part_of_it():
    made = trials(18, by_scale)
    for i, one in enumerate(made):
        one.params["sampler.eta"] = 0.5
        if i == 0:
            del one.params["guidance.rescale"]
    assert list(importances(STUDY, made).shares) == ["guidance.scale"]


def test_equal_scores_have_no_importances():
    found = importances(STUDY, trials(18, lambda params, rng: 3.0))
    assert (found.shares, found.remark) == ({}, "All trials have the same score: no parameter matters.")
