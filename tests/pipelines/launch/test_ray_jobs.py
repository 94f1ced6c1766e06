"""Jobs on a Ray cluster: which submissions belong to a name, and what the next one is called."""

import sys
from pathlib import Path
from types import SimpleNamespace

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
    made = command("ray", *TRAIN, "launch.stop_wait_s=7")
    found = job_variables(made, None)
    assert found["MLFLOW_TRACKING_URI"] == "http://mlflow.mlflow.svc:5000"
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "7"
    assert "DDPM_HOME" not in found
    assert job_variables(made, Path("/there"))["DDPM_HOME"] == "/there"


def test_a_cluster_that_is_not_there_is_named_with_the_setting(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(LaunchError, match=r"no Ray cluster answers at http://127.0.0.1:1: check cluster.address"):
        RayJobs.connect("http://127.0.0.1:1")


class Server:
    """What Ray's client answers: `logs` are the answers to being tailed, each ending as the connection does."""

    def __init__(self, *jobs, logs=(), statuses=("SUCCEEDED",)):
        self.jobs, self.logs, self.statuses = list(jobs), list(logs), list(statuses)
        self.submitted, self.stopped = [], []
        self.entrypoint = command("ray", *TRAIN).shell()

    def list_jobs(self):
        return [
            SimpleNamespace(submission_id=i, status=s, message=None, start_time=None, entrypoint=self.entrypoint)
            for i, s in self.jobs
        ]

    def submit_job(self, **given):
        if given["submission_id"] in dict(self.jobs):
            raise RuntimeError("already submitted")
        self.submitted.append(given)

    def get_job_info(self, identity):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(
            submission_id=identity, status=status, message="as it is", start_time=2000, entrypoint=self.entrypoint
        )

    def stop_job(self, identity):
        self.stopped.append(identity)

    async def tail_job_logs(self, identity):
        for text in self.logs.pop(0):
            if isinstance(text, BaseException):
                raise text
            yield text


def follow(server, **more):
    written, said = [], []
    jobs = RayJobs(server, "http://ray", **more)
    state = jobs.follow("first", written.append, lambda name, text: said.append(text), lambda seconds: None)
    return state, "".join(written), said


def test_a_command_is_submitted_under_the_name_of_its_run():
    server = Server(("other", "RUNNING"), (None, "RUNNING"))
    job, is_new = RayJobs(server, "http://ray").submit(command("ray", *TRAIN), "ddpm", {"A": "b"})
    assert (job.id, is_new) == ("first", True)
    (given,) = server.submitted
    assert given["entrypoint"] == "ddpm train +experiment=digits name=first storage=s3 storage.root=s3://bucket/team"
    assert given["runtime_env"] == {"env_vars": {"A": "b"}}


def test_another_command_under_the_name_of_one_that_runs_is_refused():
    server = Server(("first", "RUNNING"))
    with pytest.raises(LaunchError, match=r"job first already runs another command: `ddpm train .*--stop first"):
        RayJobs(server, "http://ray").submit(command("ray", *TRAIN, "images=64"), "ddpm", {})
    assert server.submitted == []


def test_one_that_runs_already_is_not_submitted_again_and_one_that_has_ended_is():
    running = Server(("first", "FAILED"), ("first@2", "RUNNING"))
    job, is_new = RayJobs(running, "http://ray").submit(command("ray", *TRAIN), "ddpm", {})
    assert (job.id, is_new, running.submitted) == ("first@2", False, [])
    ended = Server(("first", "FAILED"), ("first@2", "STOPPED"))
    job, is_new = RayJobs(ended, "http://ray").submit(command("ray", *TRAIN), "ddpm", {})
    assert (job.id, is_new) == ("first@3", True)


def test_the_output_of_a_job_is_written_once_although_the_connection_breaks():
    """A new connection begins with the first line again."""
    logs = [["one ", "two "], ["one two three ", RuntimeError("broken")], ["one ", "two three four"]]
    state, written, _ = follow(Server(logs=logs, statuses=["RUNNING", "SUCCEEDED"]))
    assert state is not None
    assert (state.status, written) == ("SUCCEEDED", "one two three four")


def test_a_server_that_stays_away_is_given_up():
    server = Server(logs=[[ConnectionError("away")] for _ in range(3)], statuses=[RuntimeError("away")])
    with pytest.raises(LaunchError, match="job first can no longer be followed"):
        follow(server, patience_s=0)


def test_ctrl_c_detaches_and_stops_nothing():
    server = Server(logs=[["one", KeyboardInterrupt()]])
    state, written, said = follow(server)
    assert (state, written, server.stopped) == (None, "one", [])
    assert said == ["detached; job first keeps running; the same command follows it again"]


def test_stopping_waits_until_the_job_has_ended():
    server = Server(statuses=["RUNNING", "STOPPED"])
    assert RayJobs(server, "http://ray").stop("first", 5).status == "STOPPED"
    assert server.stopped == ["first"]


def test_refusals_of_the_server_become_errors_with_what_to_do():
    from ray.exceptions import AuthenticationError

    with pytest.raises(LaunchError, match="asks for its token: set RAY_AUTH_MODE=token"):
        RayJobs(Server(statuses=[AuthenticationError("no token")]), "http://ray").get("first")
    with pytest.raises(LaunchError, match="refuses: no such job"):
        RayJobs(Server(statuses=[RuntimeError("no such job")]), "http://ray").get("first")
