"""Jobs on a Ray cluster: which submissions belong to a name, and what the next one is called."""

import sys
from pathlib import Path

import pytest

from pipelines.config import RayLaunch
from pipelines.launch import LaunchError
from pipelines.launch.ray_jobs import RayJobs, Submission, job_variables, next_id, of_name, program_of
from tests.pipelines.launch.rendered import TRAIN, command


def submissions(*ids, status="SUCCEEDED"):
    return [Submission(identity, status) for identity in ids]


def test_the_first_job_has_the_name_of_the_run_and_later_ones_a_number():
    assert next_id("digits", []) == "digits"
    assert next_id("digits", submissions("digits")) == "digits@2"
    assert next_id("digits", submissions("digits", "digits@2", "digits@10")) == "digits@11"


def test_jobs_of_other_names_are_others_however_alike_they_are():
    everything = submissions("digits@10", "digits-2", "digits", "digits@2", "digits-2@2", "raysubmit_x", "digit")
    assert [s.id for s in of_name("digits", everything)] == ["digits", "digits@2", "digits@10"]
    assert [s.id for s in of_name("digits-2", everything)] == ["digits-2", "digits-2@2"]
    assert of_name("other", everything) == []


@pytest.mark.parametrize(
    "status, ended", [("PENDING", 0), ("RUNNING", 0), ("SUCCEEDED", 1), ("FAILED", 1), ("STOPPED", 1)]
)
def test_a_job_has_ended_or_not(status, ended):
    assert Submission("x", status).ended is bool(ended)


def test_the_local_stack_calls_this_very_program_and_other_clusters_theirs():
    assert program_of(RayLaunch(), local=False) == "ddpm"
    assert program_of(RayLaunch(command="/opt/ddpm -v"), local=True) == "/opt/ddpm -v"
    assert str(Path(sys.executable).parent) in program_of(RayLaunch(), local=True)


def test_a_jobs_variables_are_addresses_and_how_it_is_stopped():
    made = command("ray", *TRAIN)
    found = job_variables(made, RayLaunch(stop_wait_s=7), None)
    assert found["MLFLOW_TRACKING_URI"] == "http://mlflow.mlflow.svc:5000"
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "7"
    assert "DDPM_HOME" not in found
    assert job_variables(made, RayLaunch(), Path("/there"))["DDPM_HOME"] == "/there"


def test_a_cluster_that_is_not_there_is_named_with_the_setting(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(LaunchError, match=r"no Ray cluster answers at http://127.0.0.1:1: check cluster.address"):
        RayJobs("http://127.0.0.1:1")
