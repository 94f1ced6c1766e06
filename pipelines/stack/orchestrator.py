"""Dagster beside the local stack: its webserver and its daemon, with their state in the stack's folder.

The webserver has no password, so a private stack does not run it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from pipelines.stack.home import StackError
from pipelines.stack.private import read_private
from pipelines.stack.processes import StartedService, choose_ports, launch

ORCHESTRATOR = ("dagster", "dagster-daemon")
DEFINITIONS = "pipelines.flow.orchestrate.definitions"
SETTINGS_FILE = "orchestrate.yaml"
"""In the stack's folder; which experiments there are, see `pipelines.flow.orchestrate.settings`."""

SETTINGS = """\
# Which experiments Dagster has assets for, and when they run by themselves. `ddpm down` and `ddpm up --orchestrator`
# read it again. Left out, a setting has the value that is shown.
# partitions:                       # name: Hydra overrides
#   digits: [+experiment=digits]
#   digits_inpainting: [+experiment=digits_inpainting]
#   digits_score: [+experiment=digits_score]
# launch: []                        # launch.image=…, to run each stage as a RayJob on Kubernetes
# cron: "0 3 * * 1"                 # of the schedule `retrain`, which is stopped until you start it
# timezone: UTC
# look_every_s: 60                  # between two looks of the sensor `new_data`, which is stopped until you start it
# retries: 2                        # of a stage
# retry_delay_s: 30                 # before the first one; each waits twice as long
"""

INSTANCE = """\
telemetry:
  enabled: false
nux:                                # the page asks nobody for an address
  enabled: false
concurrency:
  pools:                            # one run at a time that trains, and one that writes a dataset
    granularity: run
    default_limit: 1
  runs:
    tag_concurrency_limits:
      - key: dagster/partition      # never two runs of one experiment at a time
        value:
          applyLimitPerUniqueValue: true
        limit: 1
run_launcher:
  module: pipelines.flow.orchestrate.launcher
  class: ProcessRunLauncher
run_monitoring:                     # a run whose process is gone, with its daemon say, fails …
  enabled: true
  poll_interval_seconds: 10
run_retries:                        # … and is tried again; a stage that fails is tried again inside its run
  enabled: true
  max_retries: 3
  retry_on_asset_or_op_failure: false
"""
"""Default text of Dagster's own settings: the number of parallel runs, and the handling of runs without a process."""


def orchestrator_environment(home: Path) -> dict[str, str]:
    """Return the environment of Dagster's processes: paths of its state, its settings and the stack."""
    return {
        "DAGSTER_HOME": str(home / "dagster"),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "DDPM_HOME": str(home),
        "DDPM_ORCHESTRATE": str(home / SETTINGS_FILE),
    }


def prepare(home: Path) -> None:
    """Create the folder of Dagster's state, and both files of settings if they do not exist.

    Raises:
        StackError: Dagster is not installed, or the stack is private.
    """
    missing = [name for name in ("dagster", "dagster_webserver") if importlib.util.find_spec(name) is None]
    if missing:
        raise StackError(
            f"the orchestrator needs {' and '.join(missing)}, which is not installed: "
            "python -m pip install 'ddpm-pipelines[orchestrate]'"
        )
    if read_private(home):
        raise StackError(
            "Dagster's webserver asks nobody for a password, and the local stack is private: leave --orchestrator out, "
            "or `ddpm down`, then `ddpm up --shared --orchestrator`"
        )
    folder = home / "dagster"
    folder.mkdir(mode=0o700, exist_ok=True)
    for file, text in ((folder / "dagster.yaml", INSTANCE), (home / SETTINGS_FILE, SETTINGS)):
        if not file.exists():
            file.write_text(text)


def start_webserver(home: Path, running: dict[str, StartedService]) -> StartedService:
    """Start Dagster's webserver on loopback."""
    prepare(home)
    port = choose_ports(home, "dagster", ["port"])["port"]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dagster_webserver", "--host", "127.0.0.1", "--port", str(port)]
    return _launch("dagster", [*command, "--module-name", DEFINITIONS], home, url, (f"{url}/server_info",))


def start_daemon(home: Path, running: dict[str, StartedService]) -> StartedService:
    """Start Dagster's daemon, which takes runs from the queue and evaluates sensors and schedules."""
    prepare(home)
    command = [sys.executable, "-m", "dagster._daemon", "run", "--module-name", DEFINITIONS]
    return _launch("dagster-daemon", command, home, "", ())


def _launch(name: str, command: list[str], home: Path, url: str, probes: tuple[str, ...]) -> StartedService:
    """Start a process of Dagster in the folder of this one, to which paths of sources are relative."""
    environment = orchestrator_environment(home)
    process = launch(name, command, home, environment, folder=Path(os.getcwd()))
    return StartedService.of(process, url, probes)
