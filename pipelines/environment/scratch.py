"""Temporary files of a process, which the next process removes if this one is killed."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.presentation.errors import PipelineError

logger = logging.getLogger(__name__)
_PREFIX = "ddpm-scratch-"


class _Scratch:
    """The folders of this process: by the temporary directory that they lie in, with an open file that holds each."""

    def __init__(self) -> None:
        self.folders: dict[Path, tuple[Path, int]] = {}
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Leave the folders to the parent process, in a fork of it."""
        for _, number in self.folders.values():
            os.close(number)
        self.folders, self.lock = {}, threading.Lock()  # another thread may have had the lock

    def remove(self) -> None:
        """Delete the folders."""
        for folder, number in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            os.close(number)
        self.folders.clear()


_scratch = _Scratch()
os.register_at_fork(after_in_child=_scratch.forget)
atexit.register(_scratch.remove)


class ScratchError(PipelineError):
    """The folder for this user's temporary files cannot be used."""


def closed_folder(base: Path | None = None) -> Path:
    """Return the folder of this user's persistent temporary files, which nobody else can read.

    Args:
        base: parent folder; default: TMPDIR.

    Raises:
        ScratchError: it belongs to another user, or is a link.
    """
    closed = (base or Path(tempfile.gettempdir())) / f"ddpm-{os.getuid()}"
    closed.mkdir(mode=0o700, exist_ok=True)
    if closed.is_symlink() or closed.stat().st_uid != os.getuid():
        raise ScratchError(f"{closed} is another user's: remove it, or set TMPDIR to a short path such as /var/tmp")
    closed.chmod(0o700)
    return closed


def scratch_folder() -> Path:
    """Return this process's folder for temporary files, in TMPDIR; it is deleted when the process ends.

    Pass it as `dir` to `tempfile`. A process locks its folder with a `flock`, which is released when it ends in any
    way. Unlocked folders in TMPDIR were left by killed processes, and are deleted when a process first needs its own.
    """
    parent = Path(tempfile.gettempdir())
    with _scratch.lock:
        folder, number = _scratch.folders.get(parent, (None, None))
        if folder is None or not folder.is_dir():  # a cleaner of old files may have taken it
            if number is not None:
                os.close(number)
            remove_leftovers(parent)
            folder, number = _make(parent)
            _scratch.folders[parent] = folder, number
        return folder


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a new folder in `scratch_folder`, which is deleted at the end of the block.

    Args:
        purpose: begins its name.
    """
    with tempfile.TemporaryDirectory(prefix=f"{purpose}-", dir=scratch_folder()) as name:
        yield Path(name)


def warn_if_short(needed: int, purpose: str) -> None:
    """Warn if the disk of `scratch_folder` has fewer bytes left than needed."""
    folder = scratch_folder()
    free = shutil.disk_usage(folder).free
    if free < needed:
        logger.warning(
            "%s may need %.1f GiB in %s, which has %.1f GiB left: free some, or set TMPDIR to another disk",
            purpose,
            needed / 2**30,
            folder.parent,
            free / 2**30,
        )


def remove_leftovers(parent: Path) -> None:
    """Delete the folders that killed processes of this user have left in a temporary directory."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, held, or on a file system without locks
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(number).st_uid == os.getuid():
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(number)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            number = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process took it for a leftover
            os.close(number)
            continue
        except OSError:  # a file system without locks: nobody can tell a leftover there
            return folder, number
        if folder.is_dir():
            return folder, number
        os.close(number)
