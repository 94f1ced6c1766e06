"""Callbacks start processes quickly, and free the resources that Ray Train forgets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    FinishedState,
    ResizingState,
    RestartingState,
    RunningState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.config import compose
from pipelines.training.goodput import CAUSES
from pipelines.training.loop.progress import Progress
from pipelines.training.ray_train import callbacks
from pipelines.training.ray_train.callbacks import FreeWorkers, TellCause, cause_of
from pipelines.training.ray_train.mailboxes import Monitor
from pipelines.training.ray_train.trainer import make_trainer


def group(placement_group: str) -> SimpleNamespace:
    handle = SimpleNamespace(placement_group=placement_group)
    return SimpleNamespace(get_worker_group_state=lambda: SimpleNamespace(placement_group_handle=handle))


@pytest.mark.parametrize("groups, freed", [([], []), (["first"], ["first"]), (["first", "second"], ["second"])])
def test_resources_of_the_newest_worker_group_are_freed_when_the_controller_ends(monkeypatch, groups, freed):
    removed: list[str] = []
    monkeypatch.setattr(callbacks, "remove_placement_group", removed.append)
    callback = FreeWorkers()
    for name in groups:
        callback.after_worker_group_start(group(name))
    assert removed == []
    asyncio.run(callback.before_controller_shutdown())
    assert removed == freed


def test_the_controller_of_every_training_frees_its_workers_resources():
    trainer = make_trainer(lambda settings: None, {}, compose(["+experiment=digits"]).cluster, "digits")
    assert [type(c) for c in trainer._create_default_callbacks() if isinstance(c, FreeWorkers)] == [FreeWorkers]


def died(preempted: bool = False) -> Exception:
    return WorkerHealthCheckFailedError("a worker", RayActorError(None, "it died", preempted=preempted))


PEER = RuntimeError("Connection closed by peer")
CAUSED = {
    "process": [died(), PEER],
    "preemption": [died(), died(preempted=True), PEER],
    "error": [ValueError("a shard is damaged")],
}


@pytest.mark.parametrize("cause", CAUSED)
def test_the_loss_of_a_worker_is_the_cause_of_the_errors_of_its_peers(cause):
    failures = CAUSED[cause]
    assert cause_of(WorkerGroupError("failed", dict(enumerate(failures)))) == cause
    assert cause in CAUSES


def test_a_worker_that_does_not_answer_and_one_that_is_lost_at_the_start_are_lost_processes():
    assert cause_of(WorkerGroupError("failed", {1: WorkerHealthCheckTimeoutError("hanging")})) == "process"
    assert cause_of(ControllerError(RayActorError())) == "process"
    assert cause_of(ControllerError(TimeoutError())) == "error"


def on_nodes(*names: str) -> SimpleNamespace:
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in names]
    return SimpleNamespace(get_workers=lambda: workers)


def test_the_monitor_is_told_why_workers_start_again_and_that_a_node_was_lost_with_them(monkeypatch):
    alive = {"a", "b"}
    nodes = [{"NodeID": name, "Alive": name in alive} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monitor = Monitor()
    callback = TellCause(SimpleNamespace(lost=SimpleNamespace(remote=monitor.lost)))
    lost_process = WorkerGroupError("failed", {0: died(), 1: PEER})
    lives = [
        (
            ("a", "b"),
            [RestartingState(lost_process), ShuttingDownState(RunningState()), ResizingState(None)],
            "process",
        ),
        (("a", "c"), [RestartingState(lost_process)], "node"),
        (("a", "b", "d"), [RestartingState(lost_process)], "preemption"),
        (("a", "c"), [ResizingState(None)], "resize"),
        (("a",), [RestartingState(WorkerGroupError("failed", {0: ValueError()}))], "error"),
        (("a",), [FinishedState()], None),
    ]
    # Ray has announced that a node goes, and no error of a worker says so.
    notice = PreemptionInfo(None, {"d": [2]})
    status = WorkerGroupPollStatus({0: WorkerStatus(running=True, preemption_info=notice)})
    for number, (where, states, cause) in enumerate(lives):
        callback.after_worker_group_start(on_nodes(*where))
        monitor.post(str(number), 1.0, Progress(64, 0, 1.0, {}))
        callback.after_worker_group_poll_status(status if cause == "preemption" else WorkerGroupPollStatus({}))
        for state in states:
            callback.after_controller_state_update(RunningState(), state)
        monitor.post(str(number), 2.0, Progress(64, 0, 1.0, {}))
    assert [attempt.lost_to for attempt in monitor.attempts.values()] == [cause for _, _, cause in lives]


def test_callbacks_and_functions_of_workers_load_without_torch_which_is_imported_while_the_collector_rests():
    modules = ", ".join(f"pipelines.training.ray_train.{name}" for name in ("callbacks", "worker"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
