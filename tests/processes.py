"""Processes below another, of which any may end while it is looked at."""

from __future__ import annotations

from contextlib import suppress

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing where it has ended."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL processes, and wait until they are gone: for a moment a killed one still looks as if it ran."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left


def ray_train_workers(pid: int) -> list[psutil.Process]:
    """Ray Train's workers below a process."""
    found = []
    for process in family(pid):
        with suppress(psutil.Error):
            if process.name().startswith("ray::RayTrain") or "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found
