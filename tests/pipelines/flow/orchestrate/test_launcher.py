"""Whether the process of a run lives, by what the server says that has started it; and that Dagster asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

dg = pytest.importorskip("dagster", reason="comes with the extra orchestrate")

from dagster._core.errors import DagsterUserCodeUnreachableError  # noqa: E402
from dagster._core.launcher import WorkerStatus  # noqa: E402
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry  # noqa: E402
from dagster._grpc.types import CanCancelExecutionResult  # noqa: E402
from dagster._serdes import serialize_value  # noqa: E402

from pipelines.flow.orchestrate.launcher import ProcessRunLauncher  # noqa: E402
from pipelines.stack.orchestrator import INSTANCE  # noqa: E402

RUN = dg.DagsterRun(job_name="flow", run_id="r", status=dg.DagsterRunStatus.STARTED)


class UnansweredError(Exception):
    """What a client of gRPC raises."""

    def __init__(self, code: str) -> None:
        self.code = lambda: SimpleNamespace(name=code)


def server(answer: bool | str) -> SimpleNamespace:
    """Return a client of a server that has the run or not, or does not answer."""

    def can_cancel_execution(request, timeout):
        assert request.run_id == "r"
        if isinstance(answer, str):
            raise DagsterUserCodeUnreachableError from UnansweredError(answer)
        return serialize_value(CanCancelExecutionResult(can_cancel=answer))

    return SimpleNamespace(can_cancel_execution=can_cancel_execution)


@pytest.fixture
def instance(tmp_path) -> Iterator[dg.DagsterInstance]:  # type: ignore[name-defined]
    """An instance as a stack has it, with a run that has started."""
    (tmp_path / "dagster.yaml").write_text(INSTANCE)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        instance.add_run(RUN)
        yield instance


@pytest.mark.parametrize(
    "client, status",
    [
        (server(True), WorkerStatus.RUNNING),
        (server(False), WorkerStatus.NOT_FOUND),
        (server("UNAVAILABLE"), WorkerStatus.NOT_FOUND),
        (server("DEADLINE_EXCEEDED"), WorkerStatus.RUNNING),  # the machine is busy
        (None, WorkerStatus.UNKNOWN),
    ],
)
def test_a_run_lives_where_the_server_that_has_started_it_has_its_process(client, status, instance, monkeypatch):
    monkeypatch.setattr(instance.run_launcher, "_get_grpc_client_for_termination", lambda run_id: client)
    assert instance.run_launcher.check_run_worker_health(RUN).status == status
    failed = status == WorkerStatus.NOT_FOUND
    assert instance.get_run_by_id("r").status == (dg.DagsterRunStatus.FAILURE if failed else RUN.status)


def test_a_run_without_a_process_is_to_be_tried_again_by_the_time_that_its_failure_is_seen(instance, monkeypatch):
    store, tried_again = instance.event_log_storage.store_event, []

    def look(event):
        store(event)
        tried_again.append(should_retry(instance.get_run_by_id("r"), instance))

    monkeypatch.setattr(instance.event_log_storage, "store_event", look)
    monkeypatch.setattr(instance.run_launcher, "_get_grpc_client_for_termination", lambda run_id: server(False))
    instance.run_launcher.check_run_worker_health(RUN)
    assert tried_again == [True]


def test_a_run_that_has_ended_in_the_meantime_stays_as_it_ended(instance, monkeypatch):
    instance.report_run_canceled(RUN)
    monkeypatch.setattr(instance.run_launcher, "_get_grpc_client_for_termination", lambda run_id: server(False))
    assert instance.run_launcher.check_run_worker_health(RUN).status == WorkerStatus.NOT_FOUND
    assert instance.get_run_by_id("r").status == dg.DagsterRunStatus.CANCELED


def test_the_instance_of_a_stack_looks_for_runs_whose_process_is_gone_and_tries_them_again(instance):
    assert isinstance(instance.run_launcher, ProcessRunLauncher)
    assert instance.run_launcher.supports_check_run_worker_health
    assert instance.run_monitoring_enabled
    assert instance.run_retries_enabled
    assert not instance.run_retries_retry_on_asset_or_op_failure
