"""What has ended is Optuna's past, what was begun comes again, and nothing counts twice."""

import math

import optuna

from pipelines.search.study import trial_name
from pipelines.search.tune_trials import past_of, searcher
from tests.pipelines.search.test_study import BASE, STUDY, record


def test_optuna_knows_what_has_ended_and_is_asked_for_what_was_begun(tmp_path):
    ended = [record(i, 5.0 + i) for i in range(4)] + [record(9, math.nan, state="failed")]
    begun = record(7, math.nan, state="running")
    past = past_of(STUDY, [*ended, begun])
    states = [trial.state for trial in past.trials]
    assert states == [optuna.trial.TrialState.COMPLETE] * 4 + [optuna.trial.TrialState.FAIL]
    assert past.trials[0].params == ended[0].params
    again = searcher(STUDY, BASE, [*ended, begun], tmp_path, first=[ended[0].params, STUDY.nearest(BASE)])
    again.set_search_properties(None, None, {})
    assert again.suggest("a") == begun.params
    assert again.suggest("b") == STUDY.nearest(BASE)  # what has ended is not asked for again
    fresh = again.suggest("c")
    assert trial_name(fresh) not in {r.trial for r in ended}
    again.on_trial_complete("a", {"frechet_distance": 1.0, "evaluations": 5.0})
    assert len(again._ot_study.trials) == 5 + 3


def test_a_point_that_is_given_twice_is_tried_once(tmp_path):
    default, other = STUDY.nearest(BASE), record(1, 5.0).params
    asked = searcher(STUDY, BASE, [], tmp_path, first=[default, other, dict(reversed(default.items()))])
    assert asked._points_to_evaluate == [default, other]


def test_the_search_is_the_same_for_the_same_seed_and_past(tmp_path):
    ended = [record(i, 5.0 + i) for i in range(12)]
    for name in "ab":
        (tmp_path / name).mkdir()
    one, two = (searcher(STUDY, BASE, ended, tmp_path / name).suggest("x") for name in "ab")
    assert one == two


def test_a_point_that_leaves_parameters_open_is_tried_once_however_often_the_study_goes_on(tmp_path):
    ended, begun = record(1, 5.0), record(2, math.nan, state="running")
    points = [{"guidance.scale": r.params["guidance.scale"]} for r in (ended, begun, record(3, 5.0))]
    asked = searcher(STUDY, BASE, [ended, begun], tmp_path, first=points)
    assert asked._points_to_evaluate == [begun.params, points[2]]
