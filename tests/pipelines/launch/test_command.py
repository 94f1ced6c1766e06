"""What a cluster runs: the words, the name, the addresses."""

import shlex

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.app import app
from pipelines.config import ConfigError, compose
from pipelines.launch import overrides_of, parse_command, require_reachable, with_addresses
from pipelines.launch.command import FLAGS, NAME_LENGTH, VERBS, object_name
from tests.pipelines.launch.rendered import TRAIN, command


def test_the_cluster_gets_the_command_without_addresses_and_settings_of_the_launch():
    made = command("kuberay", *TRAIN, "launch.image=x", "launch.zone=a", "storage.endpoint_url=http://s3:1")
    assert made.shell() == "ddpm train +experiment=digits name=first storage=s3 storage.root=s3://bucket/team"
    assert made.environment() == {
        "MLFLOW_TRACKING_URI": "http://mlflow.mlflow.svc:5000",
        "AWS_ENDPOINT_URL": "http://s3:1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }


def test_words_survive_a_shell():
    words = ["train", "+experiment=digits", "cluster.num_workers=[1,2]", "data.source='a b; rm -rf $HOME'"]
    assert shlex.split(command("ray", *words).shell()) == ["ddpm", *words]


def test_what_the_cluster_runs_composes_to_the_configuration_of_the_launch():
    made = command("kuberay", *TRAIN, "launch.image=x", "optim.lr=0.5", "+evaluation.n=7")
    again = compose(made.arguments)
    left_out = {"launch": True, "tracking": {"uri"}}
    assert again.model_dump(exclude=left_out) == made.config.model_dump(exclude=left_out)
    assert again.identity() == made.config.identity()


@pytest.mark.parametrize(
    "words, name",
    [
        (TRAIN, "first"),
        (["evaluate", "models:/digits/1", "name=first"], "first-evaluate"),
        (["search", "guidance", "--model", "models:/digits/1", "name=first"], "first-search-guidance"),
        (["train"], "digits"),
        (["index", "s3://bucket/datasets/birds/", "--split", "train"], "birds-index"),
        (["check", "--quarantine", "s3://bucket/datasets/birds"], "birds-check"),
        (["check", "s3://bucket/datasets/birds", "name=first"], "first-check"),
    ],
)
def test_a_job_is_named_after_its_run_and_verb(words, name):
    assert command("ray", *words).name == name == command("ray", *words).object_name


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", fullmatch=True))
def test_names_become_names_of_kubernetes(name):
    import re

    found = object_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(found) <= NAME_LENGTH


def test_names_that_differ_stay_different():
    names = ["run", "Run", "RUN", "r.un", "r-un", "2run", "run.", "x" * 60, "x" * 61]
    assert len({object_name(name) for name in names}) == len(names)
    assert object_name("first-run-2") == "first-run-2"


def test_only_the_settings_of_the_configuration_are_composed():
    words = ["search", "training", "+experiment=digits", "search.trials=4", "--space", "schedule", "seed=1"]
    assert overrides_of(words) == ["+experiment=digits", "seed=1"]
    assert overrides_of(["ingest", "photos", "--to", "s3://b/x=1", "data.image_size=8"]) == ["data.image_size=8"]
    assert command("ray", *words).arguments == ("--resume", *words[2:])
    index = ["index", "s3://b/d", "--split", "train=a*", "--replace", "seed=1", "--quarantine", "cluster=gpu"]
    assert overrides_of(index) == ["seed=1", "cluster=gpu"]
    assert command("ray", *index).arguments == tuple(index[1:])


@pytest.mark.parametrize("kind", ["training", "guidance"])
def test_a_launched_study_is_resumed_because_a_launch_is_repeated(kind):
    first = command("ray", "search", kind, "--space", "smoke", "name=first")
    assert first.shell() == f"ddpm search {kind} --resume --space smoke name=first"
    assert first.name == f"first-search-{kind}"
    assert "--resume" not in command("ray", *TRAIN).arguments


@pytest.mark.parametrize("words", [["name=first"], ["--resume", "name=first"], ["name=first", "--resume"]])
def test_a_study_is_the_same_command_wherever_resume_is_written(words):
    assert command("ray", "search", "training", *words).arguments == ("--resume", "name=first")


@pytest.mark.parametrize(
    "words, overrides",
    [
        (["train", "--quiet", "cluster=gpu", "-q", "name=first"], ["cluster=gpu", "name=first"]),
        (["flow", "--dry-run", "+experiment=digits", "--until", "name=x"], ["+experiment=digits"]),
        (["search", "training", "--resume", "seed=1", "--json", "name=x"], ["seed=1", "name=x"]),
    ],
)
def test_a_setting_may_stand_after_an_option_without_a_value(words, overrides):
    assert overrides_of(words) == overrides


def test_the_options_without_a_value_are_those_of_the_verbs():
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands = [verbs[verb] for verb in VERBS if verb != "search"]
    commands += [verbs["search"].commands[kind] for kind in ("training", "guidance")]
    flags = [option for command in commands for option in command.params if getattr(option, "is_flag", False)]
    assert {name for flag in flags for name in flag.opts if name.startswith("--")} == set(FLAGS)
    assert not [flag for flag in flags if flag.secondary_opts]  # such as --no-quiet


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "'' cannot be launched on a cluster. Allowed: ingest, index, check, train"),
        (["up"], "'up' cannot be launched"),
        (["sample", "models:/x/1"], "'sample' cannot be launched"),
        (["search", "status"], "write `search training` or `search guidance`"),
        (["train", "--config", "run.json"], "names a file of this machine"),
        (["flow", "--out=x"], "names a file of this machine"),
        (["search", "training", "--space", "mine.yaml"], "is a file of this machine.*one of guidance, .*schedule"),
        (["search", "guidance", "--space=a/mine.yml"], "--space a/mine.yml is a file of this machine"),
        (["flow", "budget=30m"], "a plan is made for the machine"),
        (["train", "storage.credentials_file=/x"], "a cluster has a role, or keys in a Secret"),
    ],
)
def test_commands_that_a_cluster_cannot_run_are_refused_with_the_reason(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_command(words, compose(overrides_of(words)))


def test_addresses_come_from_the_configuration_and_else_from_the_environment_without_secrets():
    config = compose(["storage=s3", "storage.root=s3://b", "storage.region=eu-west-1"])
    environment = {
        "MLFLOW_TRACKING_URI": "https://user:word@mlflow:5000",
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "AWS_REGION": "us-west-2",
    }
    found = with_addresses(config, environment)
    assert found.tracking.uri == "https://mlflow:5000"
    assert (found.storage.endpoint_url, found.storage.region) == ("http://s3:9000", "eu-west-1")
    assert with_addresses(found, {}) == found


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "storage=local is the S3 of this machine's stack"),
        (["storage=s3", "storage.root=s3://b"], "tracking.uri has no value, and a cluster has no local stack"),
        (
            ["storage=s3", "storage.root=s3://b", "tracking.uri=http://localhost:5000"],
            "tracking.uri = http://localhost",
        ),
        (
            ["storage=s3", "storage.root=s3://b", "tracking.uri=http://m", "storage.endpoint_url=http://127.0.0.1:1"],
            "storage.endpoint_url = http://127.0.0.1:1 is this machine",
        ),
        (["storage=file", "storage.root=file:///data", "tracking.uri=http://m"], "share no folder"),
    ],
)
def test_addresses_that_a_cluster_cannot_reach_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        require_reachable(compose(overrides))


def test_a_cluster_that_is_there_may_share_a_folder_and_run_on_this_machine():
    folder = ["storage=file", "storage.root=file:///data", "tracking.uri=http://m"]
    require_reachable(compose(folder), share_folders=True)
    here = ["storage=s3", "storage.root=s3://b", "tracking.uri=http://127.0.0.1:5000"]
    require_reachable(compose([*here, "cluster.address=http://127.0.0.1:8265"]))


def test_a_launch_is_no_part_of_a_run():
    plain, launched = (
        compose(["+experiment=digits"]),
        compose(["+experiment=digits", "launch=kuberay", "launch.image=x"]),
    )
    assert plain.launch is None
    assert launched.launch is not None
    assert plain.identity() == launched.identity()
