"""What there is of memory and disk, as far as it is known."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.environment import cgroups

NODE_FOLDER = "DDPM_NODE_FOLDER"
"""Environment variable with the folder in which a node keeps copies of checkpoints."""
SHARED_MEMORY = Path("/dev/shm")
SMALLEST = 2**30
"""Size in bytes below which shared memory is not used: a container's 64 MiB would hold no copy."""
NVIDIA_SMI_S = 10.0
"""Seconds that `nvidia-smi` may take."""


@dataclass(frozen=True)
class NodeLimits:
    """Bytes that a node has; None where that is not known.

    Attributes:
        where: the node in words.
        device: of a GPU.
        node: of memory.
        disk: of disk for temporary files.
        shared: of shared memory, where that is what keeps copies of checkpoints.
        settings: place -> the setting that makes it larger, by GiB for each worker of the node, or of disk for all.
    """

    where: str
    device: float | None = None
    node: float | None = None
    disk: float | None = None
    shared: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def limits_here() -> NodeLimits:
    """Return what this machine, or this container, has."""
    memory, limit = psutil.virtual_memory().total, cgroups.limit("memory")
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    return NodeLimits("this machine", gpu_bytes(), min(memory, limit or memory), disk, shared_bytes())


def copies_folder() -> Path | None:
    """Return the folder in which this node keeps copies of checkpoints; None for that of temporary files."""
    if named := os.environ.get(NODE_FOLDER):
        return Path(named)
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total >= SMALLEST else None


def shared_bytes() -> float | None:
    """Return the size of shared memory; None where copies of checkpoints are kept elsewhere.

    Not what is free of it: the copies of a run that goes on are there already.
    """
    return shutil.disk_usage(SHARED_MEMORY).total if copies_folder() == SHARED_MEMORY else None


def gpu_bytes() -> float | None:
    """Return the memory of the smallest GPU of this machine; None where `nvidia-smi` names none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return smallest_gpu(asked.stdout) if asked.returncode == 0 else None


def smallest_gpu(text: str) -> float | None:
    """Return the smallest of the sizes in MiB that `nvidia-smi` prints, in bytes; None where there is none."""
    sizes = [int(line) for line in text.split("\n") if line.strip().isdecimal()]
    return min(sizes) * 2.0**20 if sizes else None
