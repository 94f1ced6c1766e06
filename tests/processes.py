"""Processes below another, of which any may end while it is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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


@contextmanager
def standing_still(find: Callable[[], list[psutil.Process]]) -> Iterator[None]:
    """With processes stopped as soon as there are any that `find` gives."""
    stopped, over = list[psutil.Process](), threading.Event()

    def stop() -> None:
        while not stopped and not over.wait(0.05):
            for process in find():
                with suppress(psutil.Error):
                    process.suspend()
                    stopped.append(process)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert stopped


def commands(processes: list[psutil.Process]) -> list[tuple[psutil.Process, str]]:
    """Processes with their command lines, or the title that they have in its place."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found.append((process, " ".join(process.cmdline()).strip()))
    return found
