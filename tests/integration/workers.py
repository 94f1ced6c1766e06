"""Ray's worker processes for tests, forked from one that has imported their libraries.

A worker that Ray starts anew imports Ray twice, torch, MLflow and more, for three seconds of a core, and tests start
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
"""What workers would import; those that a test can do without may be missing."""
STARTER = str(Path(__file__).with_name("start_worker.py"))
PR_SET_PDEATHSIG = 1


@contextmanager
def forked_workers() -> Iterator[None]:
    """With Ray heads of the local stack whose workers are forked."""
    import pytest

    from pipelines.stack import services

    plain = services.launch

    def launch(name: str, command: list[str], home: Path, environment: dict[str, str], *rest: Any, **named: Any) -> Any:
        if name == "ray":
            assert command[1:3] == ["-m", "ray.scripts.scripts"]
            command = [sys.executable, "-m", "tests.integration.workers", address(), *command[3:]]
            environment = environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return plain(name, command, home, environment, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "launch", launch)
        yield


def address() -> str:
    """Return a new address for a server, whose folder goes with this process; sockets have short addresses."""
    folder = tempfile.mkdtemp(prefix="ddpm-workers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"{folder}/socket"


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
    parameter.RayParams.__init__ = lambda self, *given, **named: init(  # type: ignore[method-assign]
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
            be(*json.loads(request), streams)
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(pid)
        self._selector.register(ended, selectors.EVENT_READ, partial(self._tell, ended, pid, connection))
        self._selector.register(connection, selectors.EVENT_READ, partial(self._kill, ended, connection))

    def _kill(self, ended: int, connection: socket.socket) -> None:
        """Kill a worker whose asker has been killed."""
        self._selector.unregister(connection)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)

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
    """Be the worker, to the interpreter's ordinary end."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.setpgrp()
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    told, (worker, *rest) = parser.parse_known_args(arguments)
    context = json.loads(told.serialized_runtime_env_context or "{}")
    assert not context.get("command_prefix"), context
    os.environ.clear()
    os.environ.update(environment | context.get("env_vars", {}))
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [worker, *rest]
    sys.path[0] = str(Path(worker).parent)
    try:
        runpy.run_path(worker, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    sys.exit(status)


def main(at: str, *arguments: str) -> None:
    if arguments:
        return head(at, list(arguments))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server = Server(at)  # raylets may ask from now on
    for library in LIBRARIES:
        with suppress(ImportError):
            __import__(library)
    gc.freeze()  # else its collections would copy the memory that forks share
    return server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
