"""A study that makes no sense is refused, and overrides change one field of it."""

import subprocess
import sys

import pytest

from pipelines.config import ConfigError
from pipelines.report import gather
from pipelines.search import study_config
from pipelines.search.study_config import compose_study, load_study
from tests.pipelines.search.test_space import study


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("training", {"objectives": ["precision"]}, "a training study has frechet_distance or bits_per_dim"),
        ("training", {"objectives": ["bits_per_dim"], "bits_per_dim_images": 0}, "needs bits_per_dim_images"),
        ("guidance", {"objectives": ["bits_per_dim", "evaluations"]}, "is of the model, not of how it is sampled"),
        ("guidance", {"objectives": ["recall", "recall"]}, "each once"),
        ("guidance", {"objectives": []}, "at least 1 item"),
    ],
)
def test_objectives_that_a_study_cannot_have_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        study({"seed": {"int": [0, 1]}}, kind, **options)


def test_a_guidance_study_is_about_distance_and_cost_unless_told_otherwise():
    space = {"sampler.steps": {"int": [4, 8]}}
    assert study(space, "guidance").objectives == ("frechet_distance", "evaluations")
    assert study(space, "guidance", objectives=["precision", "recall"]).objectives == ("precision", "recall")
    assert study(space, "training").objectives == ("frechet_distance",)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shedule"], r"no study 'shedule': choose one of guidance, guidance_kinds, .*Did you mean 'schedule'\?"),
        (["schedule", ["search.trails=3"]], r"schedule\.yaml: trails: Extra inputs are not permitted"),
        (["schedule", ["search.trials=0"]], r"schedule\.yaml: trials: Input should be greater than 0, got 0"),
        (["schedule", ["search.space.optim.lr.lag=[1,2]"]], r"optim\.lr: a parameter is \{uniform: \[a, b\]\}"),
        (["schedule", ["search.space.optim.lr.log=[1e-4,1e-2"]], r"lr\.log=\[1e-4,1e-2: cannot be read: write sea"),
        (["schedule", ["search.trials"]], r"search\.trials: cannot be read: write search\.FIELD=VALUE, such as"),
    ],
)
def test_a_study_that_is_not_there_or_wrong_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_study(*arguments)


@pytest.mark.parametrize(
    "space, message",
    [
        ({}, "space is empty"),
        ({"optim.lr": {"log": [1e-2, 1e-4]}}, r"optim\.lr: the range \[0\.01, 0\.0001\] must be \[low, high\]"),
        (
            {
                "schedule.s": {"uniform": [0, 1], "when": {"schedule.kind": "cosine"}},
                "schedule.kind": {"choice": ["x"]},
            },
            r"schedule\.s depends on schedule\.kind, which must come before it",
        ),
        ({"optim.lr": {"choice": []}}, "at least 1 item"),
        ({"optim.lr": {"log": [1e-4, 1e-2], "uniform": [0, 1]}}, r"a parameter is \{uniform: \[a, b\]\}, \{log: "),
        ({"optim.lr": {"when": {"schedule.kind": "cosine"}}}, r"a parameter is \{uniform: \[a, b\]\}, \{log: "),
        ({"optim.lr": {"log": [0, 1]}}, "should be greater than 0"),
    ],
)
def test_a_space_that_makes_no_sense_in_itself_is_refused(space, message):
    with pytest.raises(ValueError, match=message):
        study(space)


@pytest.mark.parametrize(
    "text, message",
    [
        ("kind: training\nspace: {optim.lr: {log: [1, 2}", r"mine\.yaml is no YAML: while parsing a .* line 2"),
        ("kind: training  # f\xfcr mich\n", r"mine\.yaml is no text in UTF-8: .* position 19: invalid start byte"),
        ("- training\n", r"mine\.yaml: a study is a mapping from names to values, this is none"),
        ("training\n", r"mine\.yaml: "),
        ("kind: training\ntrials: 3\n", r"mine\.yaml: space: Field required"),
        ("kind: training\ntrials: 3\nspace: [optim.lr]\n", r"mine\.yaml: space: Input should be a valid dict"),
    ],
)
def test_a_file_that_is_no_study_is_named_with_what_is_wrong(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=message):
        load_study(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("space", ["", "space:\n", "space: {}\n", "space: {optim.lr: 3}\n"])
def test_overrides_may_give_what_a_file_leaves_open(tmp_path, space):
    (tmp_path / "mine.yaml").write_text(f"kind: training\ntrials: 3\n{space}")
    found = load_study(str(tmp_path / "mine.yaml"), ["search.space.optim.lr.log=[1e-4,1e-2]"])
    assert found.space["optim.lr"].log == (1e-4, 1e-2)


def test_overrides_change_a_study():
    changed = load_study("smoke", ["search.trials=5", "search.samples=99", "search.space.optim.lr.uniform=[1e-3,0.5]"])
    assert (changed.trials, changed.samples, changed.kind) == (5, 99, "training")
    assert changed.space["optim.lr"].uniform == (1e-3, 0.5)
    eta = load_study("guidance", ["search.space.sampler.eta.uniform=[0,0.5]"]).space["sampler.eta"]
    assert (eta.uniform, eta.when) == ((0, 0.5), {"sampler.kind": "ddim"})


def test_a_space_of_the_other_kind_is_refused_and_overrides_are_divided():
    with pytest.raises(ConfigError, match=r"the space 'guidance' is for `ddpm search guidance`, not for"):
        compose_study("guidance", "training", [])
    overrides = ["+experiment=digits", "search.trials=3", "seed=7"]
    chosen, config, of_run = compose_study("schedule", "training", overrides)
    assert (chosen.trials, config.seed, of_run) == (3, 7, ["+experiment=digits", "seed=7"])


def test_reading_a_study_does_not_import_optuna():
    """It is a fifth of a second more before the first line of every command that only reads what a study has found."""
    program = f"""
import sys
import {gather.__name__}, {study_config.__name__}
{study_config.__name__}.load_study("schedule")
assert "optuna" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
