"""The `ddpm` command for tests: as its console script, or forked from a process that has imported its libraries.

A command that starts again imports torch and MLflow for three seconds of a core, and the tests start hundreds. What is
forked imports all of the project itself, so that whatever its modules read or set at import is as in a new process.
Ray is imported there too: it reads its settings at import, and the command sets them before.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.integration.workers import preload

DDPM = str(Path(sys.executable).parent / "ddpm")


def start(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start the console script, for whoever reads while it runs or sends it signals.

    Args:
        prefix: words before the command, which run it somewhere else.
    """
    return subprocess.Popen(
        [*prefix, DDPM, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Forks:
    """Runs commands to their ends, one at a time, each as a fork of one process that has imported their libraries."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def run(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        with self._one_at_a_time, tempfile.TemporaryDirectory() as streams:
            out, err = Path(streams, "out"), Path(streams, "err")
            for stream in (out, err):
                stream.touch()
            try:
                self._ask([arguments, str(folder), environment, str(out), str(err)])
                code = self._answer(timeout)
                if code is None:
                    raise subprocess.TimeoutExpired([DDPM, *arguments], timeout, stderr=err.read_bytes())
            except BaseException:  # a test's own limit comes as one
                self._end()
                raise
            return subprocess.CompletedProcess([DDPM, *arguments], int(code), out.read_text(), err.read_text())

    def _ask(self, request: list[object]) -> None:
        """Send a request, to a new process where there is none."""
        if self._server is None:
            command = [sys.executable, "-m", "tests.integration.command"]
            root = Path(__file__).parents[2]
            self._server = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")

    def _answer(self, timeout: float) -> bytes | None:
        """Return the exit status of a command; None where it has not ended in time."""
        assert self._server is not None
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], timeout)
        return self._server.stdout.readline() if ready else None

    def _end(self) -> None:
        """Kill the process and the command that it has forked."""
        if self._server is not None:
            for child in psutil.Process(self._server.pid).children():
                child.kill()
            self._server.kill()
            self._server.wait()
            self._server = None


FORKS = Forks()


def serve() -> None:
    """Fork a command for each request on stdin, and write its exit status when it has ended."""
    preload("rich", "typer")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            be(*json.loads(line))
            break
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def be(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Be the command, to the interpreter's ordinary end."""
    for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(name, how | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [DDPM, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    from pipelines.cli import main

    main()


if __name__ == "__main__":
    serve()
