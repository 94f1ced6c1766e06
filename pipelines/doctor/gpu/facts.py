"""What a report of a fault needs: versions, devices, their topology, and variables that change how they are used."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

from pipelines.environment.credentials import redact
from pipelines.environment.lineage import installed_versions
from pipelines.presentation.blocks import Listing, Section

VARIABLES = ("NCCL_", "TORCH_NCCL_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "GLOO_", "OMP_", "PYTORCH_")
"""Beginnings of the names of variables that change how devices compute and communicate."""
NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CXX", "CC")
DRIVER = Path("/proc/driver/nvidia/version")
NVIDIA_SMI_S = 10


def report_section(environ: Mapping[str, str]) -> Section:
    """Return what a report of a fault needs, to be copied into it."""
    lines = [f"{name}: {value}" for name, value in _versions().items()]
    lines += [f"device {i}: {card}" for i, card in enumerate(_cards())]
    lines += [f"{name}={redact(environ[name])}" for name in sorted(environ) if _matters(name)]
    blocks = [Listing("\n".join(lines))]
    matrix = topology()
    if matrix:
        blocks.append(Listing(matrix))
    return Section("report", "What a report of a fault needs", blocks)


def topology() -> str:
    """Return what `nvidia-smi topo -m` prints, without colours; empty where there is none."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return re.sub(r"\x1b\[[0-9;]*m", "", asked.stdout).strip() if asked.returncode == 0 else ""


def link_kinds(matrix: str, visible: str | None) -> dict[tuple[int, int], str]:
    """Return how each two devices are connected (NV12, PIX, SYS, …), by the indices that torch gives them.

    Args:
        matrix: as `topology` returns it.
        visible: CUDA_VISIBLE_DEVICES. Where it names devices otherwise than by number, nothing is known.
    """
    rows = [line.split() for line in matrix.splitlines() if re.match(r"GPU\d+\s", line)]
    physical = [row[1:] for row in rows if len(row) > len(rows)]
    if visible is None:
        order = list(range(len(physical)))
    elif re.fullmatch(r"\d+(,\d+)*", visible):
        order = [int(number) for number in visible.split(",")]
    else:
        return {}
    if any(number >= len(physical) for number in order):
        return {}
    pairs = ((i, j) for i in range(len(order)) for j in range(i + 1, len(order)))
    return {(i, j): physical[order[i]][order[j]] for i, j in pairs}


def _matters(name: str) -> bool:
    return name.startswith(VARIABLES) or name in NAMES


def _versions() -> dict[str, str]:
    try:
        found = {name: version or "none" for name, version in installed_versions().items()}
    except PackageNotFoundError:  # a checkout on PYTHONPATH alone
        found = {"ddpm": "not installed", "python": platform.python_version(), "torch": torch.__version__}
    capability = torch.backends.cpu.get_cpu_capability()
    found |= {"system": platform.platform(), "processor": f"{os.cpu_count()} cores, {capability}"}
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["driver"] = DRIVER.read_text().splitlines()[0].strip() if DRIVER.is_file() else "none"
    return found


def _cards() -> list[str]:
    if not torch.cuda.is_available():
        return []
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{c.name}, {c.total_memory / 2**30:.1f} GiB, compute capability {c.major}.{c.minor}" for c in cards]
