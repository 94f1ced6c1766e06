"""Modules of commands import what is slow, and what reads its environment, only where it is used.

One process imports them one after the other, and says before the next what is there by then: so each has less than it
would be allowed alone, and Python and torch are started once for all.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipelines import registry
from pipelines.cli import flow
from pipelines.plan import budget, services
from pipelines.stack import connect
from pipelines.training import driver

# By their names, so that a change of one of them touches these tests.
PROGRAM = f"""
import gc, json, sys
gc.disable()
import {flow.__name__}, {connect.__name__}, {budget.__name__}, {services.__name__}
{services.__name__}.services_config([])
there = {{"a plan": list(sys.modules)}}
import {driver.__name__}
there["a driver"] = list(sys.modules)
import {registry.__name__}
there["the registry"] = list(sys.modules)
print(json.dumps(there))
gc.freeze()  # of half a million objects, which Python would look through at its end
"""


@pytest.fixture(scope="module")
def there() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_ray_is_imported_only_after_its_environment_is_set(there):
    """Ray reads its token and the kind of its addresses when it is imported, which the local stack sets."""
    assert flow.__name__ in there["a plan"]
    assert "ray" not in there["a plan"]


def test_a_driver_imports_nothing_that_only_ranks_compute_with(there):
    """It is one second more before the first line of every command that trains."""
    assert driver.__name__ in there["a driver"]
    assert "torch.distributed.fsdp" not in there["a driver"]


def test_the_library_that_signs_is_imported_where_it_is_used(there):
    assert registry.__name__ in there["the registry"]
    assert not {"model_signing", "sigstore", "OpenSSL", "mlflow"} & set(there["the registry"])
