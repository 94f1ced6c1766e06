"""The records are the truth: what has ended is Optuna's past, what was begun comes again, and nothing counts twice."""

import math
import re
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import compose
from pipelines.search.observer import describe_params
from pipelines.search.page import Page
from pipelines.search.study import (
    StudyError,
    StudyStore,
    TrialRecord,
    best,
    earlier_points,
    pareto_front,
    past_of,
    searcher,
    trial_name,
)
from pipelines.search.study_config import StudyConfig
from pipelines.storage import Storage

SPACE = {
    "guidance.scale": {"uniform": [0.0, 4.0]},
    "sampler.kind": {"choice": ["ddim", "heun"]},
    "sampler.steps": {"int": [2, 50]},
    "sampler.eta": {"uniform": [0.0, 1.0], "when": {"sampler.kind": "ddim"}},
}
STUDY = StudyConfig.model_validate({"kind": "guidance", "trials": 8, "space": SPACE})
BASE = compose(["+experiment=digits"])


def record(i, distance, evaluations=10.0, state="finished", **params):
    given_ = {"guidance.scale": 0.1 * i, "sampler.kind": "heun", "sampler.steps": 2 + i, **params}
    scores = {"frechet_distance": distance, "evaluations": evaluations, "samples": 100.0}
    return TrialRecord(trial_name(given_), given_, state, scores, [scores], began=float(i), seconds=1.0)


@pytest.fixture
def store(tmp_path):
    return StudyStore(Storage(), f"file://{tmp_path}/studies/first")


def test_a_trial_has_one_name_whatever_the_order_of_its_parameters():
    assert trial_name({"a": 1, "b": 2.5}) == trial_name({"b": 2.5, "a": 1}) != trial_name({"a": 1, "b": 2.6})


def test_records_come_back_in_the_order_in_which_they_began(store):
    for one in (record(2, 5.0), record(1, 6.0, state="failed"), record(3, math.nan)):
        store.record(one)
    assert [r.began for r in store.records()] == [1.0, 2.0, 3.0]
    assert store.get(record(2, 5.0).trial) == record(2, 5.0)
    assert store.get("nothing") is None


def test_a_study_is_begun_once_and_resumed_as_what_it_was(store):
    assert store.open(STUDY, BASE, "model", resume=False) == []
    with pytest.raises(
        StudyError, match=r"a study 'first' is at .*: go on with --resume, or give another --study NAME"
    ):
        store.open(STUDY, BASE, "model", resume=False)
    store.record(record(1, 5.0))
    assert store.open(STUDY, BASE, "model", resume=True) == [record(1, 5.0)]
    longer = STUDY.model_copy(update={"trials": 20})
    assert len(store.open(longer, BASE, "model", resume=True)) == 1
    elsewhere = compose(
        ["+experiment=digits", "data.cache_dir=/mnt/fast", "data.decode_threads=8", "cluster.num_workers=4"]
    )
    assert len(store.open(STUDY, elsewhere, "model", resume=True)) == 1
    for changed, named in (
        ((STUDY.model_copy(update={"samples": 17}), BASE, "model"), "space"),
        ((STUDY, compose(["+experiment=digits", "batch_size=64"]), "model"), "config"),
        ((STUDY, BASE, "another model"), "subject"),
    ):
        with pytest.raises(StudyError, match=rf"was begun with another {named}: resume it with the same"):
            store.open(*changed, resume=True)


def test_a_study_that_is_not_there_names_those_that_are(store):
    store.open(STUDY, BASE, "model", resume=False)
    other = StudyStore(store.storage, store.uri.replace("first", "second"))
    with pytest.raises(StudyError, match=r"no study at .*second; there are: first"):
        other.description()


@given(
    st.lists(
        st.tuples(st.floats(1, 50), st.integers(1, 50), st.sampled_from(["finished", "stopped", "failed", "running"])),
        max_size=20,
    )
)
def test_the_front_is_what_nothing_beats(trials):
    records = [record(i, d, float(e), state) for i, (d, e, state) in enumerate(trials)]
    front = pareto_front(records, ("frechet_distance", "evaluations"))
    finished = [r for r in records if r.state == "finished"]
    costs = [r.scores["evaluations"] for r in front]
    assert costs == sorted(costs)
    assert all(r.state == "finished" for r in front)
    for one in finished:
        beaten = any(
            other.scores["frechet_distance"] <= one.scores["frechet_distance"]
            and other.scores["evaluations"] <= one.scores["evaluations"]
            and other.scores != one.scores
            for other in finished
        )
        assert (one in front) is not beaten
    top = best(records)
    assert (top is None) is (not finished)
    if top:
        assert top.scores["frechet_distance"] == min(r.scores["frechet_distance"] for r in finished)


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


