"""A launcher of Dagster runs as local processes that also checks whether the process of a run is alive.

Dagster's own launcher does not. The run of a killed daemon would then count as started for ever, and hold the only
slot for trainings of the instance. With this one, run monitoring detects it, and the run is retried.
"""

from __future__ import annotations

from dagster import DagsterEvent, DagsterEventType, DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import ConfigurableClass, deserialize_value

ANSWER_S = 30
"""Seconds that the server of a run may take to say whether its process is alive."""


class ProcessRunLauncher(DefaultRunLauncher, ConfigurableClass):
    """Starts runs like Dagster's default launcher, and checks whether their processes are alive."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether `check_run_worker_health` is implemented."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Return whether the server of a run still has its process; a run without a process fails.

        A server that is too busy to answer counts as having it.
        """
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            return CheckRunHealthResult(WorkerStatus.UNKNOWN, "nothing says which server has started the run")
        try:
            answer = client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id), timeout=ANSWER_S)
        except DagsterUserCodeUnreachableError as error:
            code = getattr(error.__cause__, "code", None)
            if code is not None and code().name == "DEADLINE_EXCEEDED":
                return CheckRunHealthResult(WorkerStatus.RUNNING, f"its server has not answered for {ANSWER_S} s")
            return self._failed(run, "the server that has started the run is gone")
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return self._failed(run, "its process is gone")

    def _failed(self, run: DagsterRun, why: str) -> CheckRunHealthResult:
        """Set the status of a run without a process to failed, then store the event.

        Run monitoring would store the event first. The part of the daemon that retries runs may read it in between: it
        ignores a run whose status is not failed, and does not read that event again.
        """
        now = self._instance.get_run_by_id(run.run_id)
        if now is not None and now.status == run.status:  # otherwise it has ended by itself in the meantime
            event = DagsterEvent(DagsterEventType.PIPELINE_FAILURE.value, run.job_name, message=why)
            self._instance.run_storage.handle_run_event(run.run_id, event)
            self._instance.report_run_failed(run, why)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, why)
