"""A command as a job on an existing Ray cluster, through Ray's Jobs API.

Import it after the token of the cluster is in the environment, because ray reads it when it is imported.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipelines.config import RayLaunch
from pipelines.environment.loopback import bypass_proxies
from pipelines.launch.command import ClusterCommand, LaunchError, check_same, detachable
from pipelines.presentation.progress import StageNotice

AGAIN = "@"
"""Separator in a submission ID between the name of the job, which cannot contain it, and the submission's number."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 1.0


@dataclass(frozen=True)
class Submission:
    """A job on the cluster.

    Attributes:
        status: "PENDING", "RUNNING", "SUCCEEDED", "FAILED" or "STOPPED".
        message: Ray's reason of the status.
        started: seconds since the epoch; None before the start.
        entrypoint: command; empty if unknown.
    """

    id: str
    status: str
    message: str = ""
    started: float | None = None
    entrypoint: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.status in ENDED

    @property
    def number(self) -> int:
        """Number of the submission under its name, from 1."""
        return int(self.id.rpartition(AGAIN)[2]) if AGAIN in self.id else 1

    def __str__(self) -> str:
        """In words."""
        return f"{self.id}: {self.status.lower()}{f' ({self.message})' if self.message else ''}"


def of_name(name: str, submissions: Sequence[Submission]) -> list[Submission]:
    """Return the submissions under a job's name, in order."""
    own = [s for s in submissions if s.id == name or s.id.rpartition(AGAIN)[0] == name]
    return sorted(own, key=lambda submission: submission.number)


def next_id(name: str, earlier: Sequence[Submission]) -> str:
    """Return the ID of the next submission under a name: Ray accepts no ID twice, even after a job has ended."""
    return f"{name}{AGAIN}{earlier[-1].number + 1}" if earlier else name


class RayJobs:
    """The jobs of a Ray cluster.

    Attributes:
        client: Ray's client, see `connect`.
        patience_s: seconds for which an unavailable server is tried again while a job is followed.
    """

    def __init__(self, client: Any, address: str, patience_s: float = 300) -> None:
        self.client, self.address, self.patience_s = client, address, patience_s

    @classmethod
    def connect(cls, address: str, patience_s: float = 300) -> RayJobs:
        """Return the jobs of the cluster at an address.

        Raises:
            LaunchError: no cluster answers, or it refuses access.
        """
        bypass_proxies(address)
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise RAY_ADDRESS would take precedence
        with _as_launch_errors(address):
            return cls(JobSubmissionClient(address), address, patience_s)

    def named(self, name: str) -> list[Submission]:
        """Return the submissions under a job's name, in order."""
        with _as_launch_errors(self.address):
            found = self.client.list_jobs()
        return of_name(name, [_submission(job) for job in found if job.submission_id])

    def submit(self, command: ClusterCommand, program: str, variables: Mapping[str, str]) -> tuple[Submission, bool]:
        """Submit a command and return its job and True, or the running job of the same name and False.

        Args:
            program: command of this program on the cluster.
            variables: environment of the job. Ray's dashboard shows it: addresses and paths, no secrets.

        Raises:
            LaunchError: a job of the same name runs another command, or the cluster refuses.
        """
        earlier, entrypoint = self.named(command.name), command.shell(program)
        if earlier and not earlier[-1].ended:
            stop = f"ddpm launch --target ray --stop {command.name}"
            check_same(f"job {earlier[-1].id}", earlier[-1].entrypoint, entrypoint, stop)
            return earlier[-1], False
        identity = next_id(command.name, earlier)
        with _as_launch_errors(self.address):
            self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=identity,
                runtime_env={"env_vars": dict(variables)},
                metadata={"run": command.config.name, "verb": command.verb},
            )
        return Submission(identity, "PENDING"), True

    def get(self, identity: str) -> Submission:
        """Return the current state of a job."""
        with _as_launch_errors(self.address):
            return _submission(self.client.get_job_info(identity))

    def follow(
        self,
        identity: str,
        write: Callable[[str], object],
        notice: StageNotice,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Submission | None:
        """Write the output of a job until it ends and return its final state; return None if Ctrl-C detaches.

        An unavailable server is tried again for `patience_s` seconds; no output is written twice.

        Raises:
            LaunchError: the server stays away, or has no such job.
        """
        written, answered_at = 0, time.monotonic()

        def count(text: str) -> None:
            nonlocal written, answered_at
            write(text)
            written, answered_at = written + len(text), time.monotonic()

        with detachable(notice, f"job {identity} keeps running; the same command follows it again"):
            while True:
                try:
                    asyncio.run(self._tail(identity, written, count))
                    state = self.get(identity)
                    answered_at = time.monotonic()
                    if state.ended:
                        return state
                except (LaunchError, aiohttp.ClientError, OSError, RuntimeError) as error:
                    if time.monotonic() - answered_at > self.patience_s:
                        raise LaunchError(f"job {identity} can no longer be followed: {error}") from error
                sleep(POLL_S)
        return None

    def stop(self, identity: str, wait_s: float) -> Submission:
        """Stop a job, wait until it has ended, and return its final state.

        Args:
            wait_s: seconds that it has for a checkpoint before Ray kills it.

        Raises:
            LaunchError: it has not ended a while later.
        """
        with _as_launch_errors(self.address):
            self.client.stop_job(identity)
        deadline = time.monotonic() + wait_s + 30
        while not (state := self.get(identity)).ended:
            if time.monotonic() > deadline:
                raise LaunchError(f"job {identity} has not stopped within {wait_s + 30:.0f} s: {state}")
            time.sleep(POLL_S)
        return state

    async def _tail(self, identity: str, skip: int, write: Callable[[str], object]) -> None:
        """Write the output of a job without the first `skip` characters, until the server closes the connection."""
        async for text in self.client.tail_job_logs(identity):
            fresh = text[skip:]
            skip = max(0, skip - len(text))
            if fresh:
                write(fresh)


def program_of(launch: RayLaunch, *, local: bool) -> str:
    """Return the command of this program on the cluster.

    Args:
        local: whether it is the local stack, whose processes may not have it on their PATH.
    """
    if launch.command is not None:
        return launch.command
    if not local:
        return "ddpm"
    beside = shutil.which("ddpm", path=str(Path(sys.executable).parent))
    return shlex.join([beside] if beside else [sys.executable, "-c", "from pipelines.cli import main; main()"])


def job_variables(command: ClusterCommand, home: Path | None) -> dict[str, str]:
    """Return the environment of a job: addresses, the time for stopping, and the folder of the local stack if it is
    used.

    Args:
        home: folder of the local stack; None for another cluster.
    """
    local = {"DDPM_HOME": str(home)} if home is not None else {}
    return {
        **command.environment(),
        **local,
        **command.stop_variables,
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a training names the same variables for its workers
    }


def _submission(job: Any) -> Submission:
    status, message = str(job.status), job.message or ""
    started = job.start_time / 1000 if job.start_time else None
    return Submission(job.submission_id, status, " ".join(message.split())[:400], started, job.entrypoint or "")


@contextmanager
def _as_launch_errors(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise LaunchError(
            f"the Ray cluster at {address} asks for its token: set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_TOKEN ({str(error).splitlines()[0]})"
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise LaunchError(
            f"no Ray cluster answers at {address}: check cluster.address or RAY_ADDRESS, which is that of its "
            f"dashboard, http://HOST:8265 ({error})"
        ) from error
    except RuntimeError as error:
        raise LaunchError(f"the Ray cluster at {address} refuses: {error}") from error
