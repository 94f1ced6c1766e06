"""What there is of memory and disk, as far as it is known."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass

import psutil

from pipelines.environment import cgroups

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
        setting: the setting that raises the memory of each worker of the node, if one does; its value is in GiB.
    """

    where: str
    device: float | None = None
    node: float | None = None
    disk: float | None = None
    setting: str | None = None


def limits_here() -> NodeLimits:
    """Return what this machine, or this container, has."""
    memory, limit = psutil.virtual_memory().total, cgroups.limit("memory")
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    return NodeLimits("this machine", gpu_bytes(), min(memory, limit or memory), disk)


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
