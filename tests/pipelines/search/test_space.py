"""A space gives configurations that are valid, or says which value of which path is not."""

import optuna
import pytest

from pipelines.config import ConfigError, compose
from pipelines.search.space import apply
from pipelines.search.study_config import StudyConfig, check_space, load_study

BASE = compose(["+experiment=digits"])


def study(space, kind="training", **options):
    return StudyConfig.model_validate({"kind": kind, "trials": 4, "space": space, **options})


@pytest.mark.parametrize("name", ["schedule", "guidance", "smoke"])
def test_shipped_spaces_are_valid_all_over(name):
    check_space(load_study(name), BASE)


def test_the_kinds_of_guidance_need_their_networks():
    kinds = load_study("guidance_kinds")
    with pytest.raises(ConfigError, match=r"guidance.kind = (classifier needs guidance.classifier|auto needs)"):
        check_space(kinds, BASE)
    guides = ["guidance.classifier=runs:/1", "guidance.weak=runs:/2/100"]
    check_space(kinds, compose(["+experiment=digits", *guides, "guidance.rescale=0.5"]))


def test_conditions_decide_what_a_trial_has():
    shipped = load_study("schedule")
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(3))
    drawn = [shipped.suggest(search.ask(), BASE) for _ in range(200)]
    for params in drawn:
        assert ("schedule.s" in params) == (params["schedule.kind"] == "cosine")
        assert ("schedule.tau" in params) == (params["schedule.kind"] == "sigmoid")
        assert apply(BASE, params).schedule.kind == params["schedule.kind"]
    assert {params["schedule.kind"] for params in drawn} == {"linear", "cosine", "sigmoid"}


def test_optuna_is_asked_for_what_exists_only():
    shipped = load_study("guidance")
    search = optuna.create_study(directions=["minimize"] * 2)
    for _ in range(20):
        trial = search.ask()
        params = shipped.suggest(trial, BASE)
        assert trial.params == params
        config = apply(BASE, params)
        assert config.sampler.kind == params["sampler.kind"]
        assert config.guidance.interval == (params["guidance.interval.0"], params["guidance.interval.1"])
        assert ("sampler.eta" in params) == (config.sampler.kind == "ddim")


def test_another_kind_keeps_what_both_have_and_nothing_else():
    base = apply(BASE, {"sampler.clip": 2.0, "sampler.eta": 0.5, "schedule.num_steps": 300})
    heun = apply(base, {"sampler.kind": "heun", "sampler.steps": 9, "schedule.kind": "linear"})
    kept = {"kind": "heun", "steps": 9, "clip": 2.0, "threshold": None}
    kept |= {"clip_when": "after_guidance", "precision": "fp32", "compile": False}
    assert heun.sampler.model_dump() == kept | {"spacing": "trailing", "timesteps": None, "time": "ratio"}
    assert heun.schedule.num_steps == 300
    assert not hasattr(heun.schedule, "s")


def test_a_condition_may_be_of_the_configuration_itself():
    space = {"sampler.eta": {"uniform": [0, 1], "when": {"sampler.kind": ["ddim", "ancestral"]}}}
    check_space(study(space, "guidance"), BASE)
    with pytest.raises(ConfigError, match=r"sampler.eta: `when` is never met"):
        check_space(study(space, "guidance"), apply(BASE, {"sampler.kind": "heun"}))


@pytest.mark.parametrize(
    "space, message",
    [
        ({"optim.rate": {"log": [1e-4, 1e-2]}}, r"optim\.rate.*no such field here.*Allowed: .*lr"),
        ({"optm.lr": {"log": [1e-4, 1e-2]}}, r"optm\.lr: there is no 'optm' here\. Did you mean 'optim'\?"),
        ({"optim.lr": {"uniform": [-0.1, 0.1]}}, r"with optim\.lr=-0\.1:\noptim\.lr: Input should be greater than 0"),
        ({"schedule.s": {"uniform": [0, 1]}, "schedule.kind": {"choice": ["linear"]}}, r"schedule\.s: no such field"),
        ({"objective.prediction": {"choice": ["eps", "noise"]}}, r"objective\.prediction: .*got 'noise'"),
        ({"batch_size": {"int": [100, 130]}}, r"data\.lanes = 4 must divide batch_size"),
        ({"guidance.interval.2": {"uniform": [0, 1]}}, r"guidance\.interval\.2: write an index from 0 to 1 for '2'"),
        ({"storage.root": {"choice": ["s3://x"]}}, r"storage\.root cannot be searched by a training study"),
        (
            {"optim.lr": {"log": [1e-4, 1e-2], "when": {"no.such": 1}}},
            r"optim\.lr depends on no\.such, which is neither",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_anything_starts(space, message):
    with pytest.raises(ConfigError, match=message):
        check_space(study(space), BASE)


def test_a_guidance_study_does_not_train():
    with pytest.raises(ConfigError, match=r"optim\.lr cannot be searched by a guidance study: trials share optim"):
        check_space(study({"optim.lr": {"log": [1e-4, 1e-2]}}, "guidance"), BASE)


def test_levels_of_one_kind_and_number_of_steps_go_with_these():
    base = compose(["+experiment=digits", "sampler.steps=2", "sampler.timesteps=[900.0,300.0,0.0]"])
    assert apply(base, {"guidance.scale": 2.0}).sampler.timesteps == (900.0, 300.0, 0.0)
    assert apply(base, {"sampler.steps": 5}).sampler.timesteps is None
    assert apply(base, {"sampler.kind": "dpm_solver"}).sampler.timesteps is None
