"""Processes of a selftest, one for each device of this machine, in a process group of torch.distributed."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from pipelines.presentation.errors import PipelineError

BACKEND = {"cuda": "nccl", "cpu": "gloo"}
GROUP_S = 180.0
"""Seconds after which a group of ranks is ended that has not finished its task."""
COLLECTIVE_S = 60.0
"""Seconds that a collective may wait for the other ranks."""
POLL_S = 0.05


class RanksError(PipelineError):
    """The processes of a selftest did not finish their task; the message says what they said."""


@dataclass(frozen=True)
class Place:
    """One rank's place among the processes.

    Attributes:
        rank: 0..count - 1; on GPUs also the index of the device.
        count: number of ranks.
        kind: type of the devices.
    """

    rank: int
    count: int
    kind: Literal["cuda", "cpu"]

    @property
    def device(self) -> torch.device:
        """The device on which the rank computes."""
        return torch.device("cuda", self.rank) if self.kind == "cuda" else torch.device("cpu")


Task = Callable[..., Any]
"""A function of a module whose first argument is the `Place`; its result must pickle."""


@dataclass(frozen=True)
class Ranks:
    """As many processes as are asked for, each with a device of its own.

    Attributes:
        count: number of processes.
        kind: type of the devices; CPUs take gloo in place of NCCL.
    """

    count: int
    kind: Literal["cuda", "cpu"]

    def places(self) -> list[Place]:
        """Return the place of each rank."""
        return [Place(rank, self.count, self.kind) for rank in range(self.count)]

    def run(self, task: Task, *arguments: Any) -> list[Any]:
        """Call a task in every rank, and return the results in the order of the ranks.

        Raises:
            RanksError: a rank failed, or the ranks did not end within `GROUP_S` seconds.
        """
        with self._started(task, *arguments) as (context, folder):
            deadline = time.monotonic() + GROUP_S
            try:
                while not context.join(timeout=POLL_S):  # ends the others if one fails
                    if time.monotonic() > deadline:
                        raise RanksError(f"{self.count} ranks did not end within {GROUP_S:.0f} s")
            except (
                ProcessRaisedException,
                ProcessExitedException,
            ) as error:
                raise RanksError(str(error).strip().splitlines()[-1]) from error
            return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(self.count)]

    def seconds_after_death(
        self, task: Task, *arguments: Any, within_s: float
    ) -> tuple[float | None, list[int | None]]:
        """Call a task in which a rank dies, and see how long the others live.

        Returns:
            The seconds from the first end of a process to the last, None if some still ran after `within_s` seconds;
            and the exit code of each process, negative for a signal.

        Raises:
            RanksError: no process ended within `GROUP_S` seconds.
        """
        with self._started(task, *arguments) as (context, _):
            if not _wait_until(lambda: any(code is not None for code in _codes(context)), GROUP_S):
                raise RanksError(f"none of {self.count} ranks ended within {GROUP_S:.0f} s")
            began = time.monotonic()
            ended = _wait_until(lambda: None not in _codes(context), within_s)
            return time.monotonic() - began if ended else None, _codes(context)

    @contextlib.contextmanager
    def _started(self, task: Task, *arguments: Any) -> Iterator[tuple[ProcessContext, Path]]:
        """Start the ranks, and end those that are left."""
        with tempfile.TemporaryDirectory(prefix="ddpm-doctor-") as folder:
            context = start_processes(
                _serve,
                (self, Path(folder), task, arguments),
                nprocs=self.count,
                join=False,
                daemon=True,
                start_method="forkserver",  # as spawn, but the imports are made once
            )
            assert context is not None  # it was not to be joined
            try:
                yield context, Path(folder)
            finally:
                for process in context.processes:
                    _end(process)


def _codes(context: ProcessContext) -> list[int | None]:
    return [process.exitcode for process in context.processes]


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _end(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _serve(rank: int, ranks: Ranks, folder: Path, task: Task, arguments: tuple[Any, ...]) -> None:
    """Be one rank: call the task in the process group, and leave its result in the folder."""
    faulthandler.enable()
    logging.basicConfig(level=logging.CRITICAL)  # what a rank finds wrong is part of the result
    place = ranks.places()[rank]
    if place.kind == "cuda":
        torch.cuda.set_device(place.device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.count))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a name of this machine need not resolve
    dist.init_process_group(
        BACKEND[place.kind],
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks.count,
        timeout=timedelta(seconds=COLLECTIVE_S),
        device_id=place.device if place.kind == "cuda" else None,
    )
    result = task(place, *arguments)
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank takes the group away from one that still uses it
    dist.destroy_process_group()
