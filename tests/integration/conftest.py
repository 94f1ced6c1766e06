"""One local stack for all integration tests, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines import stack
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration import command
from tests.integration.workers import address, forked_workers
from tests.processes import commands, family, standing_still

DIGITS = [
    "+experiment=digits",
    "images=6400",
    "optim.power_ema=[0.05,0.1]",
    "checkpoint.every=2560",
    "tracking.log_every=640",
    "tracking.grid_every=1280",
    "tracking.grid_images=20",
]
"""What the run `digits` is trained by."""
SCORED = ["sampler.steps=10", "evaluation.seeds=2", "evaluation.likelihood_images=4", "registry.n=359"]
"""What it is drawn and scored by as `models:/digits/1`."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    err: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Shell:
    """The `ddpm` command in a folder of its own, on the tests' stack."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return command.start(arguments, self.folder, self.environment)

    def __call__(self, *arguments: str, timeout: float = 550) -> Finished:
        done = command.FORKS.run(arguments, self.folder, self.environment, timeout)
        lines = done.stdout.strip().splitlines()
        return Finished(done.returncode, done.stderr, json.loads(lines[-1]) if lines and lines[-1][0] == "{" else {})

    def ok(self, *arguments: str) -> Finished:
        done = self(*arguments)
        assert done.code == 0, done.err[-3000:]
        return done


@pytest.fixture(scope="session")
def forks() -> str:
    """Where processes are forked as long as the stack's Ray is there."""
    return address()


@pytest.fixture(scope="session")
def local_stack(tmp_path_factory: pytest.TempPathFactory, forks: str) -> Iterator[StackState]:
    """SeaweedFS, MLflow and Ray on loopback, ended at the end."""
    home = tmp_path_factory.mktemp("home") / ".ddpm"
    try:
        with forked_workers(forks):
            state = stack.up(home)
        yield state
    finally:
        stack.down(home)


@pytest.fixture(scope="session")
def shell(local_stack: StackState, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Commands find the stack through DDPM_HOME; shards are cached in a folder of their own."""
    foreign = ("AWS_", "MLFLOW_", "RAY_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {"DDPM_HOME": str(local_stack.home), "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    return Shell(tmp_path_factory.mktemp("work"), environment)


@pytest.fixture(scope="session")
def s3(local_stack: StackState) -> Storage:
    return Storage(local_stack.s3_endpoint, str(local_stack.credentials_file), "us-east-1")


@pytest.fixture(scope="session")
def digits(shell: Shell) -> Finished:
    """The whole way to `models:/digits/1`: modules that ask for it belong to the group `digits`, which shares it."""
    return shell.ok("flow", *DIGITS, *SCORED, "--out", "flow", "--json")


def one_stopped(title: str, home: Path) -> AbstractContextManager[None]:
    """With the first worker of a local stack that has a title stopped as soon as it is there."""
    (head,) = [service.pid for service in stack.status(home) if service.name == "ray"]
    assert head is not None
    return standing_still(lambda: [process for process, text in commands(family(head)) if text == title][:1])
