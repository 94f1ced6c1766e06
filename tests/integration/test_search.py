"""Studies on the real Ray, S3 and MLflow: killed and resumed, with trials that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import psutil
import pytest
from mlflow import MlflowClient

from pipelines import stack, tracking
from pipelines.config import compose
from pipelines.search.study import StudyStore, TrialRecord, best, trial_name
from pipelines.search.study_config import load_study
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage
from tests.chaos.fault_proxy import FaultProxy
from tests.integration.conftest import Finished, Shell, one_stopped
from tests.networks import TINY_UNET

pytestmark = pytest.mark.integration

TINY = ["+experiment=digits", *TINY_UNET]
TINY += ["cluster.num_workers=1", "sampler.steps=5"]
GUIDANCE = ["search.trials=4", "search.samples=64", "search.rungs=2", "search.confirm=1", "search.confirm_samples=64"]
GUIDANCE += ["search.space.sampler.steps.int=[3,8]"]


@pytest.fixture(scope="module")
def model(shell: Shell) -> str:
    shell.ok("ingest", "digits", "--to", "s3://ddpm/datasets/digits")
    short = ["images=2560", "tracking.grid_every=null", "checkpoint.every=2560", "name=searched"]
    return "runs:/" + shell.ok("train", *TINY, *short, "--json").answer["run_id"]


def records(s3: Storage, study: str) -> dict[str, TrialRecord]:
    return {r.trial: r for r in StudyStore(s3, f"s3://ddpm/studies/{study}").records()}


def children(local_stack, run_id: str):
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    experiment = client.get_experiment_by_name("ddpm")
    found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.data.tags["ddpm.run"]: run for run in found}, len(found)


def test_a_guidance_study_that_is_killed_or_broken_off_goes_on_and_counts_nothing_twice(shell, s3, local_stack, model):
    command = ["search", "guidance", "--model", model, "--study", "killed", *TINY, *GUIDANCE, "search.concurrent=2"]
    process = shell.start(*command)
    until(lambda: [r for r in records(s3, "killed").values() if r.state == "finished"], process, 200)
    process.kill()
    process.communicate()
    before = {name: r for name, r in records(s3, "killed").items() if r.state in ("finished", "stopped")}

    refused = shell(*command, "search.trials=5")
    assert refused.code == 1
    assert "a study 'killed' is at s3://ddpm/studies/killed: go on with --resume" in refused.err
    run = tracking.find_run(local_stack.tracking_uri, "ddpm", "study-killed")
    assert json.loads(run.read_text("study.json"))["trials"] == 4

    longer = [*command, "search.trials=8", "--resume"]  # many enough that some are left when it is broken off
    process = shell.start(*longer)
    until(lambda: sum(r.state != "running" for r in records(s3, "killed").values()) > len(before), process, 200)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not s3.exists("s3://ddpm/studies/killed/confirmation.json")
    assert MlflowClient(tracking_uri=local_stack.tracking_uri).get_run(run.run_id).info.status == "KILLED"
    before = {name: r for name, r in records(s3, "killed").items() if r.state in ("finished", "stopped")}
    done = shell.ok(*longer, "--json")
    after = records(s3, "killed")
    assert len(after) == sum(done.answer["trials"].values()) == 8
    assert done.answer["trials"]["running"] == 0
    assert all(after[name] == record for name, record in before.items())  # none ran again
    runs, count = children(local_stack, done.answer["run_id"])
    assert count == len(runs) == 8
    assert set(runs) == {f"killed-{name}" for name in after}
    lowest = min(r.scores["frechet_distance"] for r in after.values() if r.state == "finished")
    assert best(after.values()).scores["frechet_distance"] == lowest
    assert {c["trial"] for c in done.answer["confirmed"]} >= {"default"}
    assert done.answer["version"] is None  # a model of a run: what it would take is said
    kept = json.loads(s3.read("s3://ddpm/studies/killed/confirmation.json"))
    assert (kept["confirmed"], kept["seeds"]) == (done.answer["confirmed"], done.answer["seeds"])
    assert set(kept["after"]) == set(after)
    assert json.loads(s3.read("s3://ddpm/studies/killed/study.json"))["noise_seed"] == kept["seeds"]["trials"]
    assert s3.exists("s3://ddpm/studies/killed/study.html")
    status = shell.ok("search", "status", "killed", "--json")
    assert status.answer["trials"] == done.answer["trials"]


SCORED = ["evaluation.n=64", "evaluation.seeds=1", "evaluation.likelihood_images=0"]


def test_the_winner_of_a_study_becomes_a_new_version_that_serves_it_and_the_searched_one_stays(
    shell, local_stack, model
):
    poor = ["sampler.steps=1", "guidance.scale=6"]
    first = shell.ok("register", model, *TINY, *SCORED, *poor, "--name", "searched", "--json")
    assert first.answer["model"] == "models:/searched/1"
    again = shell.ok("register", model, *TINY, *SCORED, *poor, "--name", "searched", "--json")
    assert again.answer == first.answer
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    before = dict(client.get_model_version("searched", "1").tags)

    own = [line for line in TINY if not line.startswith("sampler.")]  # those of the version are what has to be beaten
    study = ["--model", "models:/searched/1", "--study", "poor", *own, *GUIDANCE, *SCORED]
    study += ["search.trials=4", "search.confirm_samples=192", "search.samples=96"]
    study += ["search.space.guidance.scale.uniform=[0.9,1.1]", "cluster.patience_s=5"]
    with (
        one_stopped("ray::ResourceTrainable.train", local_stack.home),
        one_stopped("ray::_SamplingActor.call", local_stack.home),
    ):
        done = shell.ok("search", "guidance", *study, "--json")
    assert re.search(r"trial \w+ begins again: its process has not answered for \d+ s and stands still", done.err)
    assert (done.answer["trials"]["failed"], sum(done.answer["trials"].values())) == (0, 4)
    assert "an actor of this work has not answered for" in done.err
    assert done.answer["version"] == "models:/searched/2"
    (winner,) = [c for c in done.answer["confirmed"] if c["trial"] == done.answer["winner"]]
    assert (winner["better"], winner["gain"]["low"] > 0, winner["p"] < 0.025) == (True, True, True)
    assert "`ddpm promote models:/searched/2 --alias champion`" in done.err

    assert dict(client.get_model_version("searched", "1").tags) == before
    made = client.get_model_version("searched", "2")
    assert made.tags["study"] == "poor"
    aliases = {name: str(number) for name, number in client.get_registered_model("searched").aliases.items()}
    assert aliases == {"candidate": "2"}
    assert json.loads(made.tags["scores"])["sampling"] == winner["settings"]
    mlflow.set_tracking_uri(local_stack.tracking_uri)
    served = mlflow.pyfunc.load_model("models:/searched/2")
    labels = pandas.DataFrame({"label": np.array([3, 7], dtype=np.int64)})
    by_default = served.predict(labels, params={"seed": 5})
    steps, scale = winner["settings"]["steps"], winner["settings"]["scale"]
    assert np.array_equal(by_default, served.predict(labels, params={"seed": 5, "steps": steps, "scale": scale}))
    assert not np.array_equal(by_default, served.predict(labels, params={"seed": 5, "steps": 1, "scale": 6.0}))


def test_learned_steps_are_said_as_a_command_and_drawn_by_what_is_registered_with_it(shell, s3, local_stack):
    study = ["--study", "learned", "--evaluations", "2", "--learn", "20", "--trajectories", "64", "--grid", "12"]
    done = shell.ok("search", "steps", "--model", "models:/searched/1", *study, "--guidance", "1", *TINY, "--json")
    assert json.loads(s3.read("s3://ddpm/studies/learned/steps.json")) == done.answer
    assert done.answer["distances"]["learned"] < done.answer["distances"]["trailing"]
    (command,) = [line for line in done.err.splitlines() if "use them with" in line]
    overrides = command.split("`")[1].split()[3:]
    made = shell.ok("register", "models:/searched/1", *overrides, "--json")
    version = MlflowClient(tracking_uri=local_stack.tracking_uri).get_model_version("searched", "3")
    assert made.answer["model"] == "models:/searched/3"
    scores = json.loads(version.tags["scores"])
    assert scores["sampling"] == done.answer["sampling"]
    assert (scores["n"], len(scores["seeds"])) == (64, 1)  # as version 1 was scored, though its run says otherwise
    assert done.answer["sampling"]["kind"] == "generalized"
    shell.ok("sample", "models:/searched/3", "--labels", "3,7", "--out", "by-itself")
    fields = [f"{name}={json.dumps(done.answer['sampling'][name])}" for name in ("timesteps", "weights")]
    asked = [option for field in fields for option in ("--set", field)]
    by_hand = ["--sampler", "generalized", "--steps", "2", "--guidance", "1", *asked]
    shell.ok("sample", "models:/searched/1", "--labels", "3,7", *by_hand, "--out", "by-hand")
    own, other = (
        sorted(path.read_bytes() for path in (shell.folder / name).glob("*.png")) for name in ("by-itself", "by-hand")
    )
    assert own == other
    assert len(own) == 3  # two and their grid


def trial_processes(home: Path) -> list[psutil.Process]:
    """The processes of this stack's Ray in which trials run."""
    head = next(service.pid for service in stack.status(home) if service.name == "ray")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == head and "ray::ResourceTrainable" in " ".join(process.cmdline()):
                found.append(process)
    return found


