"""The cores and memory that the control groups of a container leave to this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def whole_cores() -> int:
    """Return the number of cores that this process may use, at least 1, limited by the container."""
    allowed = len(os.sched_getaffinity(0))
    share = limit("cpu")
    return allowed if share is None else max(1, min(allowed, int(share)))


def limit(kind: str, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Return the tightest limit of the control groups of this process; None if there is none.

    Args:
        kind: "cpu" (in cores) or "memory" (in bytes, of what its processes use together).
        root: where control groups are mounted.
        own: the file that names those of this process.
    """
    names = {"cpu": ("cpu.max", "cpu.cfs_quota_us"), "memory": ("memory.max", "memory.limit_in_bytes")}[kind]
    found = [_read_limit(kind, group / names[v1]) for v1, group in _groups(kind, root, own)]
    return min((number for number in found if number is not None), default=None)


def free_memory(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Return the free memory in bytes within the limits of the control groups; None without a limit."""
    free = []
    for v1, group in _groups("memory", root, own):
        names = ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")
        most, used = (_read_limit("memory", group / name[v1]) for name in names)
        if most is not None and used is not None:
            free.append(most - used)
    return min(free, default=None)


def _groups(kind: str, root: Path, own: Path) -> Iterator[tuple[bool, Path]]:
    """Yield (is version 1, folder) of the control groups of this process, from the innermost outwards."""
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers != "" and kind not in controllers.split(","):
            continue
        folder = root / controllers / path.lstrip("/")
        yield from ((controllers != "", place) for place in (folder, *folder.parents) if place.is_relative_to(root))


def _read_limit(kind: str, file: Path) -> float | None:
    """Return the limit in a file of a control group; None if it sets none."""
    try:
        quota, *period = file.read_text().split()
        if quota in ("max", "-1"):
            return None
        if kind == "memory":
            return float(quota) if int(quota) < 2**60 else None
        per = period[0] if period else (file.parent / "cpu.cfs_period_us").read_text()
        return int(quota) / int(per)
    except (OSError, ValueError):
        return None
