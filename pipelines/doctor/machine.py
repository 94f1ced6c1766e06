"""Checks of this machine: versions, cores, memory, folders, ports and accelerators. Does not import torch at the
top."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipelines.doctor.check import Check, failed, ok, warning
from pipelines.environment import cgroups

GIB = 2**30
DISTRIBUTION = "ddpm-pipelines"
PACKAGES = ("torch", "ray", "mlflow", "webdataset")
LOW_MEMORY, LEAST_MEMORY = 2 * GIB, GIB // 2
LOW_DISK, LEAST_DISK = 2 * GIB, GIB // 10
SHARED_MEMORY = 640 * 2**20
"""Size of the object store of the local Ray head, with some reserve."""
STACK_PORTS = 22
"""Number of ports on which the local stack listens."""


def version_checks(python: str, installed: Mapping[str, str | None], requirements: Sequence[str]) -> list[Check]:
    """Return a check per package of whether the installed version satisfies the requirements of this project.

    Args:
        python: version of the interpreter.
        installed: version by package, None where it is missing.
        requirements: of the project, with `python…` for the interpreter.
    """
    ranges: dict[str, Requirement] = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            ranges[requirement.name.lower()] = requirement
    checks = []
    for name, version in {"python": python, **installed}.items():
        wanted = ranges[name].specifier if name in ranges else SpecifierSet()
        asked = f"{name}{wanted}"
        fix = f"python -m pip install '{ranges.get(name, name)}'"
        if name == "python":
            fix = f"make the virtual environment again with Python {wanted}"
        if version is None:
            checks.append(failed(name, f"not installed; {asked} is asked for", fix))
        elif not wanted.contains(version, prereleases=True):
            checks.append(failed(name, f"{version}; {asked} is asked for", fix))
        else:
            checks.append(ok(name, version))
    return checks


def check_versions() -> list[Check]:
    """Check that Python and the most important packages are in the ranges of the installed distribution."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    try:
        project = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [failed("versions", f"{DISTRIBUTION} is not installed here", "python -m pip install -e .")]
    asked = [*(project.requires or []), f"python{project.metadata['Requires-Python'] or ''}"]
    python = ".".join(map(str, sys.version_info[:3]))
    return version_checks(python, {name: version(name) for name in PACKAGES}, asked)


def core_check(cores: int, usable: int, limit: float | None, wanted: float | None) -> Check:
    """Check that this machine has the cores that a training needs.

    Args:
        cores: cores of the machine, as Ray counts them.
        usable: cores on which this process may run.
        limit: limit of its control group in cores; None for no limit.
        wanted: cores of the training's workers; None if they run on another cluster.
    """
    have = min(usable, limit or usable)
    found = f"{cores} cores" if have == cores else f"{cores} cores, {have:g} of them for this process"
    if wanted is not None and wanted > cores:
        return failed(
            "cores",
            f"{found}; the workers ask for {wanted:g}",
            f"cluster.num_workers={max(1, int(have))}, or a cluster",
        )
    if have < cores:
        fix = f"cluster.num_workers={max(1, int(have))} (Ray counts {cores}), or raise the container's limit"
        return warning("cores", found, fix)
    return ok("cores", found)


def check_cores(wanted: float | None) -> list[Check]:
    """Check that this machine has the wanted cores; see `core_check`."""
    return [core_check(os.cpu_count() or 1, len(os.sched_getaffinity(0)), cgroups.limit("cpu"), wanted)]


def memory_check(available: float, total: float, limit: float | None) -> Check:
    """Check that there is memory for the local services and a small training; all arguments are in bytes."""
    bound = f" (this container's limit is {limit / GIB:.1f})" if limit is not None and limit < total else ""
    found = f"{available / GIB:.1f} of {min(total, limit or total) / GIB:.1f} GiB free{bound}"
    fix = "end other programs, lower cluster.num_workers or micro_batch_size, or raise the container's memory limit"
    if available < LEAST_MEMORY:
        return failed("memory", found, fix)
    return warning("memory", found, fix) if available < LOW_MEMORY else ok("memory", found)


