"""The local stack on loopback: SeaweedFS as S3, an MLflow server, a Ray head, and optionally Dagster.

Everything lives in one folder (`.ddpm`, or DDPM_HOME): credentials made on first use, data, logs, and `stack.json`,
which records what was started. A process is ours only if its ID *and* its start time are those recorded.
"""

from pipelines.stack.control import ServiceStatus, StackState, down, read_state, status, up
from pipelines.stack.home import StackError, default_home
from pipelines.stack.orchestrator import ORCHESTRATOR
from pipelines.stack.private import read_private
from pipelines.stack.services import BUCKET, SERVICES, find_weed, ray_environment

__all__ = [
    "BUCKET",
    "ORCHESTRATOR",
    "SERVICES",
    "ServiceStatus",
    "StackError",
    "StackState",
    "default_home",
    "down",
    "find_weed",
    "ray_environment",
    "read_private",
    "read_state",
    "status",
    "up",
]
