"""What becomes of the other ranks, in processes of their own, when one of two fails or hangs."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from pipelines import checkpoints
from pipelines.shards.stream import TrainingStream
from pipelines.storage import StorageError
from pipelines.training.loop import checkpoint, watchdog
from pipelines.training.loop.context import Job, RunContext
from pipelines.training.loop.preview import Preview
from pipelines.training.loop.progress import Clock
from pipelines.training.loop.telemetry import StepStatistics
from pipelines.training.loop.train import train_rank
from pipelines.training.loop.watchdog import EXIT_CODE
from tests.forked import FORKING
from tests.pipelines.training.loop.ranks import FolderShell, MemoryTracker, tiny_config

BATCH = 25
LONGER_THAN_ANY_TEST_S = 1800
HANG_S = 15
"""Longer than a rank takes to start on a busy machine."""


def fail(*args, **kwargs):
    raise ValueError("the reason")


def sleep_for_ever(*args, **kwargs):
    while True:
        time.sleep(1)


@dataclass
class Hook:
    """An evaluation hook of which one rank fails."""

    rank: int

    def due(self, before, seen):
        return seen == 2 * BATCH

    def __call__(self, state, spec, device):
        if dist.get_rank() == self.rank:
            fail()
        dist.barrier()


def broken_read(self, first, load):
    if first >= 2 * BATCH:
        raise StorageError("file:///gone: the reason")
    return load(self, first)


def break_rank(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process fail at one place of the loop, all of them outside of the step."""
    if fault == "preview":
        monkeypatch.setattr(Preview, "_conditions", fail)
    elif fault == "log":
        monkeypatch.setattr(StepStatistics, "metrics", fail)
    elif fault == "checkpoint":
        monkeypatch.setattr(checkpoint.Checkpointer, "save", fail)
    elif fault == "restore":
        monkeypatch.setattr(checkpoints, "resumable_checkpoints", fail)
    elif fault == "batch":
        load = TrainingStream._load
        monkeypatch.setattr(TrainingStream, "_load", lambda self, first: broken_read(self, first, load))
    elif fault == "hang":
        monkeypatch.setattr(Preview, "_conditions", sleep_for_ever)
    else:
        assert fault == "evaluation"


def rank_main(
    rank: int, port: int, folder: Path, dataset, fault: str, broken: int, stays: bool, timeout_s: float
) -> None:
    """Train one of two ranks, and write down how it ended; a rank that stays is alive afterwards, as a Ray actor is."""
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / f"{rank}.log", level=logging.INFO)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Short where the end of a process is what is tested; elsewhere a busy machine may take long to notice.
        monkeypatch.setattr(watchdog, "OTHERS_GRACE_S", 1.5 if stays else 30.0)
        if rank == broken:
            break_rank(fault, monkeypatch)
        often = ["tracking.grid_every=50", "checkpoint.every=50", "tracking.log_every=50"]
        config = tiny_config(folder, 6 * BATCH, BATCH, *often, f"cluster.step_timeout_s={timeout_s}")
        hook = Hook(broken) if fault == "evaluation" else None
        job = Job(config, dataset, MemoryTracker(), {}, evaluation_hook=hook)
        context = RunContext.of(job, rank=rank, world_size=2, device=torch.device("cpu"))
        try:
            train_rank(context, FolderShell(folder, rank))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            (folder / f"{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))
            if stays:
                sleep_for_ever()


class Ranks:
    """Two ranks of one run, of which one fails."""

    def __init__(self, folder, dataset, fault, broken, *, stays=False, timeout_s=LONGER_THAN_ANY_TEST_S):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        arguments = [(rank, port, folder, dataset, fault, broken, stays, timeout_s) for rank in range(2)]
        self.processes = [FORKING.Process(target=rank_main, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()

    def exit_code(self, rank: int, within_s: float) -> int | None:
        self.processes[rank].join(within_s)
        return self.processes[rank].exitcode

    def error(self, rank: int) -> list[str]:
        return json.loads((self.folder / f"{rank}.json").read_text())

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fault", "broken"),
    [("restore", 0), ("evaluation", 1), ("log", 0), ("checkpoint", 0), ("batch", 1)],
)
def test_an_error_of_one_rank_outside_the_step_ends_the_other_by_name_in_seconds(digits, tmp_path, fault, broken):
    with Ranks(tmp_path, digits, fault, broken) as ranks:
        assert [ranks.exit_code(rank, within_s=120) for rank in range(2)] == [0, 0]
        assert ranks.error(broken)[1].endswith("the reason")
        kind, message = ranks.error(1 - broken)
        assert kind == "RankFailedError"
        assert message.startswith(f"rank {broken} of the run failed: ")
        assert message.endswith("the reason")


@pytest.mark.integration
@pytest.mark.parametrize("broken", [0, 1])
def test_the_other_rank_ends_although_the_process_of_the_failed_one_stays(digits, tmp_path, broken):
    with Ranks(tmp_path, digits, "preview", broken, stays=True) as ranks:
        assert ranks.exit_code(1 - broken, within_s=120) == EXIT_CODE
        assert ranks.processes[broken].is_alive()
        assert f"rank {broken} of the run failed: ValueError: the reason; rank {1 - broken}" in ranks.log(1 - broken)


@pytest.mark.integration
def test_a_rank_that_hangs_ends_with_all_others_and_the_stacks_say_where(digits, tmp_path):
    with Ranks(tmp_path, digits, "hang", 1, timeout_s=HANG_S) as ranks:
        codes = [ranks.exit_code(rank, within_s=120) for rank in range(2)]
        assert codes[1] == EXIT_CODE
        assert codes[0] in (0, EXIT_CODE)
        assert f"has made no progress for {HANG_S} s in the phase 'grid' (cluster.step_timeout_s)" in ranks.log(1)
        assert "in sleep_for_ever" in ranks.log(1)
        assert "in all_gather_items" in ranks.log(0)
        assert "sleep_for_ever" not in ranks.log(0)


@pytest.mark.parametrize("timeout_s", [0, None, 0.1])
def test_one_rank_alone_is_watched_too_unless_there_is_no_limit(monkeypatch, caplog, timeout_s):
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    monkeypatch.setattr(watchdog, "STALLED_GRACE_S", 0.05)
    monkeypatch.setattr(watchdog, "end_process", ended.set)
    with watchdog.Watchdog(Clock(time.monotonic()), timeout_s):
        assert ended.wait(30 if timeout_s else 0.3) is bool(timeout_s)
    assert ("in the phase 'startup'" in caplog.text) is bool(timeout_s)


def test_the_trace_of_nccl_is_logged_where_torch_has_one(monkeypatch):
    monkeypatch.delattr(_distributed_c10d, "_dump_nccl_trace_json", raising=False)
    assert watchdog.nccl_trace() == "none"
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace_json", lambda onlyActive: b'{"a": 1}', raising=False)
    assert watchdog.nccl_trace() == '{"a": 1}'


def test_a_process_that_hangs_is_ended_although_nothing_can_be_said(monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    ended = threading.Event()
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    monkeypatch.setattr(watchdog, "STALLED_GRACE_S", 0.05)
    monkeypatch.setattr(watchdog, "end_process", ended.set)
    monkeypatch.setattr(watchdog, "stacks", full)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with watchdog.Watchdog(Clock(time.monotonic()), 0.1):
        assert ended.wait(30)
