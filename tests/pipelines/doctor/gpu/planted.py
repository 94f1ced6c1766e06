"""Ranks with a fault: what a rank does wrong is put around its task, in its own process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipelines.doctor.gpu import tasks
from pipelines.doctor.gpu.ranks import Place, Ranks, Task
from pipelines.training.loop.state import make_state
from tests.forked import FORKING

assert FORKING  # its server has imported what the ranks need


@dataclass(frozen=True)
class FaultyRanks(Ranks):
    """Ranks, the last of which has a fault.

    Attributes:
        fault: called in the process of that rank, before its task.
    """

    fault: Callable[[], None] = lambda: None

    def run(self, task: Task, *arguments: Any) -> list[Any]:
        """Call the task in every rank, in the last one after the fault."""
        return super().run(with_fault, self.fault, task, *arguments)


def with_fault(place: Place, fault: Callable[[], None], task: Task, *arguments: Any) -> Any:
    """Be one rank of `FaultyRanks`."""
    if place.rank == place.count - 1:
        fault()
    return task(place, *arguments)


def scale_gradients() -> None:
    """Have the gradients of this rank be half as large again as they should."""

    def with_hook(*arguments):
        state = make_state(*arguments)
        state.network.register_forward_hook(_scaled)
        return state

    vars(tasks)["make_state"] = with_hook


def _scaled(module, given, output):
    output.register_hook(lambda gradient: 1.5 * gradient)


def sleep_in_exchanges() -> None:
    """Have this rank be late whenever it exchanges something with one other rank."""
    exchange = dist.batch_isend_irecv

    def late(*arguments, **options):
        time.sleep(0.5)
        return exchange(*arguments, **options)

    dist.batch_isend_irecv = late


def corrupt_sums() -> None:
    """Have this rank read one wrong number of each all-reduce."""
    original = dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        original(tensor, *arguments, **options)
        tensor.view(-1)[-1] += 1

    dist.all_reduce = all_reduce


def outlive(place: Place) -> None:
    """Go on although rank 0 has ended."""
    if place.rank == 0:
        os._exit(1)
    time.sleep(60)


def fail(place: Place) -> None:
    """Fail on one rank."""
    if place.rank:
        raise RuntimeError("the card has fallen off the bus")
    dist.barrier()
