"""Ray's worker processes for tests, forked from one that has imported their libraries.

A worker that Ray starts again imports Ray twice, torch, MLflow and more, for three seconds of a core, and tests start
hundreds. Here a raylet asks a process beside it for a fork (`start_worker.py`), which goes on as Ray's own
`default_worker.py` with the arguments, environment, folder and streams that it would have had. It imports Ray and all
of the project itself, so that whatever their modules read or set at import is as in a new process. Everything else is
Ray's own: its scheduling, its protocol, and how workers are watched and ended.

    python -m tests.integration.workers ADDRESS start --head …      (as `ray start` would)
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.integration.start_worker import VARIABLE

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "safetensors.torch")
LIBRARIES += (
    "mlflow",
    "boto3",
    "hydra",
    "pandas",
    "pyarrow.fs",
    "pyarrow.parquet",
    "pydantic",
    "PIL.Image",
    "scipy.linalg",
)
LIBRARIES += ("matplotlib.figure", "google.protobuf.descriptor_pb2", "msgpack", "jsonschema", "aiohttp", "requests")
"""What workers and commands would import; those that a test can do without may be missing."""
STARTER = str(Path(__file__).with_name("start_worker.py"))
PR_SET_PDEATHSIG = 1
PACE = "DDPM_TEST_PACE"
"""Names the file of a stack that says for how many seconds its workers rest after each step, where it is there."""


def pace_file(home: Path) -> Path:
    return home / "pace"


@contextmanager
def slow_steps(*homes: Path, seconds: float = 0.4) -> Iterator[None]:
    """With workers on these local stacks that rest after each step, as where a GPU has the work.

    A training to which something is going to happen otherwise computes all the while, and its own undisturbed twin
    after it once more.
    """
    for home in homes:
        pace_file(home).write_text(str(seconds))
    try:
        yield
    finally:
        for home in homes:
            pace_file(home).unlink(missing_ok=True)


def pause(file: Path) -> None:
    with suppress(FileNotFoundError):
        time.sleep(float(file.read_text() or 0))


@contextmanager
def forked_workers(at: str | None = None) -> Iterator[None]:
    """With Ray heads of the local stack whose workers are forked.

    Args:
        at: address at which the one head of this stack forks; None for a new one.
    """
    import pytest

    from pipelines.stack import processes, services

    plain = processes.launch

    def launch(name: str, command: list[str], home: Path, environment: dict[str, str], *rest: Any, **named: Any) -> Any:
        if name == "ray":
            assert command[1:3] == ["-m", "ray.scripts.scripts"]
            command = [sys.executable, "-m", "tests.integration.workers", at or address(), *command[3:]]
            environment = environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            environment |= {PACE: str(pace_file(home))}
        return plain(name, command, home, environment, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "launch", launch)
        yield


def address() -> str:
    """Return a new address for a server, whose folder goes with this process; sockets have short addresses."""
    folder = tempfile.mkdtemp(prefix="ddpm-workers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"{folder}/socket"


def forked(at: str, module: str) -> tuple[list[str], dict[str, str]]:
    """Return how `python -m MODULE` is started as a fork where workers are forked: a command, and what it has set."""
    return [sys.executable, STARTER, "-m", module], {VARIABLE: at}


def start_server(at: str) -> dict[str, str]:
    """Start a process that forks workers, which ends with this one, and return what their raylet has to have set."""
    server = [sys.executable, "-m", "tests.integration.workers", at]
    subprocess.Popen(server, stdin=subprocess.DEVNULL, cwd=ROOT)
    return {VARIABLE: at}


def head(at: str, arguments: list[str]) -> None:
    """Be a Ray head whose workers are forked."""
    os.environ.update(start_server(at))
    from ray._private import parameter
    from ray.scripts import scripts

    init = parameter.RayParams.__init__
    parameter.RayParams.__init__ = lambda self, *given, **named: init(
        self, *given, **{"setup_worker_path": STARTER, **named}
    )
    sys.argv = ["ray", *arguments]
    scripts.main()


class Server:
    """Forks a worker for each connection, and tells it when the worker has ended."""

    def __init__(self, at: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(at)
        self._listening.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ, self._fork)

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _fork(self) -> None:
        connection, _ = self._listening.accept()
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        request = bytearray()
        while len(request) < int.from_bytes(size, "big"):
            request += connection.recv(1 << 20)
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            self._listening.close()
            connection.close()
            arguments, folder, environment = json.loads(request)
            be(arguments, folder, environment, streams)
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(pid)
        self._selector.register(ended, selectors.EVENT_READ, partial(self._tell, ended, pid, connection))
        self._selector.register(connection, selectors.EVENT_READ, partial(self._kill, ended, connection))

    def _kill(self, ended: int, connection: socket.socket) -> None:
        """Kill a worker whose asker has been killed, or pass on a signal that its asker was sent."""
        sent = connection.recv(1)
        if not sent:
            self._selector.unregister(connection)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, sent[0] if sent else signal.SIGKILL)

    def _tell(self, ended: int, pid: int, connection: socket.socket) -> None:
        _, status = os.waitpid(pid, 0)
        with suppress(KeyError):
            self._selector.unregister(connection)
        self._selector.unregister(ended)
        os.close(ended)
        with suppress(OSError):
            connection.send(bytes([abs(os.waitstatus_to_exitcode(status)) & 255]))
        connection.close()


def be(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Be the process that was asked for, to the interpreter's ordinary end."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.setpgrp()
    os.environ.clear()
    os.environ.update(environment)
    try:
        (be_module if arguments[0] == "-m" else be_worker)(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    sys.exit(status)


def be_worker(arguments: list[str]) -> None:
    """Be what Ray's `setup_worker.py` would start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    told, (worker, *rest) = parser.parse_known_args(arguments)
    context = json.loads(told.serialized_runtime_env_context or "{}")
    assert not context.get("command_prefix"), context
    os.environ.update(context.get("env_vars", {}))
    set_up_torch()
    sys.argv = [worker, *rest]
    sys.path[0] = str(Path(worker).parent)
    runpy.run_path(worker, run_name="__main__")


def be_module(arguments: list[str]) -> None:
    """Be `python -m MODULE …`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_up_torch()
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


def set_up_torch() -> None:
    """Do what torch would have done with the environment, had it been imported now."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if PACE in os.environ:
        pace = Path(os.environ[PACE])
        register_optimizer_step_post_hook(lambda *_: pause(pace))


def main(at: str, *arguments: str) -> None:
    if arguments:
        return head(at, list(arguments))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server = Server(at)  # raylets may ask from now on
    preload()
    return server.serve()


def preload(*more: str) -> None:
    """Import what forks need, and what MLflow works out once in a process that logs a model: a second of a core."""
    for library in (*LIBRARIES, *more):
        with suppress(ImportError):
            __import__(library)
    with suppress(ImportError, AttributeError):
        from mlflow.utils import requirements_utils

        requirements_utils._init_modules_to_packages_map()
    gc.freeze()  # else its collections would copy the memory that forks share


if __name__ == "__main__":
    main(*sys.argv[1:])