def until(true: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 120) -> Any:
    """Wait for something to become true while a command runs; what it is."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.mark.timeout(900)
def test_a_training_study_with_trials_that_fail_ends_with_the_right_best(shell, s3, local_stack, model, tmp_path: Path):
    space = tmp_path / "odd.yaml"
    space.write_text(
        "kind: training\ntrials: 6\nrandom_trials: 6\nconcurrent: 1\nsamples: 40\nrungs: 2\nreduction: 2\n"
        "bits_per_dim_images: 4\nconfirm: 1\nconfirm_samples: 128\nspace:\n"
        "  optim.lr: {log: [0.0001, 1.0e+35]}\n  cluster.num_workers: {choice: [1, 64]}\n"
    )
    overrides = [
        *TINY,
        "images=2560",
        "objective.prediction=eps",  # of which the rate below learns nothing in 2,560 images
        "optim.lr=0.0001",
        "optim.grad_clip=null",
        "optim.warmup_images=0",
        "optim.max_skipped=2",
    ]
    overrides += ["cluster.patience_s=3", "optim.precision=fp32"]
    # What was running when a driver was killed is tried first: so these are sure to be among the trials.
    store = StudyStore(s3, "s3://ddpm/studies/odd")
    digest = read_dataset("s3://ddpm/datasets/digits", s3).digest
    store.open(load_study(str(space)), compose(overrides), digest, resume=False)
    diverges = {"optim.lr": 1e34, "cluster.num_workers": 1}
    asks_too_much = {"optim.lr": 0.001, "cluster.num_workers": 64}
    doomed = {"optim.lr": 0.002, "cluster.num_workers": 1}
    good, other = {"optim.lr": 0.003, "cluster.num_workers": 1}, {"optim.lr": 0.004, "cluster.num_workers": 1}
    for params in (diverges, asks_too_much, doomed, good, other):
        store.record(TrialRecord(trial_name(params), params, "running"))

    command = ["search", "training", "--space", str(space), "--study", "odd", "--resume", *overrides, "--json"]
    with FaultProxy(local_stack.s3_endpoint) as proxy:
        # A node that has nothing yet, and whose every request is counted: earlier tests have filled the shared cache.
        elsewhere = [f"storage.endpoint_url={proxy.url}", f"storage.credentials_file={local_stack.credentials_file}"]
        elsewhere.append(f"data.cache_dir={tmp_path / 'node'}")
        process = shell.start(*command, "storage=s3", "storage.root=s3://ddpm", "storage.region=us-east-1", *elsewhere)
        ended = {trial_name(diverges), trial_name(asks_too_much)}
        until(lambda: all(records(s3, "odd")[name].state == "failed" for name in ended), process, 300)
        until(lambda: s3.list(f"s3://ddpm/runs/odd-{trial_name(doomed)}"), process)  # it has begun
        for victim in until(lambda: trial_processes(local_stack.home), process):
            victim.kill()
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-3000:]
        asked = Counter(path for path in proxy.asked if path.endswith(".tar"))
    done = Finished(0, err, json.loads(out.strip().splitlines()[-1]))
    after = records(s3, "odd")
    assert len(after) == 6
    failed = done.answer["failed"]
    assert {trial_name(diverges), trial_name(asks_too_much), trial_name(doomed)} <= set(failed)
    assert sum(r.state in ("finished", "stopped") for r in after.values()) >= 2
    # Each shard was fetched once, by whoever came first; ranges are of samples that were wanted before it was there.
    assert asked
    assert max(asked.values()) <= 4, asked
    assert "not finite" in failed[trial_name(diverges)]
    assert "64" in failed[trial_name(asks_too_much)]
    assert done.answer["best"]["params"]["cluster.num_workers"] == 1
    assert "bits_per_dim" in done.answer["best"]["scores"]
    runs, count = children(local_stack, done.answer["run_id"])
    assert count == len(runs) == 6
    assert runs[f"odd-{trial_name(diverges)}"].info.status == "FAILED"
    trained = [r for r in after.values() if r.state == "finished"]
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    for record in trained:  # the training and its scores are in one run
        assert {"train/loss", "search/frechet_distance"} <= client.get_run(record.run_id).data.metrics.keys()
    # The configuration as it stands hardly learns: it trained to its end all the same, and the winner beats it.
    default = after[trial_name({"optim.lr": 0.0001, "cluster.num_workers": 1})]
    assert (default.state, default.scores["images_seen"]) == ("finished", 2560)
    by_trial = {c["trial"]: c for c in done.answer["confirmed"]}
    assert set(by_trial) == {"default", done.answer["best"]["trial"]}, err[-3000:]
    assert by_trial["default"]["params"] == default.params
    assert by_trial["default"]["scores"]["samples"] == 128
    assert done.answer["winner"] == done.answer["best"]["trial"]
    assert done.answer["config"] == "s3://ddpm/studies/odd/best/config.json"
    taken = shell.folder / "best.json"
    s3.download(done.answer["config"], taken)
    here = ["storage.local_stack=true"]  # whose addresses are found again
    assert shell.ok("train", "--config", str(taken), "images=256", *here, "--json").answer["images_seen"] == 256


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_trial_whose_process_stands_still_begins_again_where_its_run_was(shell, local_stack, model):
    study = ["search.trials=2", "search.samples=32", "search.rungs=1", "search.confirm=1", "search.confirm_samples=64"]
    study += ["search.concurrent=1", "search.space.optim.lr.log=[0.0001,0.01]", "images=2560", "cluster.patience_s=5"]
    with one_stopped("ray::ResourceTrainable.train", local_stack.home):
        done = shell.ok("search", "training", "--study", "stopped", *TINY, *study, "--json")
    assert re.search(r"trial \w+ begins again: its process has not answered for \d+ s and stands still", done.err)
    assert (done.answer["trials"]["failed"], sum(done.answer["trials"].values())) == (0, 2)
    assert {c["trial"] for c in done.answer["confirmed"]} >= {"default"}