def check_memory() -> list[Check]:
    """Check the memory of this machine; see `memory_check`."""
    memory, free = psutil.virtual_memory(), cgroups.free_memory()
    available = memory.available if free is None else min(memory.available, free)
    return [memory_check(available, memory.total, cgroups.limit("memory"))]


def folder_check(name: str, folder: Path, wanted: float, fix: str) -> Check:
    """Check that files can be written in a folder, or in the parent in which it would be created, and that they fit.

    Args:
        wanted: bytes that should be free.
        fix: the setting that names another folder.
    """
    place = folder
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0")
    except OSError as error:
        return failed(name, f"{folder}: cannot be written in {place}: {error.strerror}", f"{fix}, or chown {place}")
    free = shutil.disk_usage(place).free
    found = f"{folder}: {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return failed(name, found, f"{fix}, or free some")
    return warning(name, f"{found}, {wanted / GIB:.0f} are wanted", fix) if free < wanted else ok(name, found)


def shared_memory_check(folder: Path = Path("/dev/shm")) -> Check:
    """Check that Ray's object store fits into shared memory."""
    fix = "start the container with --shm-size=2g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    if not folder.is_dir():
        return warning("/dev/shm", "missing: Ray keeps its objects in TMPDIR, which is slow", fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free"
    if free < SHARED_MEMORY:
        return warning("/dev/shm", f"{found}: Ray keeps its objects in TMPDIR, which is slow", fix)
    return ok("/dev/shm", found)


def port_check(host: str = "127.0.0.1") -> Check:
    """Check that there are enough free ports for the local stack on the loopback interface."""
    taken: list[socket.socket] = []
    try:
        for _ in range(STACK_PORTS):
            listener = socket.socket()
            taken.append(listener)
            listener.bind((host, 0))
            listener.listen()
    except OSError as error:
        found = f"{len(taken) - 1} of {STACK_PORTS} ports of {host} could be taken: {error.strerror}"
        return failed("ports", found, "ip link set lo up; ulimit -n 4096; end what holds the ports (ss -ltnp)")
    finally:
        for listener in taken:
            listener.close()
    return ok("ports", f"{STACK_PORTS} free ones on {host}")


def check_accelerators(gpus_per_worker: int | None) -> list[Check]:
    """Report the device that torch uses, and whether it has bfloat16.

    Args:
        gpus_per_worker: GPUs per worker of a training on this machine; None if its workers run elsewhere.
    """
    import torch

    from ddpm.prediction import computes_bf16

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = f"{', '.join(names)}; torch {torch.__version__}, CUDA {torch.version.cuda}"
        if computes_bf16(torch.device("cuda")):
            return [ok("gpu", f"{found}; bf16")]
        chosen = "optim.precision=auto takes fp16, or fp32 where there are no tensor cores"
        return [ok("gpu", f"{found}; no bf16: {chosen}")]
    cpu = torch.cpu
    flags = [("AMX", cpu._is_amx_tile_supported()), ("AVX-512 bf16", cpu._is_avx512_bf16_supported())]
    having = [name for name, there in flags if there]
    chosen = "bf16" if computes_bf16(torch.device("cpu")) else "fp32"
    having_said = f"with {' and '.join(having)}" if having else "without bf16"
    found = f"none; CPU {having_said}: optim.precision=auto takes {chosen}"
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        installed = driver.read_text().splitlines()[0].strip()
        fix = "install the torch build for this driver: https://pytorch.org/get-started/locally"
        return [warning("gpu", f"torch {torch.__version__} cannot use the card of driver {installed}", fix)]
    if gpus_per_worker:
        return [failed("gpu", f"{found}; each worker asks for {gpus_per_worker} GPU", "cluster.gpus_per_worker=0")]
    return [ok("gpu", found)]
