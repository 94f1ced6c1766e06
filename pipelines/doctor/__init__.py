"""`ddpm doctor`: what is missing for a training, and the command or setting that fixes it. It starts nothing.

`check` has the result of a probe and runs probes in parallel under one deadline; `machine`, `estimates`, `services` and
`storage` have the probes, whose decisions are pure functions of what was observed. `gpu` is a test of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.doctor import machine
from pipelines.doctor.check import Check, Probe, Status, answer, failed, left_running, run_probes

if TYPE_CHECKING:
    from pipelines.config import Config

__all__ = ["Check", "Status", "answer", "examine", "left_running"]
WHOLE_S, LEAST_S = 18.0, 8.0
"""Seconds that everything may take, and seconds that the probes get at least."""


def examine(overrides: Sequence[str], environ: Mapping[str, str]) -> list[Check]:
    """Return the checks for a training with these overrides, in the order in which problems should be fixed.

    Raises:
        ConfigError: the configuration is not valid.
    """
    began = time.monotonic()
    versions = machine.check_versions()
    try:
        probes = _probes(overrides, environ)
    except ImportError as error:
        fix = next((check.fix for check in versions if check.fix), None) or "python -m pip install -e ."
        return [*versions, failed("imports", str(error), fix)]
    return [*versions, *run_probes(probes, max(LEAST_S, WHOLE_S - (time.monotonic() - began)))]


def _probes(overrides: Sequence[str], environ: Mapping[str, str]) -> dict[str, Probe]:
    """Return name -> probe for a configuration; the name is shown if the probe has no result."""
    from pipelines import stack
    from pipelines.config import compose
    from pipelines.doctor import estimates, services
    from pipelines.shards.read import default_cache_dir
    from pipelines.stack.connect import connect_running

    config, needed = connect_running(compose(overrides), environ, stack.SERVICES)
    home, cluster, data = stack.default_home(), config.cluster, config.data
    is_local = "ray" in needed
    cache_fix = "data.cache_dir=PATH data.cache_gib=N"
    cache = Path(data.cache_dir) if data.cache_dir else default_cache_dir()

    def folders() -> list[Check]:
        temporary = Path(tempfile.gettempdir())
        return [
            machine.folder_check("shard cache", cache, data.cache_gib * machine.GIB, cache_fix),
            machine.folder_check("temporary files", temporary, machine.LOW_DISK, "export TMPDIR=PATH"),
            machine.folder_check("stack folder", home, machine.LOW_DISK, "export DDPM_HOME=PATH"),
            machine.shared_memory_check(),
        ]

    probes: dict[str, Probe] = {
        "cores": lambda: machine.check_cores(cluster.min_workers * cluster.cpus_per_worker if is_local else None),
        "memory": machine.check_memory,
        "disk": folders,
        "ports": lambda: [machine.port_check()],
        "gpu": lambda: machine.check_accelerators(cluster.gpus_per_worker if is_local else None),
        "estimates": lambda: estimates.check_estimates(config, here=is_local),
        "local stack": lambda: [services.stack_check(stack.status(), needed, stack.find_weed() is not None)],
    }
    return probes | _service_probes(config, needed)


def _service_probes(config: Config, needed: Sequence[str]) -> dict[str, Probe]:
    """Return the probes of the services that have an address; a stopped local stack has none."""
    from pipelines import stack
    from pipelines.doctor import services, storage

    probes: dict[str, Probe] = {}
    if "s3" not in needed or config.storage.endpoint_url:
        probes["storage"] = lambda: storage.check_storage(config)
    if config.tracking.uri:
        uri = config.tracking.uri
        probes["mlflow"] = lambda: services.check_mlflow(uri)
    if config.cluster.address:
        variables = stack.ray_environment(stack.default_home()) if "ray" in needed else {}
        probes["ray"] = lambda: services.check_ray(config, variables)
    return probes
