"""Processes of tests, forked from one server that has imported what they need once for all of them.

A process has one such server, which imports what the last call before its start names: so this module alone makes the
call. What is forked has the environment and the limits of the server, which are those of the first test that forks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

from torch.multiprocessing.spawn import start_processes

FORKING: ForkServerContext = multiprocessing.get_context("forkserver")
# No modules of the tests: the server finds them only where it is started in the root of the checkout.
FORKING.set_forkserver_preload(
    ["pytest", "hypothesis", "gcsfs", "pipelines.training.loop.train", "pipelines.shards.ingest.write"]
)


def start_ranks(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Call a function of a module with the rank and these arguments in as many processes, and wait for their end.

    Raises:
        ProcessRaisedException: one of them has raised an error, and the others were ended.
    """
    start_processes(function, arguments, nprocs=world, start_method="forkserver")