def test_the_search_is_the_same_for_the_same_seed_and_past(tmp_path):
    ended = [record(i, 5.0 + i) for i in range(12)]
    for name in "ab":
        (tmp_path / name).mkdir()
    one, two = (searcher(STUDY, BASE, ended, tmp_path / name).suggest("x") for name in "ab")
    assert one == two


def test_the_page_holds_everything_and_loads_nothing():
    records = [record(i, 9.0 - i, 10.0 + i) for i in range(6)]
    records += [record(8, 30.0, state="stopped"), record(9, math.nan, state="failed")]
    eta = {"sampler.kind": "ddim", "sampler.eta": 0.5}
    records.append(record(11, 3.5, 8.0, **eta))
    pictures = {records[-1].trial: np.zeros((5, 8, 8, 1), np.uint8)}
    text = Page("first", STUDY, "models:/digits@champion", records, pictures=pictures, command="ddpm search").html()
    for one in records:
        assert one.trial in text
    assert text.count("Plotly.newPlot") == 4
    own = re.sub(r"<script\b[^>]*>.*?</script>", "", text, flags=re.DOTALL)  # the library has much in its strings
    assert own.count('src="data:image/png;base64,') == 1
    assert not [word for word in ("<script", "<link", 'src="http', "url(") if word in own]
    assert "sampler.eta=0.5" in text  # the best trial's parameters, as the command line takes them


def test_a_page_of_a_study_that_has_just_begun():
    assert "Study first" in Page("first", STUDY, "a model", [record(1, math.nan, state="running")]).html()


def test_a_study_begins_with_the_best_of_earlier_ones_as_far_as_they_fit(store):
    store.open(STUDY, BASE, "model", resume=False)
    for i, distance in enumerate([9.0, 5.0, 7.0, 6.0, 8.0]):
        store.record(record(i, distance))
    store.record(record(7, 1.0, state="stopped"))
    points = earlier_points(STUDY, BASE, [store])
    assert points == [record(i, 0.0).params for i in (1, 3, 2)]
    narrow = STUDY.model_copy(update={"space": {"guidance.scale": STUDY.space["guidance.scale"]}})
    assert earlier_points(narrow, BASE, [store])[0] == {"guidance.scale": points[0]["guidance.scale"]}
    with pytest.raises(StudyError, match=r"no study at .*elsewhere; there are: first"):
        earlier_points(STUDY, BASE, [StudyStore(store.storage, store.uri.replace("first", "elsewhere"))])


def test_a_study_may_be_about_anything_that_is_measured():
    about = STUDY.model_copy(update={"objectives": ("precision", "recall", "evaluations")})
    records = []
    for i, (precision, recall) in enumerate([(0.9, 0.5), (0.6, 0.8), (0.5, 0.4), (0.7, 0.7), (0.65, 0.6)]):
        plain = record(i, 5.0)
        records.append(replace(plain, scores=plain.scores | {"precision": precision, "recall": recall}))
    assert best(records, "precision") == records[0]
    front = pareto_front(records, about.objectives)
    assert {r.trial for r in front} == {records[i].trial for i in (0, 1, 3)}
    past = past_of(about, records)
    assert [d.name for d in past.directions] == ["MAXIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert len(past.best_trials) == 3
    text = Page("second", about, "a model", records).html()
    assert "Precision against network evaluations per image" in text
    assert "no other trial is better in one of precision, recall, network evaluations per image" in text


def test_a_trial_in_a_line_names_every_parameter():
    params = {"guidance.kind": "auto", "sampler.kind": "heun", "sampler.steps": 7, "guidance.interval.0": 0.125}
    assert describe_params(params) == 'guidance.kind="auto" sampler.kind="heun" steps=7 interval.0=0.125'
