"""Dagster's launcher of runs as processes of this machine, which also says whether the process of a run still lives.

Dagster's own does not say it. The run of a daemon that was killed would then count as started for ever, and hold the
one place for a training that the instance has. With this one, run monitoring finds it, and the run is tried again.
"""

from __future__ import annotations

from dagster import DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import ConfigurableClass, deserialize_value

ANSWER_S = 30
"""Seconds that the server which has started a run may take to say whether its process lives."""


class ProcessRunLauncher(DefaultRunLauncher, ConfigurableClass):
    """Starts runs as Dagster's default launcher does, and looks whether their processes live."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether `check_run_worker_health` says something."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Return whether the server that has started a run still has its process.

        One that is only too busy to answer counts as having it.
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
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the server that has started the run is gone")
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its process is gone")
