"""The `ddpm` command for tests: as its console script, or forked from a process that has imported its libraries.

A command that starts anew imports torch and MLflow for three seconds of a core, and the tests start hundreds. What is
forked imports all of the project itself, so that whatever its modules read or set at import is as in a new process.
Ray is imported there too: it reads its settings at import, and the command sets them before.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

DDPM = str(Path(sys.executable).parent / "ddpm")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "mlflow", "boto3", "hydra", "pandas", "rich", "typer"])


def start(arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the console script, for whoever reads while it runs or sends it signals."""
    return subprocess.Popen(
        [DDPM, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, forked.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams, "out"), Path(streams, "err")
        process = _FORKS.Process(target=_command, args=(arguments, folder, environment, out, err))
        process.start()
        try:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired([DDPM, *arguments], timeout, err.read_text())
        finally:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess([DDPM, *arguments], process.exitcode, out.read_text(), err.read_text())


def _command(arguments: tuple[str, ...], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Be the command, in a process that was forked for it."""
    for number, stream in ((1, out), (2, err)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [DDPM, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    from pipelines.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
