from dataclasses import replace

import pytest

from ddpm.generate import Sampling
from pipelines.config import ConfigError, compose
from pipelines.evaluation.scores import Estimate
from pipelines.presentation.blocks import number
from pipelines.report import find_subject
from pipelines.report.gather import own_scores, tried_by_evaluations, tried_in_trial
from pipelines.report.sections import duration
from pipelines.search.study import TrialRecord
from tests.pipelines.report.facts import SCORES


def scored(distance: float, **settings: object):
    sampling = Sampling.of(steps=50, **settings).to_json()
    return replace(
        SCORES, estimates={"frechet_distance": Estimate(distance, distance - 1, distance + 1)}, sampling=sampling
    )


RECORDED = [
    ("evaluation/000000000500-aa.json", scored(9.0)),
    ("evaluation/000000001000-bb.json", scored(3.0, scale=1.0)),
    ("evaluation/000000001000-cc.json", scored(4.0, scale=3.0)),
]


def test_the_scores_of_a_checkpoint_are_those_of_its_own_settings_before_any_others():
    own = Sampling.from_json(RECORDED[1][1].sampling)
    assert own_scores(RECORDED, own, 1000, {})["frechet_distance"].value == 3.0
    assert own_scores(RECORDED, None, 1000, {})["frechet_distance"].value == 4.0
    assert own_scores(RECORDED, own, 500, {})["frechet_distance"].value == 9.0
    assert own_scores(RECORDED, own, 700, {}) is None


def test_of_several_evaluations_with_its_own_settings_the_one_in_the_checkpoints_record_is_shown():
    own = Sampling.from_json(RECORDED[1][1].sampling)
    recorded = [*RECORDED[:2], ("evaluation/000000001000-ff.json", scored(5.0, scale=1.0))]
    of_checkpoints = {one: {**scored(distance).metrics(), "other": 1.0} for one, distance in ((500, 9.0), (1000, 3.0))}
    assert own_scores(recorded, own, 1000, of_checkpoints)["frechet_distance"].value == 3.0
    assert own_scores(recorded, own, 1000, {})["frechet_distance"].value == 5.0


def test_evaluations_of_the_shown_checkpoint_are_points_by_guidance():
    found = tried_by_evaluations(RECORDED, 1000)
    assert [(t.scale, t.distance.y, t.distance.low, t.evaluations) for t in found] == [
        (1.0, 3.0, 2.0, None),
        (3.0, 4.0, 3.0, None),
    ]
    assert {t.source for t in found} == {"evaluations, 359 samples by classifier"}


def test_finished_trials_are_points_with_their_interval_and_unfinished_ones_none():
    scores = {"frechet_distance": 5.0, "standard_error": 0.5, "evaluations": 18.0, "samples": 359.0}
    record = TrialRecord("t", {"guidance.scale": 2, "sampler.kind": "ddim"}, "finished", scores)
    found = tried_in_trial("first", record)
    assert (found.source, found.scale, found.evaluations) == ("study first, 359 samples", 2.0, 18.0)
    assert (found.distance.low, found.distance.high) == pytest.approx((4.02, 5.98))
    assert tried_in_trial("first", replace(record, state="stopped")) is None
    assert tried_in_trial("first", replace(record, scores={"frechet_distance": float("nan")})) is None


def test_times_and_figures_are_said_shortly():
    assert [duration(s) for s in (4.2, 65, 3_700, 90_000)] == ["4 s", "1 min 5 s", "1 h 1 min", "25 h 0 min"]
    assert [number(v) for v in (None, 0.12345, 12_345.6, float("nan"))] == ["", "0.1235", "12,346", "not a number"]


def test_a_report_needs_an_mlflow_server_and_says_how_to_name_one():
    config = compose(["+experiment=digits"])
    with pytest.raises(ConfigError, match="or MLFLOW_TRACKING_URI"):
        find_subject("first", config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": None})}))
