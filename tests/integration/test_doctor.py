"""The doctor on a stack that works, and on the same one with a fault."""

from __future__ import annotations

import pytest

from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration


def test_everything_of_a_running_stack_is_ok(shell: Shell, s3: Storage) -> None:
    found = shell.ok("doctor", "+experiment=digits", "--json").answer
    services = ("local stack", "storage", "clock (S3)", "mlflow", "clock (MLflow)", "ray")
    assert found["ok"]
    checks = {check["name"]: check for check in found["checks"]}
    assert {name: checks[name]["status"] for name in services} == dict.fromkeys(services, "ok"), checks
    assert "conditional writes" in checks["storage"]["found"]
    assert [entry.uri for entry in s3.list("s3://ddpm") if "doctor" in entry.uri] == []


def test_a_wrong_address_fails_beside_services_that_work(shell: Shell) -> None:
    done = shell("doctor", "tracking.uri=http://127.0.0.1:9", "cluster.num_workers=64", "--json")
    assert done.code == 1
    checks = {check["name"]: check for check in done.answer["checks"]}
    assert checks["mlflow"]["status"] == "failed"
    assert checks["ray"]["status"] == "failed"
    assert checks["ray"]["fix"].startswith("cluster.num_workers=")
    assert checks["storage"]["status"] == "ok"
