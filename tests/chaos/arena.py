"""A local stack with a second Ray node, a training on it, and the means to kill any part of them.

The training talks to S3 and MLflow through proxies, whose answers fail as told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipelines import stack
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.chaos.fault_proxy import FaultProxy
from tests.integration import command
from tests.integration.workers import PACE, forked_workers, pace_file
from tests.processes import family, ray_train_workers

CPUS = os.cpu_count() or 2
BATCH = 64


def until(true: Callable[[], Any], timeout_s: float, what: Callable[[], str]) -> Any:
    """Wait for something to become true; what it is."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what()}"
        time.sleep(0.1)
    return found


class Training:
    """A running `ddpm train`, and what it says.

    Args:
        prefix: words before the command, which run it somewhere else.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], arguments: list[str], prefix: Sequence[str] = ()
    ) -> None:
        self.arguments = arguments
        self.process = command.start(["train", *arguments, "--json"], folder, environment, prefix)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    @property
    def name(self) -> str:
        """That of its run."""
        (name,) = [setting.removeprefix("name=") for setting in self.arguments if setting.startswith("name=")]
        return name

    def images(self) -> int:
        """Images seen, as last said."""
        for line in reversed(self.said):
            if found := re.search(r"([\d,]+) images, ", line):
                return int(found[1].replace(",", ""))
        return 0

    def gets_on(self, timeout_s: float = 150) -> None:
        """Wait until it has said twice that it sees more images: it trains."""
        for _ in range(2):
            before = self.images()

            def more(before: int = before) -> bool:
                assert self.process.poll() is None, "".join(self.said)[-3000:]
                return self.images() != before

            until(more, timeout_s, lambda: f"a step after {''.join(self.said)[-1500:]}")

    def answer(self, timeout_s: float = 120) -> dict[str, Any]:
        """Its last line, when it has ended well."""
        assert self.process.wait(timeout_s) == 0, "".join(self.said)[-3000:]
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.read().strip().splitlines()[-1])
        return answer


class Arena:
    """The stack of a test, with a node more: two nodes, each of which holds one worker."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.node: subprocess.Popen[str] | None = None
        self.trainings: list[Training] = []
        with forked_workers():
            self.state: StackState = stack.up(home)
        self.s3 = Storage(self.state.s3_endpoint, str(self.state.credentials_file), "us-east-1")
        self.s3_proxy = FaultProxy(str(self.state.s3_endpoint)).__enter__()
        self.mlflow_proxy = FaultProxy(str(self.state.tracking_uri)).__enter__()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_"))}
        self.environment = inherited | {
            "DDPM_HOME": str(home),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "AWS_ENDPOINT_URL": self.s3_proxy.url,
            "AWS_SHARED_CREDENTIALS_FILE": str(self.state.credentials_file),
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.mlflow_proxy.url,
        }

    def close(self) -> None:
        for training in self.trainings:
            training.process.kill()
        self.kill_node()
        for proxy in (self.s3_proxy, self.mlflow_proxy):
            proxy.__exit__(None, None, None)
        stack.down(self.home)

    def ddpm(self, *arguments: str) -> None:
        done = command.FORKS.run(arguments, self.folder, self.environment, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]

    def train(self, *arguments: str) -> Training:
        self.trainings.append(Training(self.folder, self.environment, list(arguments)))
        return self.trainings[-1]

    def start_node(self, attempts: int = 10) -> None:
        """Start the second node; again where Ray's own 30 s were not enough, as whoever supervises it does."""
        assert self.state.ray_address is not None
        for _ in range(attempts):
            self.node = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("node.py")), self.state.ray_address, str(CPUS)],
                env=self.environment
                | stack.ray_environment(self.home)
                | {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
                | {PACE: str(pace_file(self.home))},
                start_new_session=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self.node.stdout is not None
            if self.node.stdout.readline() == "there\n":
                return
            self.kill_node()
        raise AssertionError(f"Ray's second node has not started in {attempts} attempts")

    def kill_node(self) -> None:
        """The machine is gone: its raylet, agents and workers at once."""
        if self.node is not None:
            for process in family(self.node.pid):
                _kill(process)
            self.node.wait()
            self.node = None

    def drain_node(self, deadline_s: int) -> None:
        """Announce that the second node goes away, as a cloud's notice of preemption does."""
        code = (
            "import sys, ray\n"
            "ray.init(address=sys.argv[1], logging_level='ERROR')\n"
            "print(next(n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == '127.0.0.2'))\n"
        )
        environment = self.environment | stack.ray_environment(self.home)
        address = str(self.state.ray_address)
        found = subprocess.run(
            [sys.executable, "-c", code, address], env=environment, capture_output=True, text=True, check=True
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"]
        command += [f"--node-id={found.stdout.split()[-1]}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message=spot instance", f"--deadline-remaining-seconds={deadline_s}"]
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers on both nodes."""
        roots = [status.pid for status in stack.status(self.home) if status.name == "ray" and status.pid]
        roots += [self.node.pid] if self.node else []
        return [process for root in roots for process in ray_train_workers(root)]

    def kill_service(self, name: str, away: Callable[[], object]) -> None:
        """SIGKILL a service of the stack, and start it again where it was when `away` returns."""
        (pid,) = [status.pid for status in stack.status(self.home) if status.name == name]
        assert pid is not None
        for process in family(pid):
            _kill(process)
        away()
        assert stack.up(self.home, [name]) == self.state


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
