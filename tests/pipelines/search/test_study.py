"""Records of trials: how they are kept, found again, and compared."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import compose
from pipelines.search.observer import describe_params
from pipelines.search.page import StudyPage
from pipelines.search.space import Parameter
from pipelines.search.study import (
    StudyError,
    StudyStore,
    TrialRecord,
    best,
    earlier_points,
    pareto_front,
    trial_name,
    trials_seed,
)
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import past_of
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
    assert store.records()[1] == record(2, 5.0)


def test_a_study_that_is_not_there_yet_is_begun_by_a_command_that_would_resume_it(store):
    assert store.open(STUDY, BASE, "model", resume=True) == []
    assert store.study() == STUDY


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
    assert store.study().trials == 20  # as it was last started
    noise = json.loads(store.storage.read(f"{store.uri}/study.json"))["noise_seed"]
    assert noise == trials_seed(BASE, "first")
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


def test_what_earlier_studies_found_outside_of_a_space_is_not_tried_and_that_is_said(store):
    store.open(STUDY, BASE, "model", resume=False)
    gone = record(1, 5.0, **{"sampler.kind": "dpm2"})
    for one in (gone, record(2, 6.0, **{"guidance.scale": 4.5}), record(3, 7.0, **{"guidance.scale": 2})):
        store.record(one)
    said = []
    (point,) = earlier_points(STUDY, BASE, [store], notice=said.append)
    assert point == record(3, 7.0, **{"guidance.scale": 2.0}).params
    assert isinstance(point["guidance.scale"], float)
    assert said == ["of the best 3 trials of 'first' 2 are not tried: not in this space"]
    elsewhere = STUDY.model_copy(update={"space": {"sampler.spacing": Parameter(choice=("karras", "vp"))}})
    assert earlier_points(elsewhere, BASE, [store]) == []


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
    text = StudyPage("second", about, "a model", records).html()
    assert "Precision against network evaluations per image" in text
    assert "no other trial is better in one of precision, recall, network evaluations per image" in text


def test_a_trial_in_a_line_names_every_parameter():
    params = {"guidance.kind": "auto", "sampler.kind": "heun", "sampler.steps": 7, "guidance.interval.0": 0.125}
    assert describe_params(params) == 'guidance.kind="auto" sampler.kind="heun" steps=7 interval.0=0.125'


def test_a_space_that_an_earlier_release_stored_is_read_resumed_and_learned_from(tmp_path):
    (tmp_path / "study").mkdir()
    store = StudyStore(Storage(), f"file://{tmp_path}/study")
    space = {
        "guidance.scale": {"when": {}, "uniform": [0.5, 4.0]},
        "sampler.kind": {"when": {}, "choice": ["ddim", "heun"]},
        "sampler.steps": {"when": {}, "int": [4, 50]},
        "guidance.rescale": {"when": {"sampler.kind": ["heun"]}, "log": [0.001, 1.0]},
    }
    plain = {"kind": "guidance", "objectives": ["frechet_distance", "evaluations"], "random_trials": 10, "seed": 0}
    plain |= {"concurrent": None, "samples": 256, "rungs": 3, "reduction": 2, "bits_per_dim_images": 64}
    stored = {
        "space": {**plain, "space": space, "confirm": 3, "confirm_samples": 1024},
        "subject": "model",
        "trials": 8,
    }
    study = StudyConfig.model_validate({"kind": "guidance", "trials": 8, "space": space})
    stored |= {"config": store.describe(study, BASE, "model")["config"], "noise_seed": trials_seed(BASE, "study")}
    (tmp_path / "study" / "study.json").write_text(json.dumps(stored))
    done = record(30, 5.0, **{"guidance.rescale": 0.5})
    store.record(done)
    assert store.open(study, BASE, "model", resume=True) == [done]
    assert store.study() == study
    (trial,) = past_of(store.study(), store.records()).trials
    assert trial.params == done.params
    assert {path: repr(distribution) for path, distribution in trial.distributions.items()} == {
        "guidance.scale": "FloatDistribution(high=4.0, log=False, low=0.5, step=None)",
        "sampler.kind": "CategoricalDistribution(choices=('ddim', 'heun'))",
        "sampler.steps": "IntDistribution(high=50, log=False, low=4, step=1)",
        "guidance.rescale": "FloatDistribution(high=1.0, log=True, low=0.001, step=None)",
    }


def test_a_study_of_a_release_that_lacked_a_field_is_resumed_where_the_field_has_its_default(tmp_path):
    store = StudyStore(Storage(), f"file://{tmp_path}/study")
    store.open(STUDY, BASE, "model", resume=False)
    path = tmp_path / "study" / "study.json"
    older = json.loads(path.read_text())
    for section, name in (("model", "kind"), ("sampler", "spacing"), ("guidance", "shift"), ("objective", "p2_gamma")):
        del older["config"][section][name]
    path.write_text(json.dumps(older))
    assert store.open(STUDY, BASE, "model", resume=True) == []
    with pytest.raises(StudyError, match="was begun with another config"):
        store.open(STUDY, compose(["+experiment=digits", "sampler.spacing=karras"]), "model", resume=True)
